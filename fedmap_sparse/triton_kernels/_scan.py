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


def spread(blocks: int) -> tuple[int, int, int]:
    """Programs of a scan over so many blocks, the blocks of each, and how many it takes at once."""
    span = cdiv(max(blocks, 1), _PROGRAMS * _CHUNK) * _CHUNK
    return max(1, cdiv(blocks, span)), span, _CHUNK


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
    carry = sum_before(counts, begin, CHUNK)
    if tl.program_id(0) == 0:
        tl.store(rank, carry)
    for start in range(begin, end, CHUNK):
        at = start + tl.arange(0, CHUNK)
        inside = at < end
        here = tl.load(counts + at, mask=inside, other=0).to(tl.int64)
        tl.store(rank + 1 + at, carry + tl.cumsum(here, 0), mask=inside)
        carry += tl.sum(here, 0)


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
