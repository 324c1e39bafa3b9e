"""squared_distances: float32 differences, float64 sums in one order, on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmap_sparse import ops

#: Around every lane, block of 2,048 and part of 65,536.
SIZES = [0, 1, 31, 32, 33, 63, 65, 2047, 2048, 2049, 4127, 65_535, 65_537, 140_003]


def vectors(count: int, n: int) -> list[Tensor]:
    rooms = [
        torch.randn(n + 1) * torch.randint(-12, 6, (n + 1,)).float().exp2() for _ in range(count)
    ]
    return [room[1:] for room in rooms]


def raw(t: Tensor) -> Tensor:
    return t.view(torch.int64)


@pytest.mark.parametrize("n", SIZES)
def test_kernel_is_reference(isa: str, n: int) -> None:
    given = vectors(4, n)
    for others in ([], given[:1], given[1:3]):
        want = ops.squared_distances(given, others, backend="reference")
        assert torch.equal(raw(ops.squared_distances(given, others, backend="cpu")), raw(want))


def test_it_is_the_stated_order() -> None:
    """Written out for one pair, element by element."""
    n = 3 * 65_536 + 2048 + 77
    a, b = vectors(2, n)
    squares = np.square((a - b).numpy().astype(np.float64))
    total = 0.0
    for part in range(0, n, 65_536):
        of_part = 0.0
        for block in range(part, min(n, part + 65_536), 2048):
            lanes = [0.0] * 32
            for i, square in enumerate(squares[block : min(block + 2048, n)].tolist()):
                lanes[i % 32] += square
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = [lanes[k] + lanes[k + half] for k in range(half)]
            of_part += lanes[0]
        total += of_part
    for backend in ("cpu", "reference"):
        assert ops.squared_distances([a], [b], backend=backend).item() == total
    assert total == pytest.approx(float(((a.double() - b.double()) ** 2).sum()), rel=1e-6)


@pytest.mark.parametrize("count", [1, 33, 70])
def test_pairs_by_tiles(isa: str, count: int) -> None:
    given = vectors(count, 100)
    found = ops.squared_distances(given)
    assert torch.equal(found, found.T)
    assert not found.diagonal().any()
    for i in {0, count // 2, count - 1}:
        row = ops.squared_distances(given, [given[i]]).flatten()
        assert torch.equal(row, found[i])
    wide = ops.squared_distances(given[:3], given)
    assert torch.equal(wide, found[:3])


def test_bits_do_not_depend_on_threads(isa: str, threads: int) -> None:
    given = vectors(5, 300_001 if isa != "scalar" else 150_001)
    before = torch.get_num_threads()
    found = ops.squared_distances(given), ops.squared_distances(given, given[:1])
    torch.set_num_threads(1)
    alone = ops.squared_distances(given), ops.squared_distances(given, given[:1])
    torch.set_num_threads(before)
    assert all(torch.equal(raw(f), raw(a)) for f, a in zip(found, alone, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_not_finite_shows(backend: str) -> None:
    big, nan = torch.full((50,), 3e38), torch.zeros(50)
    nan[40] = math.nan
    found = ops.squared_distances([big, -big, nan, torch.zeros(50)], backend=backend)
    assert found[0, 1] == math.inf  # the difference overflows in float32
    assert found[0, 3] == pytest.approx(50 * 9e76)
    assert found[2, :2].isnan().all()
    assert found[3, 3] == 0


def test_subnormal_differences_count(isa: str) -> None:
    a, b = torch.full((40,), 3e-45), torch.full((40,), 1e-45)
    assert ops.squared_distances([a], [b]).item() == 40 * float(a[0] - b[0]) ** 2 > 0


def test_arguments_are_checked() -> None:
    a, b = torch.ones(4), torch.ones(5)
    with pytest.raises(ValueError, match="vectors: expected at least one"):
        ops.squared_distances([])
    with pytest.raises(ValueError, match="others: expected 4 elements"):
        ops.squared_distances([a], [b])
    with pytest.raises(TypeError, match="others: expected dtype float32, got float64"):
        ops.squared_distances([a], [a.double()])
