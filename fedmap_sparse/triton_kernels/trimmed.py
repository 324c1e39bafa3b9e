"""Means of the middle values of each element: a sorting network over registers, a row a vector."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.triton_kernels import _tuning
from fedmap_sparse.triton_kernels._bits import FLOAT32, raw
from fedmap_sparse.triton_kernels._launch import cdiv, launch
from fedmap_sparse.triton_kernels._tables import to_device
from fedmap_sparse.triton_kernels.accumulate import store_mean

#: Vectors, at most: each element's values are held in registers.
MOST = 64
_WARPS = 4


@triton.constexpr_function
def _steps(count, trim):
    """Batcher's odd-even merge sort of `count` rows, less what no rank that is kept depends on."""
    steps = []
    p = 1
    while p < count:
        k = p
        while k >= 1:
            for j in range(k % p, count - k, 2 * k):
                pairs = [(i, i + k) for i in range(j, min(j + k, count - k))]
                steps += [(a, b) for a, b in pairs if a // (2 * p) == b // (2 * p)]
            k //= 2
        p *= 2
    wanted, kept = set(range(trim, count - trim)), []
    for low, high in reversed(steps):
        if low in wanted or high in wanted:
            wanted |= {low, high}
            kept.append((low, high))
    return tuple(reversed(kept))


@triton.jit
def _ranked(bits):
    """The bits of float32 values as integers in the order of the values, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _exchange(rows, LOW: tl.constexpr, HIGH: tl.constexpr):
    low, high = tl.minimum(rows[LOW], rows[HIGH]), tl.maximum(rows[LOW], rows[HIGH])
    return rows[:LOW] + (low,) + rows[LOW + 1 : HIGH] + (high,) + rows[HIGH + 1 :]


@triton.jit
def _trimmed_tile(
    table, out, bad, offsets, inside, COUNT: tl.constexpr, TRIM: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = ()
    for row in tl.static_range(COUNT):
        pointer = tl.load(table + row).to(tl.pointer_type(tl.int32), bitcast=True)
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        loaded = tl.load(pointer + offsets, mask=inside, other=0)
        rows = rows + (_ranked(loaded),)  # type: ignore[assignment]  # a tuple of another length
    STEPS: tl.constexpr = _steps(COUNT, TRIM)
    for step in tl.static_range(len(STEPS)):
        rows = _exchange(rows, STEPS[step][0], STEPS[step][1])
    sums = tl.zeros((BLOCK,), tl.float64)
    for rank in tl.static_range(TRIM, COUNT - TRIM):
        sums += _ranked(rows[rank]).to(tl.float32, bitcast=True).to(tl.float64)
    store_mean(sums, COUNT - 2.0 * TRIM, out, bad, offsets, inside, FLOAT32)


@triton.jit(do_not_specialize=["n"])
def _trimmed_mean(
    table, out, bad, n, COUNT: tl.constexpr, TRIM: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`table` holds the addresses of the vectors."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:  # a mask that is always true does not split wide accesses
        _trimmed_tile(table, out, bad, offsets, offsets >= 0, COUNT, TRIM, ALIGNED, BLOCK)
    else:
        _trimmed_tile(table, out, bad, offsets, offsets < n, COUNT, TRIM, False, BLOCK)


def trimmed_mean_out(vectors: list[Tensor], trim: int, out: Tensor) -> Tensor:
    """The mean of the middle values into `out`; how many of them are not finite, on the device."""
    bad = torch.zeros((), dtype=torch.int64, device=out.device)
    if not out.numel():
        return bad
    table = np.array([v.data_ptr() for v in vectors], np.int64)
    # Four values a thread, by one access of 16 bytes, while the rows leave registers for that.
    warps, each = (_WARPS, 4) if len(vectors) <= 16 else _tuning.TRIMMED_MANY
    wide = each > 1 and not any(t.data_ptr() % 16 for t in (*vectors, out))
    block = 32 * warps * (each if wide else 1)
    launch(
        _trimmed_mean,
        (cdiv(out.numel(), block),),
        to_device(table, out.device),
        raw(out),
        bad,
        out.numel(),
        COUNT=len(vectors),
        TRIM=trim,
        ALIGNED=wide,
        BLOCK=block,
        num_warps=warps,
    )
    return bad
