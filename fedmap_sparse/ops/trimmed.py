"""The mean of the middle values of each element over several vectors: trimmed mean and median."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import native
from fedmap_sparse.ops._library import Op, direct
from fedmap_sparse.ops._rules import FLOAT32, Alike, Dense, Trim
from fedmap_sparse.ops.accumulate import finite_mean

#: Elements that the reference orders at once: of 50 vectors 13 MB in all.
_TILE = 1 << 16


def _ranked(bits: Tensor) -> Tensor:
    """The bits of float32 values as integers in the order of the values, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _reference(vectors: list[Tensor], trim: int, out: Tensor) -> Tensor:
    stop = len(vectors) - trim
    # By a tensor: CUDA multiplies by a number's reciprocal.
    kept = torch.tensor(float(stop - trim), dtype=torch.float64, device=out.device)
    flat = [v.view(-1).view(torch.int32) for v in vectors]
    for start in range(0, out.numel(), _TILE):
        rows = torch.stack([_ranked(v[start : start + _TILE]) for v in flat])
        middle = _ranked(rows.sort(0).values[trim:stop]).view(torch.float32)
        total = torch.zeros(middle.shape[1], dtype=torch.float64, device=out.device)
        for row in middle:
            total += row
        out.view(-1)[start : start + _TILE] = total / kept
    return (~torch.isfinite(out)).sum()


_trimmed = Op(
    "trimmed_mean_out(Tensor[] vectors, SymInt trim, Tensor(a!) out) -> ()",
    lambda vectors, trim, out: None,
    reference=finite_mean(_reference, "vectors"),
    cpu=finite_mean(getattr(native, "trimmed_mean", None), "vectors"),
    triton=finite_mean(
        lambda vectors, trim, out: (
            _reference(vectors, trim, out)
            if len(vectors) > _backends.kernels("trimmed").MOST
            else _backends.kernels("trimmed").trimmed_mean_out(vectors, trim, out)
        ),
        "vectors",
    ),
    rules=(
        Alike("vectors", sized=True, dtypes=FLOAT32),
        Trim(),
        Dense(
            "out",
            FLOAT32,
            numel=lambda given: given["vectors"][0].numel(),
            beside="first",
            optional=True,
        ),
    ),
)


def trimmed_mean(
    vectors: Sequence[Tensor],
    trim: int,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The mean of each element over vectors, without its `trim` least and greatest values.

    With `trim = (len(vectors) - 1) // 2` it is the median: the middle value, or the mean of the two
    middle ones. The values that are left are added up in float64 from the least to the greatest,
    starting at +0.0, divided by their number and rounded once: the same bits on every backend and
    at any thread count, whatever the order of the vectors.

    Values are ordered by IEEE 754's totalOrder: -0.0 before 0.0, which no sum tells apart; a NaN
    beyond the infinity of its sign. So up to `trim` values of an element that are NaN or infinite
    do not count.

    Args:
        vectors: at least one; contiguous float32 tensors of one size and device. Not written.
        trim: how many to leave out at each end, `0 <= trim < len(vectors) / 2`.
        out: contiguous float32 tensor of that size, on that device, to fill.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        A new 1-D float32 tensor, or `out`.

    Raises:
        ValueError: no vectors, sizes or devices that differ, `trim` out of range, or a mean that is
            not finite (`out` is then undefined).
        TypeError: another dtype, or a `trim` that is no int.

    Each vector is read once, the result written once; each element takes Batcher's network of its
    values, O(len(vectors) * log(len(vectors))**2) steps, less what the ranks do not need. On a GPU
    more than 64 vectors are sorted by torch, tile by tile.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> vectors = [torch.tensor(v) for v in ([1.0, 5.0], [2.0, -9.0], [float("inf"), 6.0])]
    >>> fs.ops.trimmed_mean(vectors, 1)
    tensor([2., 5.])
    """
    if not vectors:
        raise ValueError("vectors: expected at least one, got none")
    first = vectors[0]
    if direct(first, backend) and type(trim) is int and 0 <= 2 * trim < len(vectors):
        target = first.new_empty(first.numel()) if out is None else out
        # A tuple keeps the vectors alive while the GIL is released.
        if _trimmed.attempt(tuple(vectors), trim, target) is not None:
            return target
    trim = _checks.number(trim)
    _trimmed.check(vectors=vectors, trim=trim, out=out, first=first)
    if out is None:
        out = torch.empty(first.numel(), dtype=first.dtype, device=first.device)
    _trimmed([_checks.plain(v) for v in vectors], trim, out, backend=backend)
    return out
