"""Cut the difference of two vectors to a norm: squares by blocks, their sum, then the cut."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.ops.clip import BLOCK, LANES
from fedmap_sparse.triton_kernels._launch import cdiv, launch

_LANES = tl.constexpr(LANES)
_HALVINGS = tl.constexpr(LANES.bit_length() - 1)
# Elements of a program of the cut.
_TILE = 2048


@triton.jit
def _sum_of_halves(lanes):
    """A sum over two numbers has one order, so these have too."""
    for i in tl.static_range(_HALVINGS):
        lanes = tl.sum(tl.reshape(lanes, (2, _LANES >> (i + 1))), 0)
    return tl.sum(lanes, 0)


@triton.jit
def _square(values, start, offsets, inside):
    x = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float64)
    x = x - tl.load(start + offsets, mask=inside, other=0.0).to(tl.float64)
    return x * x


@triton.jit(do_not_specialize=["n"])
def _squares(values, start, sums, n, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, _LANES)
    lanes = tl.zeros((_LANES,), tl.float64)
    if (block + 1) * BLOCK <= n:  # a mask that is always true does not split wide accesses
        for row in range(BLOCK // _LANES):
            lanes += _square(values, start, offsets + row * _LANES, offsets >= 0)
    else:
        for row in range(BLOCK // _LANES):
            at = offsets + row * _LANES
            lanes += _square(values, start, at, at < n)
    tl.store(sums + block, _sum_of_halves(lanes))


@triton.jit(do_not_specialize=["blocks"])
def _sum(sums, total, blocks):
    """One program: the blocks' sums, LANES at a time."""
    lanes = tl.zeros((_LANES,), tl.float64)
    for first in range(0, blocks, _LANES):
        at = first + tl.arange(0, _LANES)
        lanes += tl.load(sums + at, mask=at < blocks, other=0.0)
    tl.store(total, _sum_of_halves(lanes))


@triton.jit
def _shorten_tile(values, start, factor, offsets, inside):
    at = tl.load(start + offsets, mask=inside, other=0.0).to(tl.float64)
    x = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float64)
    tl.store(values + offsets, (at + (x - at) * factor).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _shorten(values, start, factor, n, TILE: tl.constexpr):
    """Where the factor is no number below 1 nothing is to be done."""
    by = tl.load(factor)
    if by < 1.0:
        first = tl.program_id(0).to(tl.int64) * TILE
        offsets = first + tl.arange(0, TILE)
        if first + TILE <= n:
            _shorten_tile(values, start, by, offsets, offsets >= 0)
        else:
            _shorten_tile(values, start, by, offsets, offsets < n)


def clip_difference_(values: Tensor, start: Tensor, max_norm: float) -> Tensor:
    """Cut in place; the norm before, on the device. Nothing waits for it."""
    n = values.numel()
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    if not n:
        return total
    blocks = cdiv(n, BLOCK)
    sums = torch.empty(blocks, dtype=torch.float64, device=values.device)
    launch(_squares, (blocks,), values, start, sums, n, BLOCK=BLOCK, num_warps=2)
    launch(_sum, (1,), sums, total, blocks, num_warps=2)
    norm = total.sqrt()
    # An infinite norm makes a factor of 0; NaN is not below 1 either.
    factor = torch.where(norm.isfinite(), torch.full_like(norm, max_norm) / norm, 1.0)
    launch(_shorten, (cdiv(n, _TILE),), values, start, factor, n, TILE=_TILE, num_warps=8)
    return norm
