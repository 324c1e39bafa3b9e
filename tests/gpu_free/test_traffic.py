"""Bytes: what each op touches against its floor, what its warps ask for against what they touch."""

from __future__ import annotations

import functools

import pytest
import torch
from ladder import WHOLE, measure
from ladder.catalogue import Workload, workloads

from fedmap_sparse.triton_kernels import select

_N = 131072
_QUICK = ("pack float32 0.5", "unpack float32 0.1", "deposit 0.5", "masked_sgd float32 0.1",
          "masked_adamw float32 1.0", "weighted_mean 10 float32", "cast float32 bfloat16",
          "quantize_int8 feedback", "select float32")  # fmt: skip
NAMES = [w.name for w in workloads(64)] if WHOLE else list(_QUICK)


@functools.cache
def catalogue() -> dict[str, Workload]:
    return {w.name: w for w in workloads(_N)}


@pytest.mark.parametrize("name", NAMES)
def test_sectors(name: str) -> None:
    workload = catalogue()[name]
    moved = measure.traffic(workload)
    assert not moved.faults
    assert moved.requested <= workload.request_limit * moved.touched
    if workload.stem != "select":  # its scratch of fixed size wants a million elements
        assert moved.touched <= workload.touch_limit * workload.floor
    assert moved.launches <= {"select": 9, "encode_values": 4}.get(workload.stem, 3)


@pytest.mark.skipif(not WHOLE, reason="a million elements: run by make test-gpu-free")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5.2), (torch.bfloat16, 3.2)])
def test_select_reads_once(dtype: torch.dtype, limit: float) -> None:
    """At 2^20 elements, scratch that is cleared counted too."""
    n = 1 << 20
    values = torch.randn(n).to(dtype)
    search = select._Search([values], [None], n, n // 10)
    workload = Workload("select", n, search.mask, 0.0, 0.0, 0.0)
    cleared = 4 * (search.sample.numel() + search.histogram.numel())
    assert measure.touched(workload) + cleared / n <= limit
