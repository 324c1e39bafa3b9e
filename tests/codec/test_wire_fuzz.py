"""The short form of `make fuzz-wire`, and that it finds what it should."""

from __future__ import annotations

import importlib.util
import math
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedmap_sparse.codec import container, values

FOLDER = Path(__file__).parents[2] / "fuzz"


@pytest.fixture(scope="module")
def wire() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wire", FOLDER / "wire.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["wire"] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_damaged_messages_are_refused_or_read_as_the_second_reader_does(wire: ModuleType) -> None:
    checker = wire.Checker(0.05, 20)
    checker.run(1000)
    assert checker.findings == []
    assert checker.counts["accepted"] > 100
    assert checker.counts["refused"] > 500
    assert checker.counts["read twice"] > 10


def test_joined_parts_are_the_message(wire: ModuleType) -> None:
    for seed in wire.Checker(0, 0).mutator.seeds:
        assert wire.Parts.of(seed.data).join() == seed.data


def test_the_second_reader_has_infinities(wire: ModuleType) -> None:
    """An int8 scale may be such that a product is beyond float32; sound, and refused elsewhere."""
    payload = struct.pack("<f", 3e38) + bytes([127, 129, 1, *[0] * 61])
    found = wire.module("reader_coding").int8_values(payload, 64, 64)
    assert struct.unpack("<3f", found[:12]) == (math.inf, -math.inf, pytest.approx(3e38))


FAULTS: dict[str, Any] = {
    "sections are taken for ones to ignore": (container, "_IGNORABLE_ID", 16),
    "a count is not compared": (values, "check", lambda *_: None),
    "values are all called finite": (values, "peak", lambda t: 0.0),
    "the tail's gaps are not looked at": (values, "check_tail", lambda *_: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    wire: ModuleType, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(wire, "ROOT", tmp_path)
    checker = wire.Checker(0.3, 3)
    monkeypatch.setattr(*FAULTS[fault])
    for _ in range(6):
        checker.run(100)
        if checker.findings:
            break
    assert checker.findings
    assert torch.is_tensor(checker.live.server.params.values)
