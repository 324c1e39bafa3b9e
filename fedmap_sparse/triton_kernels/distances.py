"""Squared distances: a program adds up blocks of some pairs, others the blocks of each pair."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.triton_kernels._launch import cdiv, launch
from fedmap_sparse.triton_kernels._tables import to_device

#: As in ops/distances.py, which says in what order the sums are.
LANES = tl.constexpr(32)
BLOCK = tl.constexpr(2048)
BLOCKS = tl.constexpr(32)
_PART = 2048 * 32
#: Vectors and others of a program: 16 pairs of 8 rows ask for a fourth of what single pairs would.
_ROWS = 4
#: Blocks of a program: with a whole part of 32, an SM had nine warps or six, and waited for memory.
_EACH = 4
#: Parts whose sums are loaded together: one by one, each load waits for the one before.
AHEAD = tl.constexpr(32)


@triton.jit
def _load_rows(addresses, offsets, inside):
    pointers = addresses.to(tl.pointer_type(tl.float32), bitcast=True)
    return tl.load(pointers[:, None] + offsets[None, :], mask=inside[None, :], other=0.0)


@triton.jit
def _halve(sums, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Lane l plus lane l + HALF."""
    pairs = tl.permute(tl.reshape(sums, (ROWS, WIDTH, 2, HALF)), (0, 1, 3, 2))
    low, high = tl.split(pairs)
    return low + high


@triton.jit
def _fold(sums, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The 32 lanes to one."""
    sums = _halve(sums, ROWS, WIDTH, 16)
    sums = _halve(sums, ROWS, WIDTH, 8)
    sums = _halve(sums, ROWS, WIDTH, 4)
    sums = _halve(sums, ROWS, WIDTH, 2)
    return tl.reshape(_halve(sums, ROWS, WIDTH, 1), (ROWS, WIDTH))


@triton.jit(do_not_specialize=["rows", "width", "n"])
def _block_distances(
    table, sums, rows, width, n, AMONG: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """`table` holds the addresses of the vectors, then of the others; `sums` [blocks, rows, width].

    The pairs of a block are neighbours in the grid, as they read the same memory.
    """
    across = tl.cdiv(width, WIDTH)
    tiles = tl.cdiv(rows, ROWS) * across
    tile = tl.program_id(0) % tiles
    first, other = tile // across * ROWS, tile % across * WIDTH
    if AMONG:
        if other > first:
            return
    row, column = first + tl.arange(0, ROWS), other + tl.arange(0, WIDTH)
    a_at = tl.load(table + tl.minimum(row, rows - 1))
    b_at = tl.load(table + rows + tl.minimum(column, width - 1))
    begin = (tl.program_id(0) // tiles).to(tl.int64) * EACH
    for k in range(tl.minimum(tl.cdiv(n - begin * BLOCK, BLOCK), EACH).to(tl.int32)):
        block = begin + k
        lanes = tl.zeros((ROWS, WIDTH, LANES), tl.float64)
        for i in range(0, BLOCK, STEPS * LANES):
            for step in tl.static_range(STEPS):
                offsets = block * BLOCK + i + step * LANES + tl.arange(0, LANES)
                a = _load_rows(a_at, offsets, offsets < n)
                b = _load_rows(b_at, offsets, offsets < n)
                x = (a[:, None, :] - b[None, :, :]).to(tl.float64)
                lanes += x * x
        at = (block * rows + row[:, None]) * width + column[None, :]
        inside = (row < rows)[:, None] & (column < width)[None, :]
        tl.store(sums + at, _fold(lanes, ROWS, WIDTH), mask=inside)


@triton.jit(do_not_specialize=["pairs", "width", "blocks"])
def _add_blocks(sums, out, pairs, width, blocks, AMONG: tl.constexpr, COUNT: tl.constexpr):
    """Of one part: all of its blocks are loaded at once."""
    pair = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inside = pair < pairs
    if AMONG:
        inside = inside & (pair % width < pair // width)
    part = tl.program_id(1).to(tl.int64)
    total = tl.zeros((COUNT,), tl.float64)
    for k in tl.static_range(BLOCKS):
        block = part * BLOCKS + k
        total += tl.load(sums + block * pairs + pair, mask=inside & (block < blocks), other=0.0)
    tl.store(out + part * pairs + pair, total, mask=inside)


@triton.jit(do_not_specialize=["pairs", "width", "parts"])
def _add_parts(sums, out, pairs, width, parts, AMONG: tl.constexpr, LANES: tl.constexpr):
    pair = tl.program_id(0) * LANES + tl.arange(0, LANES)
    row, column = pair // width, pair % width
    inside = pair < pairs
    if AMONG:
        inside = inside & (column < row)
    total = tl.zeros((LANES,), tl.float64)
    for part in range(0, parts, AHEAD):
        for k in tl.static_range(AHEAD):
            at = pairs.to(tl.int64) * (part + k) + pair
            total += tl.load(sums + at, mask=inside & (part + k < parts), other=0.0)
    tl.store(out + pair, total, mask=inside)
    if AMONG:
        tl.store(out + column * width + row, total, mask=inside)


def squared_distances(vectors: list[Tensor], others: list[Tensor]) -> Tensor:
    """Float64 [len(vectors), len(others)]; no others: among the vectors."""
    rows, width, device = len(vectors), len(others or vectors), vectors[0].device
    n, pairs, among = vectors[0].numel(), rows * width, not others
    out = torch.zeros(rows, width, dtype=torch.float64, device=device)
    if not n:
        return out
    parts, blocks = cdiv(n, _PART), cdiv(n, BLOCK.value)
    each, sums = torch.empty((blocks + parts) * pairs, dtype=torch.float64, device=device).split(
        (blocks * pairs, parts * pairs)
    )
    table = np.array([t.data_ptr() for t in (*vectors, *(others or vectors))], np.int64)
    tile = 1 if width == 1 else _ROWS
    launch(
        _block_distances,
        (cdiv(rows, _ROWS) * cdiv(width, tile) * cdiv(blocks, _EACH),),
        to_device(table, device),
        each,
        rows,
        width,
        n,
        AMONG=among,
        ROWS=_ROWS,
        WIDTH=tile,
        STEPS=4,
        EACH=_EACH,
        num_warps=1,
    )
    launch(
        _add_blocks,
        (cdiv(pairs, 32), parts),
        each,
        sums,
        pairs,
        width,
        blocks,
        AMONG=among,
        COUNT=32,
        num_warps=1,
    )
    launch(
        _add_parts,
        (cdiv(pairs, 32),),
        sums,
        out,
        pairs,
        width,
        parts,
        AMONG=among,
        LANES=32,
        num_warps=1,
    )
    return out
