"""Fewer bits per value: casts between the float dtypes, int8 by blocks with scales."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.triton_kernels._bits import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    KINDS,
    block_of,
    convert,
    raw,
)
from fedmap_sparse.triton_kernels._launch import cdiv, launch, next_power_of_2

# Four elements a thread: 16 bytes of the float32 stream (see block_of).
_WARPS = 8
_TILE = 32 * _WARPS * 4
# Blocks of a program that ends with a sum over its threads.
_PARTS = 8


@triton.jit
def _finite(bits, KIND: tl.constexpr):
    if KIND == FLOAT32:
        finite = (bits & 0x7FFFFFFF) < 0x7F800000
    elif KIND == FLOAT16:
        finite = (bits & 0x7FFF) < 0x7C00
    else:
        finite = (bits & 0x7FFF) < 0x7F80
    return finite


@triton.jit
def _is_infinity(bits, KIND: tl.constexpr):
    if KIND == FLOAT16:
        infinite = (bits & 0x7FFF) == 0x7C00
    elif KIND == BFLOAT16:
        infinite = (bits & 0x7FFF) == 0x7F80
    else:
        infinite = (bits & 0x7FFFFFFF) == 0x7F800000
    return infinite


@triton.jit
def _cast_tile(values, out, offsets, inside, FROM: tl.constexpr, TO: tl.constexpr):
    """Convert; 1 where a finite value became infinite."""
    bits = tl.load(values + offsets, mask=inside, other=0)
    cast = convert(bits, FROM, TO)
    tl.store(out + offsets, cast, mask=inside)
    return (_is_infinity(cast, TO) & _finite(bits, FROM)).to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def _cast(
    values, out, overflowed, n, FROM: tl.constexpr, TO: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (BLOCK * PARTS)
    over = tl.zeros((BLOCK,), tl.int32)
    if start + BLOCK * PARTS <= n:  # a mask that is always true does not split wide accesses
        for part in range(PARTS):
            offsets = start + part * BLOCK + tl.arange(0, BLOCK)
            over += _cast_tile(values, out, offsets, offsets >= 0, FROM, TO)
    else:
        for part in range(PARTS):
            offsets = start + part * BLOCK + tl.arange(0, BLOCK)
            over += _cast_tile(values, out, offsets, offsets < n, FROM, TO)
    count = tl.sum(over, 0)
    tl.atomic_add(overflowed, count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def _count_bad(values, bad, n, KIND: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (BLOCK * PARTS)
    wrong = tl.zeros((BLOCK,), tl.int32)
    if start + BLOCK * PARTS <= n:
        for part in range(PARTS):
            bits = tl.load(values + start + part * BLOCK + tl.arange(0, BLOCK))
            wrong += (_finite(bits, KIND) == 0).to(tl.int32)
    else:
        for part in range(PARTS):
            offsets = start + part * BLOCK + tl.arange(0, BLOCK)
            bits = tl.load(values + offsets, mask=offsets < n, other=0)
            wrong += (_finite(bits, KIND) == 0).to(tl.int32)
    count = tl.sum(wrong, 0)
    tl.atomic_add(bad, count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit
def _quantize_rows(values, q, scales, residual, row, column, inside, block: tl.constexpr, rows):
    at = row[:, None] * block + column[None, :]
    x = tl.load(values + at, mask=inside, other=0.0)
    if residual is not None:
        x = x + tl.load(residual + at, mask=inside, other=0.0)
    scale = tl.div_rn(tl.max(tl.abs(x), 1), 127.0)
    wide = tl.broadcast_to(scale[:, None], x.shape)
    steps = tl.where(wide > 0.0, tl.div_rn(x, tl.where(wide > 0.0, wide, 1.0)), 0.0)
    # Adding 1.5 * 2^23 rounds |steps| <= 254 to an integer, halves to even; a scale that is a
    # subnormal number may be half as large as amax / 127 asks for, hence the limits.
    codes = (steps + 12582912.0) - 12582912.0
    codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
    tl.store(q + at, codes.to(tl.int8), mask=inside)
    tl.store(scales + row, scale, mask=row < rows)
    if residual is not None:
        tl.store(residual + at, x - codes * wide, mask=inside)


@triton.jit(do_not_specialize=["n", "rows"])
def _quantize_int8(
    values, q, scales, residual, n, rows, block: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks a program; WIDTH is `block` rounded up to a power of two."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    if WIDTH == block:
        inside = (row[:, None] >= 0) & (column[None, :] >= 0)
        if (first + ROWS) * block <= n:
            _quantize_rows(values, q, scales, residual, row, column, inside, block, rows)
        else:
            inside = row[:, None] * block + column[None, :] < n
            _quantize_rows(values, q, scales, residual, row, column, inside, block, rows)
    else:
        inside = (row[:, None] * block + column[None, :] < n) & (column[None, :] < block)
        _quantize_rows(values, q, scales, residual, row, column, inside, block, rows)


@triton.jit(do_not_specialize=["n", "rows"])
def _dequantize_int8(
    q, scales, out, n, rows, block: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = row[:, None] * block + column[None, :]
    scale = tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
    if (WIDTH == block) & ((first + ROWS) * block <= n):
        tl.store(out + at, tl.load(q + at).to(tl.float32) * scale)
    else:
        inside = (at < n) & (column[None, :] < block)
        codes = tl.load(q + at, mask=inside, other=0).to(tl.float32)
        tl.store(out + at, codes * scale, mask=inside)


def cast_out(values: Tensor, out: Tensor) -> Tensor:
    """Convert; how many finite values became infinite, on the device."""
    overflowed = torch.zeros((), dtype=torch.int64, device=values.device)
    if values.numel():
        block, warps = block_of(values, out)
        launch(
            _cast,
            (cdiv(values.numel(), block * _PARTS),),
            raw(values),
            raw(out),
            overflowed,
            values.numel(),
            FROM=KINDS[values.dtype],
            TO=KINDS[out.dtype],
            BLOCK=block,
            PARTS=_PARTS,
            num_warps=warps,
        )
    return overflowed


def all_finite(values: Tensor) -> Tensor:
    """Whether no element is NaN or infinite, on the device."""
    bad = torch.zeros((), dtype=torch.int64, device=values.device)
    if values.numel():
        block, warps = block_of(values)
        launch(
            _count_bad,
            (cdiv(values.numel(), block * _PARTS),),
            raw(values),
            bad,
            values.numel(),
            KIND=KINDS[values.dtype],
            BLOCK=block,
            PARTS=_PARTS,
            num_warps=warps,
        )
    return bad == 0


def quantize_int8_out(
    values: Tensor, block: int, q: Tensor, scales: Tensor, residual: Tensor | None
) -> None:
    """Codes and scales, the residual updated in place."""
    if not values.numel():
        return
    width = next_power_of_2(block)
    rows = _TILE // width
    launch(
        _quantize_int8,
        (cdiv(scales.numel(), rows),),
        values,
        q,
        scales,
        residual,
        values.numel(),
        scales.numel(),
        block=block,
        WIDTH=width,
        ROWS=rows,
        num_warps=_WARPS,
    )


def dequantize_int8(q: Tensor, scales: Tensor, block: int) -> Tensor:
    """`float32(q) * scale`."""
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    if q.numel():
        width = next_power_of_2(block)
        rows = _TILE // width
        launch(
            _dequantize_int8,
            (cdiv(scales.numel(), rows),),
            q,
            scales,
            out,
            q.numel(),
            scales.numel(),
            block=block,
            WIDTH=width,
            ROWS=rows,
            num_warps=_WARPS,
        )
    return out
