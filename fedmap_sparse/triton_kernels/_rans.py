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
    """The lanes whose flag is set, as a mask."""
    return tl.sum(tl.where(flags, bit, 0), 0).to(tl.uint32)


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
def _none():
    """No elements, of a type that mypy lets grow."""
    return ()


@triton.jit
def _with(those, one):
    return those + (one,)


@triton.jit
def _encode_tile(x, end, nibbles, live, lane, bit, rate, reciprocal, shift, scratch):
    """Eight steps, last first, into the words before `end`; returns the states and the new `end`.

    A warp issues in order, and no shuffle, ballot or store passes another. So the tables are asked
    for all eight steps first, the states follow in one chain of arithmetic, and the ballots, which
    no state depends on, come side by side.
    """
    rates, reciprocals, shifts = _none(), _none(), _none()
    for k in tl.static_range(_STEPS):
        s = ((nibbles >> (4 * (_STEPS - 1 - k))) & 15).to(tl.int32)
        rates = _with(rates, tl.gather(rate, s, 0))
        reciprocals = _with(reciprocals, tl.gather(reciprocal, s, 0))
        shifts = _with(shifts, tl.gather(shift, s, 0))
    states, flags = _none(), _none()
    for k in tl.static_range(_STEPS):
        on = lane < live - 32 * (_STEPS - 1 - k)
        full = on & (x >= (rates[k] & 0xFFFF0000))
        states = _with(states, x)
        flags = _with(flags, full)
        y = tl.where(full, x >> 16, x)
        q = ((y.to(tl.uint64) * reciprocals[k]) >> 32).to(tl.uint32) >> shifts[k]
        x = tl.where(on, y + (rates[k] & 0xFFFF) + q * ((1 << 15) - (rates[k] >> 16)), x)
    ballots = _none()
    for k in tl.static_range(_STEPS):
        ballots = _with(ballots, _ballot(flags[k], bit))
    for k in tl.static_range(_STEPS):
        end -= popcount(ballots[k])
        to = end + popcount(ballots[k] & (bit - 1))
        tl.store(scratch + to, states[k].to(tl.uint16), mask=flags[k])
    return x, end


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
def _decode_step(x, on, table, keys, now, then, at, bit):
    """One step, which takes words from place `at` of `now` and `then` on; adds its slots to `keys`.

    Words past the stream's end are another's or zero: the count of words tells in the end.
    """
    key = (x << 16) & 0x7FFF0000
    # Of differences modulo 2^32 the least is that to the last symbol that begins by the slot: a
    # chain of adds and minima, where a search would wait for shuffles.
    least = tl.min(key[None, :] - table[:, None], 0)
    y = ((least & 0xFFFF) ^ 0xFFFF) * (x >> 15) + (least >> 16)
    empty = on & (y < (1 << 15))
    lanes = _ballot(y < (1 << 15), tl.where(on, bit, 0))
    place = at + popcount(lanes & (bit - 1))
    pair = place >> 1
    two = tl.where(pair < 32, tl.gather(now, pair & 31, 0), tl.gather(then, pair & 31, 0))
    word = two << (16 - (place & 1) * 16).to(tl.uint32)  # in the upper half: one funnel shift
    x = tl.where(empty, (y << 16) | (word >> 16), tl.where(on, y, x))
    return x, _with(keys, key), at + popcount(lanes)


@triton.jit
def _decode_tile(
    x, live, table, search, s4, s8, s12, stream, left, now, then, ahead, base, at, lane, bit
):  # fmt: skip
    """Eight steps; returns the states, the nibbles, and where the stream stands."""
    keys = _none()
    for j in tl.static_range(_STEPS):
        x, keys, at = _decode_step(x, lane < live - 32 * j, table, keys, now, then, at, bit)
        if j % 2 == 1:
            # Two steps take up to 64 words of the 65 or more that `now` and `then` have left. No
            # branch, which a lone warp would wait for, and which keeps steps apart: the same words
            # are loaded again, from L1, until a register is used up.
            used = at >= 64
            at -= tl.where(used, 64, 0)
            base += tl.where(used, 32, 0)
            now = tl.where(used, then, now)
            then = tl.where(used, ahead, then)
            ahead = load_words(stream, base + 64 + lane, left)
    nibbles = tl.zeros((32,), tl.uint32)
    for j in tl.static_range(_STEPS):
        nibbles = nibbles | (_symbol_of(keys[j], search, s4, s8, s12) << (4 * j))
    return x, nibbles, now, then, ahead, base, at


@triton.jit
def _symbol_of(key, search, s4, s8, s12):
    """The last symbol that begins by a slot: no state waits for it."""
    s = tl.where(key >= s4, 4, 0)
    s = tl.where(key >= s8, 8, s)
    s = tl.where(key >= s12, 12, s)
    t1 = tl.gather(search, s + 1, 0)
    t2 = tl.gather(search, s + 2, 0)
    t3 = tl.gather(search, s + 3, 0)
    s += (t1 <= key).to(tl.int32) + (t2 <= key).to(tl.int32) + (t3 <= key).to(tl.int32)
    return s.to(tl.uint32)


@triton.jit
def _decoding_table(f, lane):
    """(start of symbol i in lane i, shifted as slots are; starts and frequencies of all symbols in
    each lane, less 0xFFFF; the starts of symbols 4, 8 and 12)."""
    each = _starts(f, lane).to(tl.uint32) << 16
    both = each + (f - 0xFFFF).to(tl.uint32)
    symbol = tl.arange(0, 16)[:, None]
    table = tl.sum(tl.where(lane[None, :] == symbol, both[None, :], 0), 1).to(tl.uint32)
    s4 = tl.sum(tl.where(lane == 4, each, 0), 0).to(tl.uint32)
    s8 = tl.sum(tl.where(lane == 8, each, 0), 0).to(tl.uint32)
    s12 = tl.sum(tl.where(lane == 12, each, 0), 0).to(tl.uint32)
    return each, table, s4, s8, s12
