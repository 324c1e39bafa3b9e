"""Masks of masks, a word at a time: bits extracted under the parent's word, or deposited."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.mask import num_words
from fedmap_sparse.triton_kernels._bits import exclusive, load_words, popcount
from fedmap_sparse.triton_kernels._launch import cdiv, launch
from fedmap_sparse.triton_kernels._scan import rank_index

# Words of the parent that a program takes at a time, and words of the result that it writes.
_WORDS, _OUT = 64, 32


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


@triton.jit(do_not_specialize_on_alignment=["child", "parent", "out"])
def _extract(
    child,
    parent,
    rank,
    out,
    num_blocks,
    in_words,
    out_words,
    nnz,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    OUT: tl.constexpr,
):
    """A program writes OUT words of the result, from every tile of the parent that holds a
    survivor of theirs: words are never shared, so nothing need be zero before, nor atomic."""
    first = tl.program_id(0).to(tl.int64) * (OUT * 32)
    last = tl.minimum(first + OUT * 32, nnz)
    # The last tile that starts at or before survivor `first`.
    tiles = (num_blocks + WORDS // 64 - 1) // (WORDS // 64)
    low = tl.zeros((), tl.int64)
    high = tiles.to(tl.int64)
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(rank + middle * (WORDS // 64)) <= first:
            low = middle
        else:
            high = middle
    lane = tl.arange(0, OUT)
    result = tl.zeros((OUT,), tl.uint32)
    tile = low
    base = tl.load(rank + tile * (WORDS // 64))
    while base < last:
        at = tile * WORDS + tl.arange(0, WORDS)
        w = load_words(parent, at, in_words)
        counts = popcount(w)
        before = exclusive(counts)
        bits = pext(load_words(child, at, in_words), w)
        # Bit number 0 of each output word, as a survivor's number within the tile.
        wanted = (first - base + lane * 32).to(tl.int32)
        word = tl.zeros_like(lane)
        for i in tl.static_range(STEPS):
            half = WORDS >> (i + 1)
            word = tl.where(tl.gather(before, word + half, 0) <= wanted, word + half, word)
        active = lane >= 0
        while tl.max(active.to(tl.int32), 0) > 0:
            at_bit = tl.gather(before, word, 0) - wanted
            found = tl.gather(bits, word, 0)
            up = tl.where((at_bit >= 0) & (at_bit < 32), found << (at_bit & 31), 0)
            down = tl.where((at_bit < 0) & (at_bit > -32), found >> (-at_bit & 31), 0)
            result = result | tl.where(active, up | down, 0)
            active = active & (at_bit < 32) & (word + 1 < WORDS)
            word = tl.where(active, word + 1, word)
        tile += 1
        base = tl.load(rank + tl.minimum(tile * (WORDS // 64), num_blocks))
        base = tl.where(tile < tiles, base, last)
    offset = first // 32 + lane
    tl.store(out + offset, result.to(tl.int32, bitcast=True), mask=offset < out_words)


@triton.jit(do_not_specialize_on_alignment=["kept", "parent", "out"])
def _deposit(kept, parent, rank, out, blocks, num_words, WORDS: tl.constexpr, WINDOW: tl.constexpr):
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
    out_bits = pdep(bits, w).to(tl.int32, bitcast=True)
    tl.store(out + at, out_bits, mask=at < num_words)


def extract(
    child: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    """The child's bits over the parent's survivors, and their rank index."""
    out = torch.empty(num_words(nnz), dtype=torch.int32, device=parent.device)
    if nnz:
        # One warp per program: its loops need no barrier.
        launch(
            _extract,
            (cdiv(out.numel(), _OUT),),
            child,
            parent,
            rank,
            out,
            rank.numel() - 1,
            parent.numel(),
            out.numel(),
            nnz,
            WORDS=_WORDS,
            STEPS=_WORDS.bit_length() - 1,
            OUT=_OUT,
            num_warps=1,
        )
    return out, rank_index(out, nnz)


def deposit(
    kept: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    """`kept`, over the parent's survivors, as words over all elements, and their rank index."""
    out = torch.empty_like(parent)
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
            rank.numel() - 1,
            parent.numel(),
            WORDS=256,
            WINDOW=512,
        )
    return out, rank_index(out, numel)
