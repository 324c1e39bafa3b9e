"""Squared distances between vectors, for rules that look at whole updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import native
from fedmap_sparse.ops._library import Op, direct
from fedmap_sparse.ops._rules import FLOAT32, Alike

#: Lanes of a block, elements of a block, blocks of a part. C++ and Triton have the same.
LANES, BLOCK, BLOCKS = 32, 2048, 32


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Of one pair, in the order of sums that the docstring of `squared_distances` states."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for start in range(0, a.numel(), BLOCKS * BLOCK):
        part = slice(start, start + BLOCKS * BLOCK)
        squares = (a[part] - b[part]).to(torch.float64).square()
        missing = -squares.numel() % BLOCK
        rows = torch.nn.functional.pad(squares, (0, missing)).view(-1, BLOCK // LANES, LANES)
        lanes = torch.zeros(len(rows), LANES, dtype=torch.float64, device=a.device)
        for i in range(BLOCK // LANES):
            lanes += rows[:, i]
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        of_part = torch.zeros_like(total)
        for block in lanes[:, 0]:
            of_part += block
        total += of_part
    return total


def _reference(vectors: list[Tensor], others: list[Tensor]) -> Tensor:
    found = vectors[0].new_zeros((len(vectors), len(others or vectors)), dtype=torch.float64)
    for i, a in enumerate(vectors):
        for j, b in enumerate(others or vectors[:i]):
            found[i, j] = _distance(a.view(-1), b.view(-1))
    return found if others else found + found.T


def _cpu(
    vectors: Sequence[Tensor], others: Sequence[Tensor], threads: int, attempt: bool
) -> Tensor | None:
    shape = len(vectors), len(others or vectors)
    found = torch.empty(shape, dtype=torch.float64, device="cpu")
    done = native.squared_distances(vectors, others, found, threads, attempt)
    return None if done is None else found


_distances = Op(
    "squared_distances(Tensor[] vectors, Tensor[] others) -> Tensor",
    lambda vectors, others: vectors[0].new_empty(
        (len(vectors), len(others or vectors)), dtype=torch.float64
    ),
    reference=_reference,
    cpu=_cpu,
    triton=lambda *a: _backends.kernels("distances").squared_distances(*a),
    rules=(
        Alike("vectors", sized=True, dtypes=FLOAT32),
        Alike("others", sized=True, dtypes=FLOAT32, beside="vectors"),
    ),
)


def squared_distances(
    vectors: Sequence[Tensor],
    others: Sequence[Tensor] = (),
    *,
    backend: str | None = None,
) -> Tensor:
    """Squared Euclidean distances of vectors to others, or among themselves.

    A difference is float32, rounded; its square is float64, and exact. The sums are float64 in one
    order, so that the bits are the same on every backend and at any thread count: element i goes
    to lane `i % 32` of its block of 2,048; a lane adds up by increasing index, from +0.0; lanes are
    folded by halves (lane l and lane l + 16, then l + 8 and so on); blocks are added up in order
    within a part of 65,536 elements, and parts in order.

    Args:
        vectors: at least one; contiguous float32 tensors of one size and device.
        others: as many as you like, of that size, on that device; none: `vectors` themselves.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        A float64 tensor [len(vectors), len(others)]. Among themselves it is symmetric and its
        diagonal is 0. What is not finite, or overflows in float32, makes its distances infinite or
        NaN.

    Raises:
        ValueError: no vectors, or sizes or devices that differ.
        TypeError: another dtype.

    O(len(vectors) * len(others) * n), half of it among themselves. Each vector is read from memory
    once, by tiles that stay in cache while all pairs are added up.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> a, b = torch.tensor([0.0, 3.0]), torch.tensor([4.0, 0.0])
    >>> fs.ops.squared_distances([a, b])
    tensor([[ 0., 25.],
            [25.,  0.]], dtype=torch.float64)
    >>> fs.ops.squared_distances([a, b], [torch.zeros(2)]).sqrt().flatten()
    tensor([3., 4.], dtype=torch.float64)
    """
    if not vectors:
        raise ValueError("vectors: expected at least one, got none")
    if direct(vectors[0], backend):
        found = _distances.attempt(tuple(vectors), tuple(others))
        if found is not None:
            return found  # type: ignore[no-any-return]  # of C++
    _distances.check(vectors=vectors, others=others)
    plain = [[_checks.plain(v) for v in each] for each in (vectors, others)]
    result: Tensor = _distances(*plain, backend=backend)
    return result
