"""trimmed_mean: ranks of each element, float64 sums by rank, the same bits on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from guards import bits, guarded
from page_faults import LINUX, touched_bytes
from torch import Tensor

from fedmap_sparse import ops

#: Around every run of 32 rows, and beyond the two that one merge takes.
COUNTS = [1, 2, 3, 4, 5, 9, 10, 31, 32, 33, 50, 63, 64, 65, 100, 129]
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 1023, 1025]


def vectors(count: int, n: int, ties: bool = False) -> list[Tensor]:
    """Magnitudes from tiny to large, starting one element after an allocation does."""
    made = []
    for _ in range(count):
        room = torch.randn(n + 1) * torch.randint(-12, 6, (n + 1,)).float().exp2()
        made.append((room * 4).round().div(4) if ties else room)
    return [room[1:] for room in made]


def trims(count: int) -> list[int]:
    return sorted({0, min(1, (count - 1) // 2), count // 4, (count - 1) // 2})


@pytest.mark.parametrize("count", COUNTS)
def test_kernel_is_reference(isa: str, count: int) -> None:
    for n in SIZES if count < 20 else (33, 1025):
        given = vectors(count, n, ties=n == 33)
        for trim in trims(count):
            with guarded(n, torch.float32, shift=n % 3) as mean:
                ops.trimmed_mean(given, trim, out=mean, backend="cpu")
                want = ops.trimmed_mean(given, trim, backend="reference")
                assert torch.equal(bits(mean), bits(want)), (n, trim)


@pytest.mark.parametrize("count", [1, 2, 5, 10, 33])
def test_it_is_numpys(isa: str, count: int) -> None:
    given = vectors(count, 5001, ties=True)
    stacked = np.stack([v.numpy() for v in given]).astype(np.float64)
    median = ops.trimmed_mean(given, (count - 1) // 2)
    assert np.array_equal(median.numpy(), np.median(stacked, axis=0).astype(np.float32))
    for trim in trims(count):
        total = np.zeros(5001)
        for row in np.sort(stacked, axis=0)[trim : count - trim]:
            total += row
        wanted = (total / (count - 2 * trim)).astype(np.float32)
        assert np.array_equal(ops.trimmed_mean(given, trim).numpy(), wanted)


def test_thousands_of_vectors() -> None:
    given = vectors(2500, 70)
    for trim in (0, 700, 1249):
        want = ops.trimmed_mean(given, trim, backend="reference")
        assert torch.equal(bits(ops.trimmed_mean(given, trim)), bits(want))


@pytest.mark.parametrize("count", [6, 37])
def test_bits_depend_on_neither_threads_nor_order(isa: str, threads: int, count: int) -> None:
    given = vectors(count, 150_001 if isa != "scalar" else 20_001)
    want = ops.trimmed_mean(given, 2)
    assert torch.equal(bits(want), bits(ops.trimmed_mean(given[::-1], 2)))
    if count == 6:
        assert torch.equal(bits(want), bits(ops.trimmed_mean(given, 2, backend="reference")))


def test_sums_go_from_the_least_value_up(isa: str) -> None:
    """-2^54 + 1 + 1 + 1 + 2^54 in float64 is 0 or 4 from the left, by the order of the ones."""
    values = [2.0**54, 1.0, -(2.0**54), 1.0, 1.0]
    want = 0.0
    for v in sorted(values):
        want += v
    given = [torch.full((40,), v) for v in values]
    assert ops.trimmed_mean(given, 0).tolist() == [np.float32(want / 5)] * 40


def test_the_median_of_two_values_is_rounded_once(isa: str) -> None:
    low, high = torch.tensor([1.0, 3.0e38, 1e-45]), torch.tensor([1.0 + 2**-23, 3.2e38, 3e-45])
    got = ops.trimmed_mean([high, low], 0)
    want = ((low.double() + high.double()) / 2).float()
    assert torch.equal(bits(got), bits(want))
    assert got.isfinite().all()


def test_zeros_of_either_sign_are_zero(isa: str) -> None:
    given = [torch.full((33,), z) for z in (-0.0, 0.0, -0.0)]
    for trim in (0, 1):
        assert not bits(ops.trimmed_mean(given, trim)).any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_not_finite_is_trimmed_or_refused(isa: str, backend: str) -> None:
    quiet = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # a negative NaN
    extremes = [math.inf, -math.inf, math.nan, float(-quiet)]
    honest = [torch.full((40,), v) for v in (1.0, 2.0, 3.0)]
    for bad in [torch.full((40,), e) for e in extremes] + [quiet.expand(40).contiguous()]:
        mean = ops.trimmed_mean([*honest, bad], 1, backend=backend)
        assert set(mean.tolist()) <= {1.5, 2.5}  # by the side that the bad one lies on
        with pytest.raises(ValueError, match="vectors: expected a finite mean, got 40 NaN or inf"):
            ops.trimmed_mean([*honest, bad], 0, backend=backend)
    beyond = [torch.tensor([math.inf]), torch.tensor([math.nan]), torch.tensor([7.0])]
    assert ops.trimmed_mean([*beyond, torch.tensor([-math.inf]), *beyond[2:]], 2).item() == 7.0


@LINUX
def test_peak_memory() -> None:
    setup = """
import torch
from fedmap_sparse import ops
vectors = [torch.ones(1_000_000) for _ in range(40)]
out = torch.ones(1_000_000)
"""
    touched = touched_bytes(setup, "ops.trimmed_mean(vectors, 10, out=out)")
    assert 0 < touched < 400_000


def test_arguments_are_checked_before_anything_is_written() -> None:
    a, b = torch.ones(4), torch.ones(5)
    out = torch.full((4,), 7.0)
    with pytest.raises(ValueError, match="at least one"):
        ops.trimmed_mean([], 0)
    with pytest.raises(ValueError, match="trim: expected 0 <= trim <= 0 of 2 vectors, got 1"):
        ops.trimmed_mean([a, a], 1, out=out)
    with pytest.raises(ValueError, match="expected 4 elements"):
        ops.trimmed_mean([a, b], 0, out=out)
    with pytest.raises(TypeError, match="float16"):
        ops.trimmed_mean([a, a.half()], 0, out=out)
    assert out.tolist() == [7.0] * 4
    assert ops.trimmed_mean([a, a, a], np.int64(1)).tolist() == [1.0] * 4
