"""Running sums over the blocks of a mask, computed on the device by a few programs at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.mask import num_ranks
from fedmap_sparse.triton_kernels._bits import load_words, popcount
from fedmap_sparse.triton_kernels._launch import cdiv, launch

_ROWS = 32
_CHUNK = 1024
# Chunks that one step of a sum loads at a time: one by one, each waited for the one before.
_AT_ONCE = tl.constexpr(8)
_IN_FLIGHT = tl.constexpr(16)
#: Programs of a scan, at most: each adds up what lies before its span by itself.
_PROGRAMS = 64


@triton.jit
def sum_before(counts, end, CHUNK: tl.constexpr):
    """Of counts[:end]."""
    total = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, end, CHUNK * _AT_ONCE):
        chunk = start + tl.arange(0, _AT_ONCE) * CHUNK
        at = chunk[:, None] + tl.arange(0, CHUNK)[None, :]
        total += tl.sum(tl.load(counts + at, mask=at < end, other=0).to(tl.int64), 0)
    return tl.sum(total, 0)


@triton.jit
def sum_of_chunks(counts, end, CHUNK: tl.constexpr):
    """Of counts[:end], a multiple of CHUNK: no mask splits its loads, and many are on their way.

    A lane's sum has 32 bits: less than the elements of the mask by a factor of CHUNK.
    """
    lane = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, end, CHUNK * _IN_FLIGHT):
        for i in tl.static_range(_IN_FLIGHT):
            chunk = start + i * CHUNK
            total += tl.load(counts + chunk + lane, mask=(chunk < end) & (lane >= 0), other=0)
    return tl.sum(total.to(tl.int64), 0)


def spread(blocks: int, chunk: int | None = None) -> tuple[int, int, int]:
    """Programs of a scan over so many blocks, the blocks of each, and how many it takes at once."""
    chunk = chunk or _CHUNK
    span = cdiv(max(blocks, 1), _PROGRAMS * chunk) * chunk
    return max(1, cdiv(blocks, span)), span, chunk


@triton.jit(do_not_specialize=["num_words", "num_blocks"], do_not_specialize_on_alignment=["words"])
def _count_blocks(words, counts, num_words, num_blocks, ROWS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    total = tl.sum(popcount(load_words(words, at, num_words)), 1)
    tl.store(counts + block, total, mask=block < num_blocks)


@triton.jit(do_not_specialize=["num_blocks", "span"])
def _add_up(counts, rank, num_blocks, span, CHUNK: tl.constexpr):
    """The running sums of `span` blocks a program, behind a zero."""
    begin = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(begin + span, num_blocks)
    lane = tl.arange(0, CHUNK)
    here = tl.load(counts + begin + lane, mask=begin + lane < end, other=0)
    carry = sum_of_chunks(counts, begin, CHUNK)
    if begin == 0:
        tl.store(rank, carry)
    for start in range(begin, end, CHUNK):
        at = start + lane
        tl.store(rank + 1 + at, carry + tl.cumsum(here, 0).to(tl.int64), mask=at < end)
        if start + CHUNK < end:
            carry += tl.sum(here, 0)
            here = tl.load(counts + CHUNK + at, mask=CHUNK + at < end, other=0)


def add_up(counts: Tensor) -> Tensor:
    """The rank index over blocks with so many survivors each."""
    blocks = counts.numel()
    rank = torch.empty(blocks + 1, dtype=torch.int64, device=counts.device)
    programs, span, chunk = spread(blocks)
    launch(_add_up, (programs,), counts, rank, blocks, span, CHUNK=chunk, num_warps=8)
    return rank


def rank_index(words: Tensor, numel: int) -> Tensor:
    """`fedmap_sparse.mask.rank_index` on the words' device: two launches, no synchronisation."""
    blocks = num_ranks(numel) - 1
    counts = torch.empty(blocks, dtype=torch.int32, device=words.device)
    if blocks:
        grid = (cdiv(blocks, _ROWS),)
        launch(_count_blocks, grid, words, counts, words.numel(), blocks, ROWS=_ROWS)
    return add_up(counts)
