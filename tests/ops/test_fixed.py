"""to_fixed and from_fixed: rounding, clip and sums, bit for bit on every ISA level."""

from __future__ import annotations

import pytest
import torch
from guards import bits

from fedmap_sparse import ops

SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 5001]


@pytest.mark.parametrize("n", SIZES)
def test_kernels_are_references(isa: str, n: int) -> None:
    values = (torch.randn(n + 1) * 3)[1:].clone()
    for clip, scale, weight in ((4.0, 2.0**20, 1), (2.5, 1000.3, 17), (1e-3, 0.7, 5)):
        how = {"clip": clip, "scale": scale, "weight": weight}
        ours, count = ops.to_fixed(values, **how, backend="cpu")
        theirs, expected = ops.to_fixed(values, **how, backend="reference")
        assert torch.equal(ours, theirs)
        assert count == expected == int((values.abs() > torch.tensor(clip)).sum())
        for divisor in (scale * weight, 3.0, 1e-30):
            back = ops.from_fixed(ours, divisor, backend="cpu")
            assert torch.equal(bits(back), bits(ops.from_fixed(ours, divisor, backend="reference")))


def test_neither_threads_nor_place_change_bits(isa: str, threads: int) -> None:
    values = torch.randn(300_007)[7:]
    ours, count = ops.to_fixed(values, clip=2.0, scale=1e6, weight=9, backend="cpu")
    theirs, expected = ops.to_fixed(values, clip=2.0, scale=1e6, weight=9, backend="reference")
    assert torch.equal(ours, theirs)
    assert count == expected > 0
    assert torch.equal(ops.from_fixed(ours, 7.0), ops.from_fixed(ours, 7.0, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_by_hand(isa: str, backend: str) -> None:
    """Halves to even, both signs, both ends of the clip."""
    values = torch.tensor([0.5, 1.5, -0.5, -1.5, 2.25, -0.0, 3.0, 3.1, -3.0, -1e30])
    steps, beyond = ops.to_fixed(values, clip=3.0, scale=1.0, weight=2, backend=backend)
    assert steps.tolist() == [0, 4, 0, -4, 4, 0, 6, 6, -6, -6]
    assert beyond == 2
    assert ops.from_fixed(steps, 2.0, backend=backend)[:4].tolist() == [0.0, 2.0, 0.0, -2.0]


def test_sums_modulo_2_to_the_32_give_the_weighted_mean() -> None:
    """Masks that wrap cancel, and the mean is within half a step of the exact one."""
    weights, clip, scale = [3, 10, 1], 1.5, 2.0**24
    updates = [torch.randn(1000).clamp(-clip, clip) for _ in weights]
    masks = [torch.randint(-(2**31), 2**31, (1000,)).to(torch.int32) for _ in weights]
    total = torch.zeros(1000, dtype=torch.int32)
    for update, weight, mask in zip(updates, weights, masks):
        total += ops.to_fixed(update, clip=clip, scale=scale, weight=weight)[0] + mask
    for mask in masks:
        total -= mask
    mean = ops.from_fixed(total, scale * sum(weights))
    exact = sum(u.double() * w for u, w in zip(updates, weights)) / sum(weights)
    assert float((mean.double() - exact).abs().max()) <= 0.5 / scale + 2.0**-24


def test_arguments_are_named() -> None:
    x = torch.ones(4)
    with pytest.raises(ValueError, match=r"clip \* scale \* weight: expected below 2\^31 - 1"):
        ops.to_fixed(x, clip=1.0, scale=2.0**31)
    with pytest.raises(ValueError, match="values: expected finite values"):
        ops.to_fixed(torch.tensor([float("nan")]), clip=1.0, scale=1.0)
    with pytest.raises(ValueError, match="weight: expected a finite number at least 1"):
        ops.to_fixed(x, clip=1.0, scale=1.0, weight=0)
    with pytest.raises(TypeError, match="values: expected dtype float32, got float64"):
        ops.to_fixed(x.double(), clip=1.0, scale=1.0)
    with pytest.raises(ValueError, match="divisor: expected a finite number above 0"):
        ops.from_fixed(torch.ones(4, dtype=torch.int32), 0.0)
