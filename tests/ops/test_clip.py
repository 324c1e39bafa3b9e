"""clip_difference_: the norm and the cut, bit for bit on every ISA level and thread count."""

from __future__ import annotations

import math

import pytest
import torch
from guards import bits

from fedmap_sparse import ops

SIZES = [0, 1, 7, 255, 256, 257, 4095, 4096, 4097, 70_001]


def vectors(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Off an alignment of 64 bytes; magnitudes over many exponents, so that order shows."""
    spread = torch.randint(-12, 12, (n + 1,)).float().exp2()
    values, start = torch.randn(n + 1) * spread, torch.randn(n + 1)
    return values[1:].clone(), start[1:].clone()


@pytest.mark.parametrize("n", SIZES)
def test_kernel_is_reference(isa: str, n: int) -> None:
    values, start = vectors(n)
    true = float((values.double() - start.double()).norm())
    for share in (0.3, 2.0):
        limit = share * true or 1.0
        ours, theirs = values.clone(), values.clone()
        norm = ops.clip_difference_(ours, start, limit, backend="cpu")
        assert norm == ops.clip_difference_(theirs, start, limit, backend="reference")
        assert norm == pytest.approx(true, rel=1e-14)
        assert torch.equal(bits(ours), bits(theirs))
        assert torch.equal(ours, values) is (share > 1 or n == 0)


def test_neither_threads_nor_place_change_bits(isa: str, threads: int) -> None:
    values, start = vectors(900_001)
    expected = values.clone()
    norm = ops.clip_difference_(expected, start, 5.0, backend="reference")
    room = torch.full((900_011,), 7.0)
    room[5:900_006] = values
    assert ops.clip_difference_(room[5:900_006], start, 5.0, backend="cpu") == norm
    assert torch.equal(bits(room[5:900_006]), bits(expected))
    assert room[:5].tolist() == [7.0] * 5
    assert room[900_006:].tolist() == [7.0] * 5


def test_the_cut_has_the_norm_that_was_asked_for() -> None:
    values, start = vectors(50_000)
    ops.clip_difference_(values, start, 3.0)
    assert float((values.double() - start.double()).norm()) == pytest.approx(3.0, rel=1e-5)


def test_at_the_norm_itself_nothing_changes() -> None:
    values, start = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert ops.clip_difference_(values, start, 5.0) == 5.0
    assert values.tolist() == [3.0, 4.0]
    assert ops.clip_difference_(values, start, math.nextafter(5.0, 0)) == 5.0
    assert values.tolist() == pytest.approx([3.0, 4.0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_and_nothing_written(backend: str, bad: float) -> None:
    for at in (0, 4999):
        for which in (0, 1):
            pair = [torch.ones(5000), torch.zeros(5000)]
            pair[which][at] = bad
            before = pair[0].clone()
            with pytest.raises(ValueError, match="expected finite values"):
                ops.clip_difference_(pair[0], pair[1], 1.0, backend=backend)
            assert torch.equal(bits(pair[0]), bits(before))


def test_the_largest_numbers_do_not_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    values, start = torch.full((9000,), largest), torch.full((9000,), -largest)
    norm = ops.clip_difference_(values, start, 1e30)
    assert norm == pytest.approx(2 * largest * math.sqrt(9000))
    assert bool(values.isfinite().all())


def test_arguments_are_named() -> None:
    x = torch.ones(4)
    with pytest.raises(ValueError, match=r"start: expected 4 elements \(one each\), got 3"):
        ops.clip_difference_(x, torch.ones(3), 1.0)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="max_norm: expected a finite number above 0"):
            ops.clip_difference_(x, torch.zeros(4), bad)
    with pytest.raises(TypeError, match="values: expected dtype float32, got float16"):
        ops.clip_difference_(x.half(), torch.zeros(4), 1.0)
