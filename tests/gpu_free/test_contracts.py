"""Every op on every rung: values against the reference, no fault, in any order of programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpucheck import contracts

import fedmap_sparse as fs
from fedmap_sparse import ops

FLOATS = contracts.FLOATS


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "density"), [(31, 0.5), (5001, 0.4), (20000, 0.08)])
def test_pack(rung: Any, n: int, density: float, dtype: torch.dtype) -> None:
    contracts.pack(n, density, dtype, "cpu", rung.show)


def test_pack_at_the_extremes(rung: Any) -> None:
    for mask in (fs.Mask.empty(100), fs.Mask.full(8192), fs.Mask.full(0)):
        values = torch.randn(mask.numel)
        packed = ops.pack(values, mask, backend="triton")
        assert torch.equal(packed, ops.pack(values, mask, backend="reference"))
        want = ops.unpack(packed, mask, backend="reference")
        assert torch.equal(ops.unpack(packed, mask, backend="triton"), want)


@pytest.mark.parametrize(("n", "density"), [(1, 1.0), (65, 0.5), (5001, 0.4), (33000, 0.05)])
def test_nest(rung: Any, n: int, density: float) -> None:
    contracts.nest(n, density, "cpu", rung.show)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [0.5, 0.02])
def test_masked_sgd(rung: Any, density: float, dtype: torch.dtype) -> None:
    contracts.masked_sgd(density, dtype, "cpu", rung.show)


@pytest.mark.parametrize("how", ["zeroed", "momentum", "aligned"])
def test_masked_sgd_variants(rung: Any, how: str) -> None:
    options = {"zeroed": True} if how == "zeroed" else {how: False}
    contracts.masked_sgd(0.3, torch.float32, "cpu", rung.show, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [0.5, 0.02])
def test_masked_adamw(rung: Any, density: float, dtype: torch.dtype) -> None:
    contracts.masked_adamw(density, dtype, "cpu", rung.show)


def test_masked_adamw_variants(rung: Any) -> None:
    contracts.masked_adamw(0.3, torch.float32, "cpu", rung.show, amsgrad=True, aligned=False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("aligned", [True, False])
def test_accumulate(rung: Any, aligned: bool, dtype: torch.dtype) -> None:
    contracts.accumulate(3001, dtype, "cpu", rung.show, aligned=aligned)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2500])
def test_cast(rung: Any, n: int, dtype: torch.dtype) -> None:
    contracts.cast(n, dtype, "cpu", rung.show)


@pytest.mark.parametrize("block", [64, 192, 1024])
@pytest.mark.parametrize("feedback", [True, False])
def test_quantize(rung: Any, block: int, feedback: bool) -> None:
    contracts.quantize(2500, block, "cpu", rung.show, feedback=feedback)
