"""rANS of one warp: a lane a state, tables and words in registers. docs/format.md, 4.1."""

from __future__ import annotations

import triton
import triton.language as tl

from fedmap_sparse.triton_kernels._bits import exclusive, load_words, popcount

# Steps whose nibbles fill a register.
_STEPS = tl.constexpr(8)


@triton.jit
def _transpose(x, lane):
    """Nibble j of lane 8 q + k becomes nibble k of lane 8 q + j; its own inverse."""
    other = tl.gather(x, lane ^ 4, 0)
    upper = (x & 0xFFFF0000) | ((other >> 16) & 0x0000FFFF)
    x = tl.where((lane & 4) == 0, (x & 0x0000FFFF) | (other << 16), upper)
    other = tl.gather(x, lane ^ 2, 0)
    upper = (x & 0xFF00FF00) | ((other >> 8) & 0x00FF00FF)
    x = tl.where((lane & 2) == 0, (x & 0x00FF00FF) | ((other & 0x00FF00FF) << 8), upper)
    other = tl.gather(x, lane ^ 1, 0)
    upper = (x & 0xF0F0F0F0) | ((other >> 4) & 0x0F0F0F0F)
    return tl.where((lane & 1) == 0, (x & 0x0F0F0F0F) | ((other & 0x0F0F0F0F) << 4), upper)


@triton.jit
def _ballot(flags, bit):
    """The lanes whose flag is set, as a mask; how many there are before each, and in all."""
    lanes = tl.sum(tl.where(flags, bit, 0), 0).to(tl.uint32)
    return popcount(lanes & (bit - 1)), popcount(lanes)


@triton.jit
def _starts(f, lane):
    """The sum of the frequencies before; lanes 16 to 31 repeat lanes 0 to 15."""
    return exclusive(f) - tl.where(lane < 16, 0, 1 << 15)


@triton.jit
def _encoding_table(f, lane):
    """(frequency and bias, reciprocal, shift): x // f is mulhi(x, reciprocal) >> shift, exact below
    2^31; where f is 1, mulhi gives x - 1, and the bias makes up for it."""
    bias = _starts(f, lane) + tl.where(f < 2, (1 << 15) - 1, 0)
    rate = (f.to(tl.uint32) << 16) | bias.to(tl.uint32)
    log = tl.zeros_like(f)
    for i in tl.static_range(15):
        log += ((1 << i) < f).to(tl.int32)
    numerator = (tl.full(f.shape, 1, tl.uint64) << (log + 31).to(tl.uint64)) + (f - 1).to(tl.uint64)
    quotient = (numerator // tl.maximum(f, 1).to(tl.uint64)).to(tl.uint32)
    return rate, tl.where(f < 2, 0xFFFFFFFF, quotient), tl.maximum(log - 1, 0).to(tl.uint32)


@triton.jit
def _encode_step(x, end, s, on, rate, reciprocal, shift, bit, scratch):
    """One step, into the words before `end`; returns the states and the new `end`."""
    both = tl.gather(rate, s, 0)
    f = both >> 16
    full = on & ((x >> 16) >= f)
    before, count = _ballot(full, bit)
    end -= count
    tl.store(scratch + end + before, x.to(tl.uint16), mask=full)
    y = tl.where(full, x >> 16, x)
    q = ((y.to(tl.uint64) * tl.gather(reciprocal, s, 0)) >> 32).to(tl.uint32)
    q = q >> tl.gather(shift, s, 0)
    return tl.where(on, y + (both & 0xFFFF) + q * ((1 << 15) - f), x), end


@triton.jit
def _open_stream(payload, begin, pairs, lane):
    """The words of a stream from word `begin` on, two a register: (pointer to pairs, pairs that may
    be read, three registers of 64 words each, the pairs before them, the place of the next word).
    """
    stream = payload + begin // 2
    left = tl.minimum(pairs - begin // 2, 1 << 30).to(tl.int32)
    now = load_words(stream, lane, left)
    then = load_words(stream, 32 + lane, left)
    ahead = load_words(stream, 64 + lane, left)
    return stream, left, now, then, ahead, tl.zeros((), tl.int32), (begin & 1).to(tl.int32)


@triton.jit
def _decode_step(x, on, table, s4, s8, s12, stream, left, now, then, ahead, base, at, lane, bit):
    """One step, which takes words from place `at` of `now` and `then` on.

    Words past the stream's end are another's or zero: the count of words tells in the end.
    """
    slot = x & 0x7FFF
    s = tl.where(slot >= s4, 4, 0)
    s = tl.where(slot >= s8, 8, s)
    s = tl.where(slot >= s12, 12, s)
    t0 = tl.gather(table, s, 0)
    t1 = tl.gather(table, s + 1, 0)
    t2 = tl.gather(table, s + 2, 0)
    t3 = tl.gather(table, s + 3, 0)
    key = (slot << 16) | 0xFFFF  # start and frequency in one: the last that begins by the slot
    t1_or_less = tl.where(t1 <= key, t1, t0)
    found = tl.where(t3 <= key, t3, tl.where(t2 <= key, t2, t1_or_less))
    y = (found & 0xFFFF) * (x >> 15) + (slot - (found >> 16))
    empty = on & (y < (1 << 15))
    before, count = _ballot(empty, bit)
    place = at + before
    pair = place >> 1
    two = tl.where(pair < 32, tl.gather(now, pair & 31, 0), tl.gather(then, pair & 31, 0))
    word = (two >> ((place & 1) * 16).to(tl.uint32)) & 0xFFFF
    x = tl.where(empty, (y << 16) | word, tl.where(on, y, x))
    symbol = tl.where(t1 <= key, s + 1, s)
    symbol = tl.where(t3 <= key, s + 3, tl.where(t2 <= key, s + 2, symbol))
    at += count
    # A branch: any other instruction that names `ahead` would wait for it.
    if at >= 64:
        at -= 64
        base += 32
        now = then
        then = ahead
        ahead = load_words(stream, base + 64 + lane, left)
    return x, symbol, now, then, ahead, base, at


@triton.jit
def _decoding_table(f, lane):
    """(start and frequency of each symbol, the starts of symbols 4, 8 and 12)."""
    start = _starts(f, lane)
    s4 = tl.sum(tl.where(lane == 4, start, 0), 0).to(tl.uint32)
    s8 = tl.sum(tl.where(lane == 8, start, 0), 0).to(tl.uint32)
    s12 = tl.sum(tl.where(lane == 12, start, 0), 0).to(tl.uint32)
    return (start.to(tl.uint32) << 16) | f.to(tl.uint32), s4, s8, s12
