"""Masks of masks, a word at a time: bits extracted under the parent's word, or deposited."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.mask import num_words
from fedmap_sparse.triton_kernels import _tuning
from fedmap_sparse.triton_kernels._bits import exclusive, load_words, popcount
from fedmap_sparse.triton_kernels._launch import cdiv, launch
from fedmap_sparse.triton_kernels._scan import add_up, rank_index


@triton.jit
def _odd_below(x):
    """Bit i is set where an odd number of bits up to i are."""
    x = x ^ (x << 1)
    x = x ^ (x << 2)
    x = x ^ (x << 4)
    x = x ^ (x << 8)
    return x ^ (x << 16)


@triton.jit
def _moves(mask):
    """Which bits of `mask` move right by 1, 2, 4, 8 and 16 to stand side by side.

    The parallel suffix of Warren, Hacker's Delight (2nd edition), section 7-4.
    """
    zeros = (mask ^ 0xFFFFFFFF) << 1  # ~ of unsigned fails in Triton's interpreter
    odd = _odd_below(zeros)
    m0 = odd & mask
    mask = (mask ^ m0) | (m0 >> 1)
    zeros = zeros & (odd ^ 0xFFFFFFFF)
    odd = _odd_below(zeros)
    m1 = odd & mask
    mask = (mask ^ m1) | (m1 >> 2)
    zeros = zeros & (odd ^ 0xFFFFFFFF)
    odd = _odd_below(zeros)
    m2 = odd & mask
    mask = (mask ^ m2) | (m2 >> 4)
    zeros = zeros & (odd ^ 0xFFFFFFFF)
    odd = _odd_below(zeros)
    m3 = odd & mask
    mask = (mask ^ m3) | (m3 >> 8)
    zeros = zeros & (odd ^ 0xFFFFFFFF)
    m4 = _odd_below(zeros) & mask
    return m0, m1, m2, m3, m4


@triton.jit
def _right(x, moved, by: tl.constexpr):
    part = x & moved
    return (x ^ part) | (part >> by)


@triton.jit
def _left(x, moved, by: tl.constexpr):
    return x ^ ((x ^ (x << by)) & moved)


@triton.jit
def pext(x, mask):
    """The bits of uint32 `x` under `mask`, side by side from bit 0 (pext)."""
    m0, m1, m2, m3, m4 = _moves(mask)
    x = _right(_right(_right(x & mask, m0, 1), m1, 2), m2, 4)
    return _right(_right(x, m3, 8), m4, 16)


@triton.jit
def pdep(x, mask):
    """The low bits of uint32 `x` at the set bits of `mask` (pdep)."""
    m0, m1, m2, m3, m4 = _moves(mask)
    x = _left(_left(_left(x, m4, 16), m3, 8), m2, 4)
    return _left(_left(x, m1, 2), m0, 1) & mask


@triton.jit
def _last_at(before, wanted, WORDS: tl.constexpr, STEPS: tl.constexpr):
    """The last of WORDS = 2**STEPS words with `before` <= `wanted`, for each lane's `wanted`."""
    word = tl.zeros_like(wanted)
    for i in tl.static_range(STEPS):
        half = WORDS >> (i + 1)
        word = tl.where(tl.gather(before, word + half, 0) <= wanted, word + half, word)
    return word


@triton.jit
def _following(child, parent, word, reached, wanted, in_words):
    """Bits `reached` to `wanted` of a word of the result, from the parent's words from `word` on.

    31 survivors at most: 32 words of the parent hold them unless it is sparse there.
    """
    tail = tl.zeros((), tl.uint32)
    while (reached < wanted) & (word < in_words):
        at = word + tl.arange(0, 32)
        w = load_words(parent, at, in_words)
        bits = pext(load_words(child, at, in_words), w)
        counts = popcount(w)
        place = reached + exclusive(counts)
        mine = tl.where(place < 32, bits << (place & 31).to(tl.uint32), 0)
        tail = tail | tl.sum(mine, 0)  # no bit twice
        reached += tl.sum(counts, 0)
        word += 32
    return tail


