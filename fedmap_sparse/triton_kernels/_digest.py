"""The digest of a mask: a sum over its 64-bit words, in any order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.triton_kernels._bits import load_words
from fedmap_sparse.triton_kernels._launch import cdiv, launch

_K0, _K1, _K2 = (
    tl.constexpr(0x9E3779B97F4A7C15),
    tl.constexpr(0xBF58476D1CE4E5B9),
    tl.constexpr(0x94D049BB133111EB),
)


@triton.jit(do_not_specialize=["num_words"], do_not_specialize_on_alignment=["words"])
def _mix(words, sums, num_words, PAIRS: tl.constexpr, PARTS: tl.constexpr):
    """splitmix64's middle state and output of each word with its place, added up."""
    middle = tl.zeros((PAIRS,), tl.uint64)
    final = tl.zeros((PAIRS,), tl.uint64)
    pairs = (num_words + 1) // 2
    for part in range(PARTS):
        at = (tl.program_id(0).to(tl.int64) * PARTS + part) * PAIRS + tl.arange(0, PAIRS)
        low = load_words(words, 2 * at, num_words).to(tl.uint64)
        high = load_words(words, 2 * at + 1, num_words).to(tl.uint64)
        t = (low | (high << 32)) + (at + 1).to(tl.uint64) * _K0
        t = (t ^ (t >> 30)) * _K1
        t = t ^ (t >> 27)
        u = t * _K2
        u = u ^ (u >> 31)
        middle += tl.where(at < pairs, t, 0)
        final += tl.where(at < pairs, u, 0)
    tl.atomic_add(sums, tl.sum(middle, 0).to(tl.int64, bitcast=True), sem="relaxed")
    tl.atomic_add(sums + 1, tl.sum(final, 0).to(tl.int64, bitcast=True), sem="relaxed")


def digest_sums(words: Tensor) -> Tensor:
    """Both sums, int64[2] on the words' device, which is not waited for: one launch and a fill."""
    sums = torch.zeros(2, dtype=torch.int64, device=words.device)
    if words.numel():
        grid = (cdiv(words.numel(), 2 * 256 * 4),)
        launch(_mix, grid, words, sums, words.numel(), PAIRS=256, PARTS=4)
    return sums
