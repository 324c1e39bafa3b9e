"""What a device may choose among: each constant of `_tuning.py` at every value that is swept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_run.sweeps import SWEEPS
from ladder import WHOLE, coding, contracts

from fedmap_sparse.triton_kernels import _tuning

F32 = torch.float32
#: The contract that a constant touches. All sizes are such that a tile is full and one is not.
CONTRACTS: dict[str, Callable[[Any], None]] = {
    "PACK_DENSE": lambda show: contracts.pack(20000, 0.9, F32, "cpu", show),
    "PACK_ROWS": lambda show: contracts.pack(20000, 0.3, F32, "cpu", show),
    "PACK_WARPS": lambda show: contracts.pack(20000, 0.4, F32, "cpu", show),
    "UNPACK_WARPS": lambda show: contracts.pack(20000, 0.2, F32, "cpu", show),
    "PACK_MIDDLE": lambda show: contracts.pack(40000, 0.15, F32, "cpu", show),
    "STEP_WHOLE": lambda show: contracts.masked_sgd(1.0, F32, "cpu", show),
    "STEP_ROWS": lambda show: contracts.masked_sgd(0.4, F32, "cpu", show),
    "STEP_BY_ROWS": lambda show: contracts.masked_sgd(0.4, F32, "cpu", show),
    "STEP_DENSE": lambda show: contracts.masked_adamw(0.5, F32, "cpu", show, amsgrad=True),
    "STEP_MIDDLE": lambda show: contracts.masked_adamw(0.15, F32, "cpu", show),
    "STEP_SPARSE": lambda show: contracts.masked_sgd(0.02, F32, "cpu", show),
    "TRIMMED_MANY": lambda show: contracts.trimmed(17, 8, 1001, "cpu", show, aligned=True),
    "EXTRACT_WORDS": lambda show: contracts.deposit(40000, 0.05, "cpu", show),
    "DEPOSIT_WARPS": lambda show: contracts.deposit(40000, 0.3, "cpu", show),
    "JOIN": lambda show: coding.values(34_000, torch.float16, "cpu", show),
    "DESCRIBE": lambda show: coding.values(34_000, F32, "cpu", show),
}


def _select(show: Any) -> None:
    values = contracts.special(20000, F32, "cpu")
    contracts.select(values.round(decimals=2), 2000, contracts.mask_of(20000, 0.7, "cpu"), show)


CASES = [(s.constant, value) for s in SWEEPS for value in (s.values if WHOLE else s.values[:1])]
_ALWAYS = ("STEP_DENSE", "EXTRACT_WORDS")


@pytest.mark.parametrize("rung", ["ptx sm_90"], indirect=True)
@pytest.mark.parametrize(
    ("constant", "value"), [case for case in CASES if WHOLE or case[0] in _ALWAYS]
)
def test_a_variant_does_the_same(
    rung: Any, constant: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tuning, constant, value)
    if constant == "STEP_WHOLE":
        monkeypatch.setattr(_tuning, "step_shape", lambda density: value)
    CONTRACTS.get(constant, _select)(rung.show)