@triton.jit(
    do_not_specialize=["num_blocks", "in_words", "nnz"],
    do_not_specialize_on_alignment=["child", "parent", "out"],
)
def _extract(
    child,
    parent,
    rank,
    out,
    num_blocks,
    in_words,
    nnz,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A program takes WORDS words of the parent and writes the words of the result that begin
    among their survivors. Each word has one owner: nothing need be zero before, nor atomic."""
    tile = tl.program_id(0).to(tl.int64)
    base = tl.load(rank + tile * (WORDS // 64))
    end = tl.load(rank + tl.minimum((tile + 1) * (WORDS // 64), num_blocks))
    first, past = (base + 31) // 32, (end + 31) // 32
    if first < past:
        at = tile * WORDS + tl.arange(0, WORDS)
        w = load_words(parent, at, in_words)
        bits = pext(load_words(child, at, in_words), w)
        before = exclusive(popcount(w))
        # Where a word's bits go, counted from bit 0 of the first word that is written.
        start = (base - first * 32).to(tl.int32)
        shift = ((start + before) & 31).to(tl.uint32)
        high = tl.where(shift > 0, bits >> ((32 - shift) & 31), 0)
        # No two words share a bit of the result, so an OR is a difference of sums.
        low = tl.cumsum((bits << shift).to(tl.int64), 0)
        last = past - 1
        reached = (end - last * 32).to(tl.int32)
        wanted = tl.minimum(nnz - last * 32, 32).to(tl.int32)
        tail = _following(child, parent, (tile + 1) * WORDS, reached, wanted, in_words)
        for begin in range(0, (past - first).to(tl.int32), 32):
            lane = begin + tl.arange(0, 32)
            # The last word that begins before this word of the result ends, and before it begins.
            through = lane * 32 + 31 - start
            mine = _last_at(before, through, WORDS, STEPS)
            earlier = _last_at(before, tl.maximum(through - 32, 0), WORDS, STEPS)
            some = through >= 32
            sums = tl.gather(low, mine, 0) - tl.where(some, tl.gather(low, earlier, 0), 0)
            carried = tl.where(some, tl.gather(high, earlier, 0), 0)
            result = (sums & 0xFFFFFFFF).to(tl.uint32) | carried
            offset = first + lane
            result = result | tl.where(offset == last, tail, 0)
            tl.store(out + offset, result.to(tl.int32, bitcast=True), mask=offset < past)


@triton.jit(
    do_not_specialize=["blocks", "num_words"],
    do_not_specialize_on_alignment=["kept", "parent", "out", "each"],
)
def _deposit(
    kept, parent, rank, out, each, blocks, num_words, WORDS: tl.constexpr, WINDOW: tl.constexpr
):
    """The bits of `kept` that a tile needs lie side by side: they are read once, whole sectors at a
    time and without waiting for the parent's words, then gathered."""
    tile = tl.program_id(0).to(tl.int64)
    first = tl.load(rank + tile * (WORDS // 64))
    end = tl.load(rank + tl.minimum((tile + 1) * (WORDS // 64), blocks))
    start = first // 256 * 8
    window = start + tl.arange(0, WINDOW)
    own = load_words(kept, window, tl.where(end > first, (end + 31) // 32, 0))
    at = tile * WORDS + tl.arange(0, WORDS)
    w = load_words(parent, at, num_words)
    counts = popcount(w)
    position = (first - start * 32).to(tl.int32) + exclusive(counts)
    shift = (position & 31).to(tl.uint32)
    low, high = tl.gather(own, position >> 5, 0), tl.gather(own, (position >> 5) + 1, 0)
    bits = (low >> shift) | tl.where(shift > 0, high << ((32 - shift) & 31), 0)
    out_bits = pdep(bits, w)
    tl.store(out + at, out_bits.to(tl.int32, bitcast=True), mask=at < num_words)
    block = tile * (WORDS // 64) + tl.arange(0, WORDS // 64)
    total = tl.sum(tl.reshape(popcount(out_bits), (WORDS // 64, 64)), 1)
    tl.store(each + block, total, mask=block < blocks)


def extract(
    child: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    """The child's bits over the parent's survivors, and their rank index."""
    out = torch.empty(num_words(nnz), dtype=torch.int32, device=parent.device)
    if nnz:
        size = _tuning.EXTRACT_WORDS
        # One warp per program: nothing in it waits for other warps.
        launch(
            _extract,
            (cdiv(parent.numel(), size),),
            child,
            parent,
            rank,
            out,
            rank.numel() - 1,
            parent.numel(),
            nnz,
            WORDS=size,
            STEPS=size.bit_length() - 1,
            num_warps=1,
        )
    return out, rank_index(out, nnz)


def deposit(
    kept: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    """`kept`, over the parent's survivors, as words over all elements, and their rank index."""
    out = torch.empty_like(parent)
    blocks = rank.numel() - 1
    counts = torch.empty(blocks, dtype=torch.int32, device=parent.device)
    if numel:
        grid = (cdiv(parent.numel(), 256),)
        # A tile's bits may begin anywhere in a sector: a window of twice its words holds them.
        launch(
            _deposit,
            grid,
            kept,
            parent,
            rank,
            out,
            counts,
            blocks,
            parent.numel(),
            WORDS=256,
            WINDOW=512,
            num_warps=_tuning.DEPOSIT_WARPS,
        )
    return out, add_up(counts)
