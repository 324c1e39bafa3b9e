"""Every op on every rung: values against the reference, no fault, in any order of programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ladder import WHOLE, contracts

import fedmap_sparse as fs
from fedmap_sparse import ops

FLOATS = contracts.FLOATS if WHOLE else (torch.float32, torch.bfloat16)


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


@pytest.mark.parametrize(("n", "density"), [(1, 1.0), (65, 0.5), (5001, 0.4), (20000, 0.05)])
def test_deposit(rung: Any, n: int, density: float) -> None:
    contracts.deposit(n, density, "cpu", rung.show)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [0.5, 0.02])
def test_masked_sgd(rung: Any, density: float, dtype: torch.dtype) -> None:
    contracts.masked_sgd(density, dtype, "cpu", rung.show)


@pytest.mark.parametrize("how", ["zeroed", "skipped", "momentum", "aligned"])
def test_masked_sgd_variants(rung: Any, how: str) -> None:
    options = {how: how in ("zeroed", "skipped")}
    contracts.masked_sgd(0.3, torch.float32, "cpu", rung.show, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [0.5, 0.02])
def test_masked_adamw(rung: Any, density: float, dtype: torch.dtype) -> None:
    contracts.masked_adamw(density, dtype, "cpu", rung.show)


def test_masked_adamw_variants(rung: Any) -> None:
    contracts.masked_adamw(0.3, torch.float32, "cpu", rung.show, amsgrad=True, aligned=False)
    contracts.masked_adamw(0.3, torch.float32, "cpu", rung.show, amsgrad=True, skipped=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("aligned", [True, False])
def test_accumulate(rung: Any, aligned: bool, dtype: torch.dtype) -> None:
    contracts.accumulate(3001, dtype, "cpu", rung.show, aligned=aligned)


def test_mean_rounds_once(rung: Any) -> None:
    contracts.mean_rounds_once("cpu", rung.show)


@pytest.mark.parametrize(
    ("count", "trim"), [(1, 0), (10, 2), (17, 8), *([(64, 31)] if WHOLE else [])]
)
def test_trimmed(rung: Any, count: int, trim: int) -> None:
    for aligned in (True, False):
        contracts.trimmed(count, trim, 1001, "cpu", rung.show, aligned=aligned)


@pytest.mark.parametrize(("count", "n"), [(1, 33), (6, 4200), *([(3, 66_000)] if WHOLE else [])])
def test_distances(rung: Any, count: int, n: int) -> None:
    contracts.distances(count, n, "cpu", rung.show)


def test_scans_in_chunks(rung: Any) -> None:
    contracts.rank_index(2048 * 1100 + 5, "cpu", rung.show)
    contracts.extract_in_chunks("cpu", rung.show)
    contracts.select_places_in_chunks("cpu", rung.show)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2500])
def test_cast(rung: Any, n: int, dtype: torch.dtype) -> None:
    contracts.cast(n, dtype, "cpu", rung.show)


@pytest.mark.parametrize("n", [1, 33, 9000])
def test_digest_and_finiteness(rung: Any, n: int) -> None:
    contracts.digest(n, "cpu", rung.show)
    for dtype in FLOATS:
        contracts.all_finite(n, dtype, "cpu", rung.show)


@pytest.mark.parametrize("block", [64, 192, 1024])
@pytest.mark.parametrize("feedback", [True, False])
def test_quantize(rung: Any, block: int, feedback: bool) -> None:
    contracts.quantize(2500, block, "cpu", rung.show, feedback=feedback)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("n", "share"), [(5001, 0.1), *([(1, 1.0), (70000, 0.9)] if WHOLE else [])]
)
def test_select(rung: Any, n: int, share: float, dtype: torch.dtype) -> None:
    contracts.select(contracts.special(n, dtype, "cpu"), max(1, round(n * share)), None, rung.show)


def test_select_within_a_mask(rung: Any) -> None:
    values = contracts.special(40000, torch.float32, "cpu")
    for density in (0.3, 0.02) if WHOLE else (0.3,):
        within = contracts.mask_of(40000, density, "cpu", holes=True)
        for keep in (1, within.nnz // 2, within.nnz) if WHOLE else (within.nnz // 2,):
            contracts.select(values, keep, within, rung.show)
        contracts.prune(40000, within.nnz // 3, within, torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    "what",
    ["constant", "zeros", "sorted", "two values", "hidden"] if WHOLE else ["zeros", "hidden"],
)
def test_select_when_the_bracket_misses(rung: Any, what: str) -> None:
    """More candidates than there is room for, all of them ties, or a sample that misleads."""
    n = 70000
    values = {
        "constant": torch.ones(n),
        "zeros": torch.randn(n) * (torch.rand(n) < 0.3),
        "sorted": torch.arange(n, dtype=torch.float32).exp2().clamp(max=1e30) + torch.arange(n),
        "two values": torch.where(torch.rand(n) < 0.5, 1.0, -2.0),
        "hidden": contracts.hidden_from_the_sample(n, torch.float32, "cpu"),
    }[what]
    contracts.select(values, 41000, None, rung.show)
    if what == "hidden":
        contracts.select(values, 20000, contracts.mask_of(n, 0.7, "cpu"), rung.show)
    assert len(rung.launches) <= 4 * 9


def test_select_keeps_the_lowest_index_of_ties(rung: Any) -> None:
    values = torch.zeros(9000).index_fill(0, torch.tensor([5, 4100, 8999]), 1.0)
    mask = ops.magnitude_mask(values, 2, backend="triton")
    assert mask.to_bool().nonzero().flatten().tolist() == [5, 4100]
    mask = ops.magnitude_mask(values, 5, backend="triton")
    assert mask.to_bool().nonzero().flatten().tolist() == [0, 1, 5, 4100, 8999]


def test_select_over_a_list(rung: Any) -> None:
    sizes = (3000, 0, 9001, 77)
    values = [torch.randn(n).mul(i + 1).round(decimals=1) for i, n in enumerate(sizes)]
    contracts.select_list(values, 4000, [None] * 4, rung.show)
    within = [None, fs.Mask.full(0), contracts.mask_of(9001, 0.5, "cpu"), fs.Mask.empty(77)]
    contracts.select_list(values, 6000, within, rung.show)


def test_nothing_to_keep(rung: Any) -> None:
    assert ops.magnitude_mask(torch.randn(70), 0, backend="triton") == fs.Mask.empty(70)
    assert ops.magnitude_mask(torch.randn(0), 0, backend="triton") == fs.Mask.empty(0)
    assert not rung.launches
