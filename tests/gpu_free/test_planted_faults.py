"""A fault planted in a copy of each kernel, and the rungs that notice it.

The whole table is printed by `make test-gpu-free`; every fault must be noticed by one rung.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpucheck.driver import emulate
from gpucheck.interpreter import guard
from ladder import WHOLE, coarser, coding, contracts, private

from fedmap_sparse import _backends, triton_kernels

Contract = Callable[[Any], None]
F32, BF16 = torch.float32, torch.bfloat16
_TABLE = Path(__file__).with_name("planted_faults.toml")


@dataclass(frozen=True)
class Fault:
    stem: str
    what: str
    old: str
    new: str
    #: A function of this file, without its underscore.
    contract: str
    always: bool = False


def _pack(show: Any) -> None:
    contracts.pack(5001, 0.4, F32, "cpu", show)


def _pack_sparse(show: Any) -> None:
    contracts.pack(5001, 0.1, F32, "cpu", show)


def _deposit(show: Any) -> None:
    contracts.deposit(5001, 0.4, "cpu", show)


def _deposit_far(show: Any) -> None:
    contracts.deposit(20001, 0.4, "cpu", show)


def _sgd(show: Any) -> None:
    contracts.masked_sgd(0.5, F32, "cpu", show)


def _sgd16(show: Any) -> None:
    contracts.masked_sgd(0.5, BF16, "cpu", show)


def _adamw(show: Any) -> None:
    contracts.masked_adamw(0.5, F32, "cpu", show, amsgrad=True)


def _mean(show: Any) -> None:
    contracts.accumulate(3001, F32, "cpu", show, aligned=True)


def _ties(show: Any) -> None:
    contracts.mean_rounds_once("cpu", show)


def _trimmed(show: Any) -> None:
    contracts.trimmed(10, 2, 1001, "cpu", show, aligned=True)


def _distances(show: Any) -> None:
    contracts.distances(6, 4200, "cpu", show)


def _cast(show: Any) -> None:
    contracts.cast(2500, F32, "cpu", show)


def _quantize(show: Any) -> None:
    contracts.quantize(2500, 192, "cpu", show, feedback=True)


def _select(show: Any) -> None:
    values = contracts.special(20000, F32, "cpu")
    contracts.select(values.round(decimals=2), 2000, contracts.mask_of(20000, 0.7, "cpu"), show)


def _rank(show: Any) -> None:
    contracts.rank_index(2048 * 1100 + 5, "cpu", show)


def _select_missed(show: Any) -> None:
    contracts.select(torch.ones(70000), 41000, None, show)


def _select_distinct(show: Any) -> None:
    contracts.select(contracts.special(20000, F32, "cpu"), 2000, None, show)


def _masks(show: Any) -> None:
    with coding.small_chunks(16, 256):
        coding.masks(coding.RUNS, 3, "cpu", show, by="reference")


def _no_room(show: Any) -> None:
    coding.masks_without_room("cpu", show)


def _ranks(show: Any) -> None:
    coding.ranks(5001, "cpu", show)


def _values(show: Any) -> None:
    with coding.small_chunks(16, 512):
        coding.values(700, torch.float16, "cpu", show, by="reference")


def _values32(show: Any) -> None:
    coding.values(300, F32, "cpu", show)


def _values_far_apart(show: Any) -> None:
    with coding.small_chunks(16, 512):
        coding.values_far_apart("cpu", show, by="reference")


def _values_refused(show: Any) -> None:
    coding.values_refused("cpu", show)


def _clip(show: Any) -> None:
    private.clip(9001, "cpu", show)


def _clip_refuses(show: Any) -> None:
    private.clip_refuses("cpu", show)


def _noise(show: Any) -> None:
    private.noise(5001, "cpu", show)


def _fixed(show: Any) -> None:
    private.fixed(2501, "cpu", show)


def _sgd_unaligned(show: Any) -> None:
    contracts.masked_sgd(1.0, F32, "cpu", show, aligned=False)


FAULTS = [Fault(**entry) for entry in tomllib.loads(_TABLE.read_text())["fault"]]


def _plant(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import a copy of the module with the fault, and again what was imported from it."""
    package = Path(triton_kernels.__file__).parent
    text = (package / f"{fault.stem}.py").read_text()
    assert fault.old in text, f"{fault.stem}: the code that {fault.what!r} replaces is gone"
    names = [fault.stem]
    names += {
        "_step": ["masked_sgd", "masked_adamw"],
        "_bits": ["_scan"],
        "_scan": ["extract", "select"],
        "_search": ["select"],
        "_rans": ["_entropy_masks", "_entropy_values", "_entropy_join", "entropy"],
        "_entropy_masks": ["entropy"],
        "_entropy_values": ["_entropy_join", "entropy"],
        "_entropy_join": ["entropy"],
    }.get(fault.stem, [])
    for name in names:
        full = f"fedmap_sparse.triton_kernels.{name}"
        copy = folder / f"{name}.py"
        source = text.replace(fault.old, fault.new) if name == fault.stem else None
        copy.write_text(source or (package / f"{name}.py").read_text())
        spec = importlib.util.spec_from_file_location(full, copy)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full, module)
        monkeypatch.setattr(triton_kernels, name, module, raising=False)
        spec.loader.exec_module(module)


def _noticed(session: Any, contract: Contract) -> str:
    values = ""
    with np.errstate(all="ignore"), session as watch:
        try:
            contract(watch.show)
        except Exception:
            values = "values"
    return " and ".join(filter(None, [values, "fault" if watch.faults else ""])) or "-"


@pytest.mark.parametrize(
    "fault",
    [f for f in FAULTS if WHOLE or f.always],
    ids=lambda fault: f"{fault.stem}: {fault.what}",
)
def test_planted_fault_is_noticed(
    fault: Fault,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    summary: list[str],
    poisoned: None,
) -> None:
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        importlib.import_module(f"fedmap_sparse.triton_kernels.{module.name}")
    monkeypatch.setattr(_backends, "_missing", lambda name: "")
    _plant(fault, tmp_path, monkeypatch)
    seen = {}
    for name, session in (("interpreter", guard(1)), ("ptx", emulate(seed=1))):
        torch.manual_seed(0)
        with coarser() if name == "interpreter" else contextlib.nullcontext():
            seen[name] = _noticed(session, globals()[f"_{fault.contract}"])
    found = f"interpreter: {seen['interpreter']:18s} ptx: {seen['ptx']}"
    summary.append(f"{fault.stem:13s} {fault.what:34s} {found}")
    assert any(how != "-" for how in seen.values())
