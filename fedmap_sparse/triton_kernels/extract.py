"""Masks of masks, a word at a time: bits extracted under the parent's word, or deposited."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.mask import num_ranks, num_words
from fedmap_sparse.triton_kernels import _tuning
from fedmap_sparse.triton_kernels._bits import exclusive, load_words, popcount
from fedmap_sparse.triton_kernels._launch import cdiv, launch
from fedmap_sparse.triton_kernels._scan import add_up, spread, sum_of_chunks


@triton.jit
def _odd_below(x):
    """Bit i of either half is set where an odd number of the half's bits up to i are."""
    x = x ^ ((x << 1) & 0xFFFEFFFE)
    x = x ^ ((x << 2) & 0xFFFCFFFC)
    x = x ^ ((x << 4) & 0xFFF0FFF0)
    return x ^ ((x << 8) & 0xFF00FF00)


@triton.jit
def _moves(mask):
    """Which bits of `mask` move right by 1, 2, 4 and 8 to stand side by side in either half.

    The parallel suffix of Warren, Hacker's Delight (2nd edition), section 7-4; of a whole word it
    takes a fifth round, and each a fifth step.
    """
    zeros = ((mask ^ 0xFFFFFFFF) << 1) & 0xFFFEFFFE  # ~ of unsigned fails in the interpreter
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
    return m0, m1, m2, _odd_below(zeros) & mask


@triton.jit
def _right(x, moved, by: tl.constexpr):
    part = x & moved
    return (x ^ part) | (part >> by)


@triton.jit
def _left(x, moved, by: tl.constexpr):
    return x ^ ((x ^ (x << by)) & moved)


@triton.jit
def _low(mask):
    """Set bits of the lower half. Of 16 bits: of 32, half of them zero, LLVM makes no POPC."""
    x = mask.to(tl.uint16)
    x = x - ((x >> 1) & 0x5555)
    x = (x & 0x3333) + ((x >> 2) & 0x3333)
    x = (x + (x >> 4)) & 0x0F0F
    return ((x * 0x0101) >> 8).to(tl.uint32)


@triton.jit
def pext(x, mask):
    """The bits of uint32 `x` under `mask`, side by side from bit 0 (pext)."""
    m0, m1, m2, m3 = _moves(mask)
    x = _right(_right(_right(_right(x & mask, m0, 1), m1, 2), m2, 4), m3, 8)
    return (x & 0xFFFF) | ((x >> 16) << _low(mask))


@triton.jit
def pdep(x, mask):
    """The low bits of uint32 `x` at the set bits of `mask` (pdep)."""
    m0, m1, m2, m3 = _moves(mask)
    x = (x & 0xFFFF) | ((x >> _low(mask)) << 16)
    return _left(_left(_left(_left(x, m3, 8), m2, 4), m1, 2), m0, 1) & mask


@triton.jit
def _highest(x):
    """The place of the highest bit of uint32 that are not zero."""
    x = x & ((x >> 1) ^ 0xFFFFFFFF)  # without the next bit it is rounded to no other power of two
    return (x.to(tl.float32).to(tl.uint32, bitcast=True) >> 23).to(tl.int32) - 127


