"""The rank index of a mask, computed on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.mask import num_ranks
from fedmap_sparse.triton_kernels._bits import load_words, popcount

_ROWS = 32
_CHUNK = 4096


@triton.jit(do_not_specialize_on_alignment=["words"])
def _count_blocks(words, rank, num_words, num_blocks, ROWS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    counts = tl.sum(popcount(load_words(words, at, num_words)), 1)
    tl.store(rank + 1 + block, counts.to(tl.int64), mask=block < num_blocks)


@triton.jit
def _add_up(rank, num_blocks, CHUNK: tl.constexpr):
    """One program: the counts in rank[1:] become their running sums, rank[0] zero."""
    carry = tl.zeros((), tl.int64)
    tl.store(rank, carry)
    for start in range(0, num_blocks, CHUNK):
        at = start + tl.arange(0, CHUNK)
        inside = at < num_blocks
        counts = tl.load(rank + 1 + at, mask=inside, other=0)
        tl.store(rank + 1 + at, carry + tl.cumsum(counts, 0), mask=inside)
        carry += tl.sum(counts, 0)


def rank_index(words: Tensor, numel: int) -> Tensor:
    """`fedmap_sparse.mask.rank_index` on the words' device: two launches, no synchronisation."""
    blocks = num_ranks(numel) - 1
    rank = torch.empty(blocks + 1, dtype=torch.int64, device=words.device)
    if blocks:
        grid = (triton.cdiv(blocks, _ROWS),)
        _count_blocks[grid](words, rank, words.numel(), blocks, ROWS=_ROWS)
    _add_up[(1,)](rank, blocks, CHUNK=_CHUNK, num_warps=16)
    return rank
