"""Fixed-point integers for sums modulo 2^32."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.triton_kernels._launch import cdiv, launch

_TILE = 1024
_WARPS = 8


@triton.jit
def _to_tile(values, out, offsets, inside, clip, scale, weight):
    """1 where a value was beyond the clip."""
    x = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float64)
    y = tl.where(x < -clip, -clip, x)
    y = tl.where(y > clip, clip, y)
    # Adding 1.5 * 2^52 rounds to an integer, halves to even.
    steps = (y * scale + 6755399441055744.0) - 6755399441055744.0
    tl.store(out + offsets, steps.to(tl.int32) * weight, mask=inside)
    return (y != x).to(tl.int32)


@triton.jit(do_not_specialize=["clip", "scale", "weight", "n"])
def _to_fixed(values, out, beyond, clip: tl.int64, scale: tl.int64, weight, n, TILE: tl.constexpr):
    """`clip` and `scale` are float64 as bits: float arguments would arrive as float32."""
    start = tl.program_id(0).to(tl.int64) * TILE
    offsets = start + tl.arange(0, TILE)
    most = clip.to(tl.int64).to(tl.float64, bitcast=True)
    by = scale.to(tl.int64).to(tl.float64, bitcast=True)
    if start + TILE <= n:  # a mask that is always true does not split wide accesses
        cut = _to_tile(values, out, offsets, offsets >= 0, most, by, weight)
    else:
        cut = _to_tile(values, out, offsets, offsets < n, most, by, weight)
    count = tl.sum(cut, 0)
    tl.atomic_add(beyond, count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit
def _from_tile(sums, out, offsets, inside, divisor):
    x = tl.load(sums + offsets, mask=inside, other=0).to(tl.float64)
    tl.store(out + offsets, (x / divisor).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["divisor", "n"])
def _from_fixed(sums, out, divisor: tl.int64, n, TILE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    offsets = start + tl.arange(0, TILE)
    by = divisor.to(tl.int64).to(tl.float64, bitcast=True)
    if start + TILE <= n:
        _from_tile(sums, out, offsets, offsets >= 0, by)
    else:
        _from_tile(sums, out, offsets, offsets < n, by)


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


def to_fixed_out(values: Tensor, clip: float, scale: float, weight: int, out: Tensor) -> Tensor:
    """Convert; how many values were beyond the clip, on the device."""
    beyond = torch.zeros((), dtype=torch.int64, device=values.device)
    n = values.numel()
    if n:
        launch(
            _to_fixed,
            (cdiv(n, _TILE),),
            values,
            out,
            beyond,
            _bits(clip),
            _bits(scale),
            weight,
            n,
            TILE=_TILE,
            num_warps=_WARPS,
        )
    return beyond


def from_fixed(sums: Tensor, divisor: float) -> Tensor:
    """`float32(sum / divisor)`."""
    out = torch.empty(sums.shape, dtype=torch.float32, device=sums.device)
    n = sums.numel()
    if n:
        grid = (cdiv(n, _TILE),)
        launch(_from_fixed, grid, sums, out, _bits(divisor), n, TILE=_TILE, num_warps=_WARPS)
    return out
