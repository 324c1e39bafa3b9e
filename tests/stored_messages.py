"""The golden and malformed messages of tests/vectors: files, layouts and masks, by name.

It imports nothing but the package: tests/gpu read them too, on a machine that has little else.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fedmap_sparse as fs
from fedmap_sparse import codec

HERE = Path(__file__).parent / "vectors"
sys.path.insert(0, str(HERE))  # its modules import those beside them
GOLDEN: dict[str, Any] = json.loads((HERE / "golden.json").read_text())
MALFORMED: dict[str, Any] = json.loads((HERE / "malformed.json").read_text())


@cache
def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@cache
def layout(name: str) -> fs.FlatLayout:
    return module("make_vectors").layouts()[name]


def golden(name: str) -> bytes:
    return (HERE / "golden" / f"{name}.fsm").read_bytes()


def malformed(name: str) -> bytes:
    return (HERE / "malformed" / f"{name}.fsm").read_bytes()


@cache
def have(name: str) -> fs.Mask | None:
    entry = GOLDEN[name]
    if entry["have"] is None:
        return None
    bits = (HERE / "masks" / f"{entry['have']}.bits").read_bytes()
    words = torch.frombuffer(bytearray(bits), dtype=torch.int32)
    return fs.Mask.from_words(words, layout(entry["layout"]).prunable_numel)


@cache
def base(name: str) -> codec.Message | None:
    other = GOLDEN[name]["base"]
    return None if other is None else decode(other, golden(other))


def decode(name: str, data: bytes, device: str | None = None) -> codec.Message:
    """Decode `data` as a receiver of the golden message `name` does."""
    entry = GOLDEN[name]
    how = {} if device is None else {"device": device}
    its_layout, mask = layout(entry["layout"]), have(name)
    return codec.decode(data, its_layout, mask=mask, base=base(name), **how)
