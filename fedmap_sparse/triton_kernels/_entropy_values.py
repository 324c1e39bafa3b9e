"""Values into rANS: exponents coded, signs and mantissas in planes. docs/format.md, 5."""

from __future__ import annotations

import triton
import triton.language as tl

from fedmap_sparse.triton_kernels._bits import load_words, popcount
from fedmap_sparse.triton_kernels._rans import (
    _STEPS,
    _ballot,
    _encode_tile,
    _encoding_table,
    _none,
    _with,
)

_ENTRY = tl.constexpr(20)  # of the directory, in 16-bit words
_ESCAPE = tl.constexpr(15)


@triton.jit
def _bits_of(values, at, inside):
    return tl.load(values + at, mask=inside, other=0).to(tl.uint32)


@triton.jit
def _symbol(top, e):
    """Exponents beyond the 15 below `top`, above it too, differ by more, modulo 2^32."""
    return tl.minimum((top - e).to(tl.uint32, bitcast=True), _ESCAPE)


@triton.jit
def _put_three_bits(plane, h, words, BLOCK: tl.constexpr):
    """Three bits of each of BLOCK elements side by side, in `words` words."""
    eights = tl.reshape(h, (BLOCK // 8, 8)) << (3 * tl.arange(0, 8)[None, :]).to(tl.uint32)
    group = tl.sum(eights, 1)
    word = tl.arange(0, BLOCK // 8)
    inside = word < tl.minimum(words, BLOCK // 32 * 3)
    own = tl.where(inside, word * 4 // 3, 0)
    skip = (8 * (word % 3)).to(tl.uint32)  # bits of its first group that the word before has
    both = (tl.gather(group, own, 0) >> skip) | (tl.gather(group, own + 1, 0) << (24 - skip))
    tl.store(plane + word, both.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _bins(v, low, EXPONENT: tl.constexpr, SHIFT: tl.constexpr):
    """Of each value's exponent its distance to `low`, from 0 to 31."""
    e = ((v >> SHIFT) & ((1 << EXPONENT) - 1)).to(tl.int32)
    return e if EXPONENT == 5 else tl.minimum(tl.maximum(e - low, 0), 31)


@triton.jit
def _split(
    values, low, high, begin, block, size, lowest, EXPONENT: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Stores the planes of BLOCK values; returns how many are in each of `_bins`, lanes past `size`
    counted as zeros. FULL: none is past it, so the mask splits no wide access."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i >= 0 if FULL else i < size
    v = _bits_of(values, begin + i, inside)
    sign = v >> (LOW + HIGH + EXPONENT - 1)
    h = (sign << (HIGH - 1)) | ((v & ((1 << (LOW + HIGH - 1)) - 1)) >> LOW)
    if LOW > 0:
        tl.store(low + begin + i, v.to(low.dtype.element_ty), mask=inside)
    if HIGH == 8:
        tl.store(high + begin + i, h.to(tl.uint8), mask=inside)
    else:
        first = 3 * (begin + block * BLOCK) // 32
        _put_three_bits(high + first, h, (3 * (size - block * BLOCK) + 31) // 32, BLOCK)
    return tl.histogram(_bins(v, lowest, EXPONENT, LOW + HIGH - 1), 32)


@triton.jit
def _covered(counts, BINS: tl.constexpr):
    """How many are in the 15 bins that end in each."""
    bins = tl.arange(0, BINS)
    through = tl.cumsum(counts, 0)
    earlier = tl.gather(through, tl.maximum(bins - 15, 0), 0)
    return through - tl.where(bins >= 15, earlier, 0)


@triton.jit
def _every_exponent(
    values, begin, size, s, EXPONENT: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The least top whose 15 exponents cover the most, and how many each of the first 15 symbols
    has: by a histogram of all exponents."""
    bins = tl.arange(0, 256)
    counts = tl.zeros((256,), tl.int32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        v = _bits_of(values, begin + i, i < size)
        counts += tl.histogram(((v >> SHIFT) & ((1 << EXPONENT) - 1)).to(tl.int32), 256)
    counts -= tl.where(bins == 0, (size + BLOCK - 1) // BLOCK * BLOCK - size, 0)
    covered = _covered(counts, 256)
    top = 255 - (tl.max(covered * 256 + 255 - bins, 0) & 255)
    return top, tl.gather(counts, tl.maximum(top - s, 0), 0)


@triton.jit
def _put_eights(
    values, nibbles, first, size, top, EXPONENT: tl.constexpr, SHIFT: tl.constexpr,
    TILES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The symbols of TILES tiles from tile `first` on, of eight steps in each register. A thread
    has the same lanes of all steps, so it asks no other."""
    tile = first + tl.arange(0, TILES)[:, None]
    lane = tl.arange(0, 32)[None, :]
    eights = tl.zeros((TILES, 32), tl.uint32)
    for j in tl.static_range(_STEPS):
        i = 256 * tile + 32 * j + lane
        v = _bits_of(values, i, i >= 0 if FULL else i < size)
        e = ((v >> SHIFT) & ((1 << EXPONENT) - 1)).to(tl.int32)
        eights = eights | (_symbol(top, e) << (4 * j))
    here = tile >= 0 if FULL else tile * 256 < size
    tl.store(nibbles + 32 * tile + lane, eights.to(tl.int32, bitcast=True), mask=here & (lane >= 0))


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["escapes"])
def _describe(
    values,
    n,
    directory,
    low,
    high,
    escapes,
    nibbles,
    CHUNK: tl.constexpr,
    EXPONENT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,
    TILES: tl.constexpr,
):
    """A chunk's entry of the directory but for its words, its planes, and its symbols."""
    c = tl.program_id(0)
    begin = c.to(tl.int64) * CHUNK
    size = tl.minimum(n - begin, CHUNK).to(tl.int32)
    bins = tl.arange(0, 32)
    s = tl.arange(0, 16)
    # A histogram of 256 bins costs a warp 64 shared atomics' conflicts for each tile, of 32 bins
    # one. Those of 8 bits lie about the greatest of the first values; what is beyond is in the
    # outer two, and if these could hold a better top all exponents are counted.
    lowest = tl.zeros((), tl.int32)
    if EXPONENT == 8:
        i = tl.arange(0, SAMPLE)
        sample = _bits_of(values, begin + i, i < size)
        lowest = tl.max((sample >> (LOW + HIGH - 1)) & 255, 0).to(tl.int32) - 23
    counts = tl.zeros((32,), tl.int32)
    blocks = (size + BLOCK - 1) // BLOCK
    for block in range(blocks):
        if (block + 1) * BLOCK <= size:
            counts += _split(
                values, low, high, begin, block, size, lowest, EXPONENT, LOW, HIGH, BLOCK, True
            )
        else:
            counts += _split(
                values, low, high, begin, block, size, lowest, EXPONENT, LOW, HIGH, BLOCK, False
            )
    zero = tl.minimum(tl.maximum(-lowest, 0), 31)
    counts -= tl.where(bins == zero, blocks * BLOCK - size, 0)  # lanes past the end
    covered = _covered(counts, 32)
    if EXPONENT == 8:
        covered = tl.where((bins >= 15) & (bins < 31), covered, 0)
    best = tl.max(covered * 32 + 31 - bins, 0)
    bin_of_top = 31 - (best & 31)
    top = lowest + bin_of_top
    known = tl.gather(counts, tl.maximum(bin_of_top - s, 0), 0)
    if EXPONENT == 8:
        below = tl.sum(tl.where(bins < 15, counts, 0), 0)
        above = tl.sum(tl.where(bins > 16, counts, 0), 0)
        if (below >= best // 32) | (above > best // 32):
            top, known = _every_exponent(values, begin, size, s, EXPONENT, LOW + HIGH - 1, SAMPLE)
    known = tl.where((s < 15) & (s <= top), known, 0)
    rare = size - tl.sum(known, 0)
    known = tl.where(s == 15, rare, known)
    nearest = (known.to(tl.uint32) * 65536 + size.to(tl.uint32)) // (2 * size).to(tl.uint32)
    f = tl.where(known > 0, tl.maximum(nearest.to(tl.int32), 1), 0)
    most = 15 - (tl.max(f * 16 + 15 - s, 0) & 15)
    f += tl.where(s == most, (1 << 15) - tl.sum(f, 0), 0)
    entry = directory + c.to(tl.int64) * _ENTRY
    tl.store(entry + 1, rare.to(tl.uint16))
    tl.store(entry + 2, top.to(tl.uint16))
    tl.store(entry + 3, tl.zeros((), tl.uint16))
    tl.store(entry + 4 + s, f.to(tl.uint16))
    tl.store(escapes + 1 + c, rare.to(tl.int64))
    values += begin
    nibbles += c.to(tl.int64) * (CHUNK // 8)
    for first in range(0, (size + 255) // 256, TILES):
        if (first + TILES) * 256 <= size:
            _put_eights(values, nibbles, first, size, top, EXPONENT, LOW + HIGH - 1, TILES, True)
        else:
            _put_eights(values, nibbles, first, size, top, EXPONENT, LOW + HIGH - 1, TILES, False)


@triton.jit
def _frequencies(directory, c, lane):
    return tl.load(directory + c * _ENTRY + 4 + (lane & 15)).to(tl.int32)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["states"])
def _encode_values(nibbles, n, directory, states, scratch, counts, CHUNK: tl.constexpr):
    c = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    bit = tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)
    scratch += c * CHUNK
    size = tl.minimum(n - c * CHUNK, CHUNK).to(tl.int32)
    rate, reciprocal, shift = _encoding_table(_frequencies(directory, c, lane), lane)
    x = tl.full((32,), 1 << 15, tl.uint32)
    end = tl.zeros((), tl.int32) + CHUNK
    tiles = (size + 255) // 256
    place = nibbles + c * (CHUNK // 8) + (tiles - 1) * 32 + lane
    ahead = tl.load(place)
    for i in range(tiles):
        eight = ahead.to(tl.uint32, bitcast=True)
        place -= 32
        ahead = tl.load(place, mask=(i + 1 < tiles) & (lane >= 0), other=0)
        live = size - (tiles - 1 - i) * 256
        x, end = _encode_tile(x, end, eight, live, lane, bit, rate, reciprocal, shift, scratch)
    tl.store(states + c * 32 + lane, x.to(tl.int32, bitcast=True))
    words = CHUNK - end
    tl.store(directory + c * _ENTRY, words.to(tl.uint16))
    tl.store(counts + 1 + c, words.to(tl.int64))


@triton.jit(
    do_not_specialize=["n", "base", "limit", "chunks"],
    do_not_specialize_on_alignment=["offsets", "escapes"],
)
def _escapes(
    values,
    n,
    nibbles,
    offsets,
    escapes,
    out,
    base,
    limit,
    chunks,
    CHUNK: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    TILES: tl.constexpr,
):
    """The exponents that have no symbol, behind the words: few as a rule, so most tiles are left
    at a look at their symbols."""
    c = tl.program_id(0).to(tl.int64)
    to = base + (2 * tl.load(offsets + chunks) + 3) // 4 * 4 + tl.load(escapes + c)
    values += c * CHUNK
    size = tl.minimum(n - c * CHUNK, CHUNK).to(tl.int32)
    nibbles += c * (CHUNK // 8)
    lane = tl.arange(0, 32)
    bit = tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)
    tiles = (size + 255) // 256
    if tl.load(escapes + c + 1) > tl.load(escapes + c):
        for group in range(0, tiles, TILES):
            w = tl.arange(0, 32 * TILES)
            eights = load_words(nibbles + group * 32, w, (tiles - group) * 32)
            if tl.max(_fifteens(eights), 0) > 0:
                for tile in range(group, tl.minimum(group + TILES, tiles)):
                    marks = _fifteens(load_words(nibbles + tile * 32, lane, 32))
                    if tl.max(marks, 0) > 0:
                        to = _put_escapes(
                            values + tile * 256, size - tile * 256, marks, lane, bit, out, to,
                            limit, EXPONENT, MANTISSA,
                        )  # fmt: skip
    if c == chunks - 1:
        padding = to + tl.arange(0, 4)
        beyond = (padding < (to + 3) // 4 * 4) & (padding < limit)
        tl.store(out + padding, tl.zeros((4,), tl.uint8), mask=beyond)


@triton.jit
def _fifteens(eight):
    """Of each nibble that is 15 the lowest bit."""
    pairs = eight & (eight >> 1)
    return pairs & (pairs >> 2) & 0x11111111


@triton.jit
def _put_escapes(
    values, size, marks, lane, bit, out, to, limit, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr
):
    """Those of a tile, of which `size` values count; returns where the next tile's go."""
    flags, exponents = _none(), _none()
    for j in tl.static_range(_STEPS):
        flag = (((marks >> (4 * j)) & 1) != 0) & (lane < size - 32 * j)
        v = _bits_of(values, 32 * j + lane, flag)
        flags = _with(flags, flag)
        exponents = _with(exponents, (v >> MANTISSA) & ((1 << EXPONENT) - 1))
    for j in tl.static_range(_STEPS):
        lanes = _ballot(flags[j], bit)
        place = to + popcount(lanes & (bit - 1))
        tl.store(out + place, exponents[j].to(tl.uint8), mask=flags[j] & (place < limit))
        to += popcount(lanes)
    return to