@triton.jit(
    do_not_specialize=["num_blocks", "in_words"],
    do_not_specialize_on_alignment=["child", "parent", "out"],
)
def _extract(
    child, parent, rank, out, sums, parts, num_blocks, in_words, WORDS: tl.constexpr
):  # fmt: skip
    """A program takes WORDS words of the parent and writes the words of the result that begin
    among their survivors. Each word has one owner: nothing need be zero before, nor atomic.

    32 words at a time; of them exactly one ends each word of the result, and stores it. `sums`
    counts the program's bits, `parts` those before each block of the result that begins in it.
    """
    tile = tl.program_id(0).to(tl.int64)
    base = tl.load(rank + tile * (WORDS // 64))
    end = tl.load(rank + tl.minimum((tile + 1) * (WORDS // 64), num_blocks))
    first = (base + 31) // 32
    owned = ((end + 31) // 32 - first).to(tl.int32)
    out += first
    parts += tile * (WORDS // 64)
    edge = ((first + 63) // 64 * 64 - first).to(tl.int32)  # where the next block begins
    # The next survivor's place, counted from bit 0 of the first word that is owned; bits of a word
    # that is not ended yet; bits of those that are.
    reached = (base - first * 32).to(tl.int32)
    begun = tl.zeros((), tl.uint32)
    ones = tl.zeros((), tl.int32)
    if owned > 0:
        lane = tl.arange(0, 32)
        bit = (1 << lane.to(tl.uint32)).to(tl.uint32)
        word = tile * WORDS
        w = load_words(parent, word + lane, in_words)
        x = load_words(child, word + lane, in_words)
        while (reached < owned * 32) & (word < in_words):
            word += 32
            next_w = load_words(parent, word + lane, in_words)
            next_x = load_words(child, word + lane, in_words)
            counts = popcount(w)
            through = reached + tl.cumsum(counts, 0)
            place = through - counts
            at, shift = place >> 5, (place & 31).to(tl.uint32)
            ends = (through >> 5) > at
            bits = pext(x, w)
            high = tl.where(shift > 0, bits >> ((32 - shift) & 31), 0)
            # No two words share a bit of the result, so an OR is a difference of sums.
            low = tl.cumsum((bits << shift).to(tl.int32, bitcast=True), 0)
            earlier = tl.sum(tl.where(ends, bit, 0), 0) & (bit - 1)
            last = tl.where(earlier != 0, _highest(earlier), 0)
            result = low - tl.where(earlier != 0, tl.gather(low, last, 0), 0)
            result = result.to(tl.uint32, bitcast=True)
            result = result | tl.where(earlier != 0, tl.gather(high, last, 0), begun)
            mine = ends & (at >= 0) & (at < owned)
            tl.store(out + at, result.to(tl.int32, bitcast=True), mask=mine)
            each = tl.where(mine, popcount(result), 0)
            reached += tl.sum(counts, 0)
            starts = (edge < owned) & (edge < (reached >> 5))  # one of 32 words, at most
            tl.store(parts, ones + tl.sum(tl.where(at < edge, each, 0), 0), mask=starts)
            parts += starts.to(tl.int32)
            edge += starts.to(tl.int32) * 64
            ones += tl.sum(each, 0)
            begun = tl.sum(tl.where(lane == 31, tl.where(ends, high, result), 0), 0)
            w, x = next_w, next_x
        if reached < owned * 32:  # the result's last word is not full
            tl.store(out + (owned - 1), begun.to(tl.int32, bitcast=True))
            tl.store(parts, ones, mask=edge < owned)
            ones += popcount(begun)
    tl.store(sums + tile, ones)


@triton.jit
def _load_tiles(rank, sums, tile, end, num_blocks, PARTS: tl.constexpr):
    """Bits of each tile, the first word that it wrote, and the first that it did not."""
    inside = tile < end
    first = tl.load(rank + tile * PARTS, mask=inside, other=0)
    past = tl.load(rank + tl.minimum((tile + 1) * PARTS, num_blocks), mask=inside, other=0)
    return tl.load(sums + tile, mask=inside, other=0), (first + 31) // 32, (past + 31) // 32


@triton.jit(do_not_specialize=["tiles", "num_blocks", "blocks", "span"])
def _join(
    rank, sums, parts, out, tiles, num_blocks, blocks, span, PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The result's rank index from what `_extract` counted, `span` of its programs a program."""
    begin = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(begin + span, tiles)
    lane = tl.arange(0, CHUNK)
    here, first, past = _load_tiles(rank, sums, begin + lane, end, num_blocks, PARTS)
    carry = sum_of_chunks(sums, begin, CHUNK)
    for start in range(begin, end, CHUNK):
        tile = start + lane
        block = (first + 63) // 64
        through = carry + tl.cumsum(here, 0).to(tl.int64)
        for i in tl.static_range(PARTS):
            mine = (tile < end) & ((block + i) * 64 < past)
            part = tl.load(parts + tile * PARTS + i, mask=mine, other=0)
            tl.store(out + block + i, through - here + part, mask=mine)
        tl.store(out + blocks + tile * 0, through, mask=tile == tiles - 1)
        if start + CHUNK < end:
            carry += tl.sum(here, 0)
            here, first, past = _load_tiles(rank, sums, CHUNK + tile, end, num_blocks, PARTS)


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
    device, blocks, size = parent.device, num_ranks(nnz) - 1, _tuning.EXTRACT_WORDS
    out = torch.empty(num_words(nnz), dtype=torch.int32, device=device)
    if not nnz:
        return out, torch.zeros(blocks + 1, dtype=torch.int64, device=device)
    tiles, parts = cdiv(parent.numel(), size), size // 64
    counts = torch.empty(tiles * (parts + 1), dtype=torch.int32, device=device)
    sums, before = counts[:tiles], counts[tiles:]
    # One warp per program: nothing in it waits for other warps.
    launch(
        _extract,
        (tiles,),
        child,
        parent,
        rank,
        out,
        sums,
        before,
        rank.numel() - 1,
        parent.numel(),
        WORDS=size,
        num_warps=1,
    )
    index = torch.empty(blocks + 1, dtype=torch.int64, device=device)
    programs, span, chunk = spread(tiles, 256)
    launch(
        _join,
        (programs,),
        rank,
        sums,
        before,
        index,
        tiles,
        rank.numel() - 1,
        blocks,
        span,
        PARTS=parts,
        CHUNK=chunk,
        num_warps=8,
    )
    return out, index


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
