"""Compiled for each architecture: no spills, wide accesses, registers and shared memory in budget.

`python benchmarks/gpu_report.py --budgets` writes the table anew, to be looked at and committed.
"""

from __future__ import annotations

import functools

import pytest
from gpucheck.driver import compile_only
from ladder import WHOLE, measure
from ladder.catalogue import Workload, workloads

_ARCHS = (80, 90, 100) if WHOLE else (90,)
_QUICK = (
    "pack float32 0.5",
    "unpack float32 0.5",
    "masked_sgd float32 0.5",
    "weighted_mean 10 float32",
    "trimmed_mean 10 less 4",
    "quantize_int8 feedback",
    "decode_mask 0.1",
)
NAMES = [w.name for w in workloads(64)] if WHOLE else list(_QUICK)

# Kernels with flat streams, and those streams' wide accesses that must survive at any size.
_WIDE = {
    "step": ("ld128", "st128"),
    "weighted_mean": ("ld128", "st128"),
    "accumulate_add": ("ld128", "st128"),
    "accumulate_mean": ("ld128",),
    "cast": ("ld128",),
    "quantize_int8": ("ld128",),
    "dequantize_int8": ("st128",),
    "read": ("ld128",),
}


@functools.cache
def catalogue(n: int) -> dict[str, Workload]:
    return {w.name: w for w in workloads(n)}


@pytest.mark.parametrize("arch", _ARCHS)
@pytest.mark.parametrize("name", NAMES)
def test_budget(name: str, arch: int) -> None:
    budgets = measure.read_budgets()
    for code in measure.machine_code(catalogue(65536)[name], arch):
        budget, cost = budgets[code.key], code.cost
        assert cost.spills == 0, code.key
        assert cost.registers <= budget["registers"], code.key
        assert cost.shared <= budget["shared"], code.key
        assert cost.counts["ld128"] >= budget["ld128"], code.key
        assert cost.counts["st128"] >= budget["st128"], code.key


@pytest.mark.parametrize("n", [65536, 65537])
@pytest.mark.parametrize("name", NAMES)
def test_wide_accesses_at_sizes_divisible_by_16_and_not(name: str, n: int) -> None:
    for code in measure.machine_code(catalogue(n)[name], 90):
        for access in _WIDE.get(code.kernel.split("#")[0], ()):
            assert code.cost.counts[access] > 0, code.key


@pytest.mark.skipif(not WHOLE, reason="another architecture: run by make test-gpu-free")
@pytest.mark.parametrize("name", NAMES)
def test_lowers_for_amd(name: str) -> None:
    with compile_only("gfx942") as kernels:
        catalogue(65536)[name].run()
    assert all("hsaco" in kernel.asm for kernel in kernels.values())
