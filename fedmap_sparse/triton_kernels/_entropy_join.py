"""Values out of rANS: symbols, then planes beside them, then escapes. docs/format.md, 5."""

from __future__ import annotations

import triton
import triton.language as tl

from fedmap_sparse.triton_kernels._bits import load_words, popcount
from fedmap_sparse.triton_kernels._entropy_values import (
    _ENTRY,
    _ESCAPE,
    _bits_of,
    _fifteens,
    _frequencies,
)
from fedmap_sparse.triton_kernels._rans import (
    _STEPS,
    _ballot,
    _decode_tile,
    _decoding_table,
    _none,
    _open_stream,
    _with,
)


@triton.jit(
    do_not_specialize=["pairs", "states", "n"],
    do_not_specialize_on_alignment=["offsets", "broken"],
)
def _decode_values(
    payload, directory, pairs, states, offsets, n, nibbles, broken, CHUNK: tl.constexpr
):
    """A chunk's symbols: 8 steps of a lane a register."""
    c = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    bit = tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)
    size = tl.minimum(n - c * CHUNK, CHUNK).to(tl.int32)
    each, table, s4, s8, s12 = _decoding_table(_frequencies(directory, c, lane), lane)
    x = tl.load(payload + states + c * 32 + lane).to(tl.uint32, bitcast=True)
    begin = tl.load(offsets + c)
    stream, left, now, then, ahead, base, at = _open_stream(payload, begin, pairs, lane)
    for tile in range((size + 255) // 256):
        live = size - tile * 256
        x, symbols, now, then, ahead, base, at = _decode_tile(
            x, live, table, each, s4, s8, s12, stream, left, now, then, ahead, base, at, lane, bit
        )
        to = nibbles + c * (CHUNK // 8) + tile * 32 + lane
        tl.store(to, symbols.to(tl.int32, bitcast=True))
    taken = 2 * base + at - (begin & 1)
    sound = (x == (1 << 15)) & (taken == tl.load(offsets + c + 1) - begin)
    tl.store(broken + c, tl.max(1 - sound.to(tl.int32), 0))


@triton.jit
def _three_bits(plane, tile, lane, j, size, TILES: tl.constexpr):
    """Three bits of each of the elements of step `j` of TILES tiles."""
    group = 32 * tile + 4 * j + tl.arange(0, 4)[None, :]
    eight = tl.zeros((TILES, 4), tl.uint32)
    for k in tl.static_range(3):
        at = 3 * group + k
        byte = tl.load(plane + at, mask=at < (3 * size + 7) // 8, other=0)
        eight = eight | (byte.to(tl.uint32) << (8 * k))
    eights = tl.reshape(tl.broadcast_to(eight[:, :, None], (TILES, 4, 8)), (TILES, 32))
    return (eights >> (3 * (lane & 7)).to(tl.uint32)) & 7


@triton.jit
def _joined(
    nibbles, low, high, out, size, top, EXPONENT: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Stores TILES tiles of values. FULL: as in `_split`."""
    tile = tl.arange(0, TILES)[:, None]
    lane = tl.arange(0, 32)[None, :]
    here = (tile * 256 + lane >= 0) if FULL else (tile * 256 + lane < size)
    eights = tl.load(nibbles + 32 * tile + lane, mask=here, other=0).to(tl.uint32, bitcast=True)
    for j in tl.static_range(_STEPS):
        i = 256 * tile + 32 * j + lane
        inside = i >= 0 if FULL else i < size
        e = (top - ((eights >> (4 * j)) & 15).to(tl.int32)).to(tl.uint32, bitcast=True)
        e = e & ((1 << EXPONENT) - 1)  # an escape's is another's until _restore puts its own
        if HIGH == 8:
            h = tl.load(high + i, mask=inside, other=0).to(tl.uint32)
        else:
            h = _three_bits(high, tile, lane, j, size, TILES)
        v = ((h >> (HIGH - 1)) << (LOW + HIGH + EXPONENT - 1)) | (e << (LOW + HIGH - 1))
        v = v | ((h & ((1 << (HIGH - 1)) - 1)) << LOW)
        if LOW > 0:
            v = v | tl.load(low + i, mask=inside, other=0).to(tl.uint32)
        tl.store(out + i, v.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _join(
    nibbles,
    directory,
    low,
    high,
    n,
    out,
    CHUNK: tl.constexpr,
    EXPONENT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    TILES: tl.constexpr,
):
    """Values from symbols and planes, TILES tiles of a chunk each; none from escapes."""
    begin = tl.program_id(0).to(tl.int64) * (TILES * 256)
    top = tl.load(directory + begin // CHUNK * _ENTRY + 2).to(tl.int32) & 255
    size = tl.minimum(n - begin, TILES * 256).to(tl.int32)
    nibbles += begin // 8
    low += begin
    # Planes of bytes are read by four, at which all parts of a payload begin.
    if LOW == 8:
        low = tl.multiple_of(low, 4)
    high = tl.multiple_of(high + begin // 8 * HIGH, 4)
    out += begin
    if size == TILES * 256:
        _joined(nibbles, low, high, out, size, top, EXPONENT, LOW, HIGH, TILES, True)
    else:
        _joined(nibbles, low, high, out, size, top, EXPONENT, LOW, HIGH, TILES, False)


@triton.jit
def _take_escapes(
    out, size, marks, lane, bit, escapes, at, last, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr
):
    """Those of a tile, of which `size` values count; returns where the next tile's are, and which
    lanes have an exponent beyond the dtype's."""
    flags, values, exponents = _none(), _none(), _none()
    for j in tl.static_range(_STEPS):
        flag = (((marks >> (4 * j)) & 1) != 0) & (lane < size - 32 * j)
        lanes = _ballot(flag, bit)
        place = at + popcount(lanes & (bit - 1))
        e = tl.load(escapes + place, mask=flag & (place < last), other=0).to(tl.uint32)
        flags = _with(flags, flag)
        values = _with(values, _bits_of(out, 32 * j + lane, flag))
        exponents = _with(exponents, e)
        at += popcount(lanes)
    wrong = tl.zeros((32,), tl.int32)
    for j in tl.static_range(_STEPS):
        wrong = wrong | (exponents[j] >= (1 << EXPONENT)).to(tl.int32)
        v = values[j] & (0xFFFFFFFF ^ (((1 << EXPONENT) - 1) << MANTISSA))
        v = v | ((exponents[j] & ((1 << EXPONENT) - 1)) << MANTISSA)
        tl.store(out + 32 * j + lane, v.to(out.dtype.element_ty), mask=flags[j])
    return at, wrong


@triton.jit
def _beyond(eights, top, lane, size):
    """Which lanes of a tile have a symbol of no exponent that is no escape."""
    wrong = tl.zeros((32,), tl.int32)
    for j in tl.static_range(_STEPS):
        s = ((eights >> (4 * j)) & 15).to(tl.int32)
        wrong = wrong | ((s > top) & (s != _ESCAPE) & (lane < size - 32 * j)).to(tl.int32)
    return wrong


@triton.jit(
    do_not_specialize=["n"], do_not_specialize_on_alignment=["offsets", "escapes", "broken"]
)
def _restore(
    nibbles,
    directory,
    offsets,
    escapes,
    n,
    out,
    broken,
    CHUNK: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    TILES: tl.constexpr,
):
    """The exponents that have no symbol, and whether there are as many as symbols say."""
    c = tl.program_id(0).to(tl.int64)
    size = tl.minimum(n - c * CHUNK, CHUNK).to(tl.int32)
    top = tl.load(directory + c * _ENTRY + 2).to(tl.int32) & 255
    at = tl.load(offsets + c)
    last = tl.load(offsets + c + 1)
    nibbles += c * (CHUNK // 8)
    out += c * CHUNK
    lane = tl.arange(0, 32)
    bit = tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)
    wrong = tl.zeros((32,), tl.int32)
    tiles = (size + 255) // 256
    for group in range(0, tiles, TILES):
        eights = load_words(nibbles + group * 32, tl.arange(0, 32 * TILES), (tiles - group) * 32)
        if (tl.max(_fifteens(eights), 0) > 0) | (top < 14):
            for tile in range(group, tl.minimum(group + TILES, tiles)):
                rest = size - tile * 256
                eight = load_words(nibbles + tile * 32, lane, 32)
                wrong = wrong | _beyond(eight, top, lane, rest)
                marks = _fifteens(eight)
                if tl.max(marks, 0) > 0:
                    at, more = _take_escapes(
                        out + tile * 256, rest, marks, lane, bit, escapes, at, last, EXPONENT,
                        MANTISSA,
                    )  # fmt: skip
                    wrong = wrong | more
    tl.store(broken + c, tl.maximum(tl.max(wrong, 0), (at != last).to(tl.int32)))
