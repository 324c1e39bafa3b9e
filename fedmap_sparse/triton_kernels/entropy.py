"""rANS on the device: one warp a chunk, a lane a state. docs/format.md, 4.1 and 5, has the bytes.

What limits it is latency. A chunk is a chain of steps, each waiting for the one before, and a mask
of 26 M weights is 50 chunks of 4096 steps at density 0.1 (13 of 16384 at 0.01), its survivors 80
chunks of 1024: fewer warps than a large device has multiprocessors. So a step is kept short. The
words that lanes take or put are placed by a ballot (a sum of distinct bits: one REDUX on sm_80 and
later) and its popcounts; a symbol is found by three comparisons and four shuffles side by side, not
by four halvings one after another; words come from registers, 64 in each, the next on their way;
nibbles of eight steps are read, transposed and written together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.triton_kernels._bits import exclusive, load_words, popcount

LANES = 32
#: Columns of a row of a mask's plan: first step, first bit, bits, filling, then 16 frequencies.
ROW = 20
#: Values a chunk.
CHUNK = 1 << 15
_WORDS = 1024  # that a program copies at once

_STEPS = tl.constexpr(8)  # whose nibbles fill a register
_STEP_BITS = tl.constexpr(128)
_ROW = tl.constexpr(ROW)
_ENTRY = tl.constexpr(20)  # of the directory, in 16-bit words
_ESCAPE = tl.constexpr(15)


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


@triton.jit
def _run_of(plan, runs, step):
    """The last run that begins at or before `step`."""
    low = tl.zeros((), tl.int32)
    high = low + runs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(plan + middle * _ROW) <= step:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _inside(rest):
    """A mask of the bits below `rest`, of 32."""
    part = (1 << tl.minimum(tl.maximum(rest, 0), 31).to(tl.uint32)) - 1
    return tl.where(rest >= 32, 0xFFFFFFFF, part.to(tl.uint32))


@triton.jit
def _rest(numel, step):
    """Bits of a run from `step` on, as far as a tile cares."""
    return tl.minimum(tl.maximum(numel - step * _STEP_BITS, 0), 1 << 20).to(tl.int32)


@triton.jit
def _read(words, rest, by):
    """The two words that hold a run's next 32 bits, of which there are `rest`, from bit `by` on."""
    low = tl.load(words, mask=rest > 0, other=0)
    high = tl.load(words + 1, mask=(by > 0) & (rest > 32 - by.to(tl.int32)), other=0)
    return low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)


@triton.jit
def _encode_mask(words, plan, runs, steps, chunk, room, scratch, counts, directory, states):
    """Chunk by chunk, from its last step to its first, into the end of its room."""
    c = tl.program_id(0)
    lane = tl.arange(0, 32)
    bit = tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)
    place = 4 * (lane & 7) + (lane >> 3)  # the word whose nibbles _transpose brings here
    scratch += c.to(tl.int64) * room
    begin = c.to(tl.int64) * chunk
    cursor = tl.minimum(begin + chunk, steps)
    x = tl.full((32,), 1 << 15, tl.uint32)
    end = tl.zeros((), tl.int32) + room
    run = _run_of(plan, runs, cursor - 1)
    while cursor > begin:
        row = plan + run * _ROW
        first = tl.load(row)
        start = tl.load(row + 1)
        numel = tl.load(row + 2)
        fill = tl.load(row + 3).to(tl.uint32)
        f = tl.load(row + 4 + (lane & 15)).to(tl.int32)
        rate, reciprocal, shift = _encoding_table(f, lane)
        by = (start & 31).to(tl.uint32)
        lowest = tl.maximum(first, begin) - first
        tiles = ((cursor - first - lowest + _STEPS - 1) // _STEPS).to(tl.int32)
        # A step's lanes: those of the chunk's steps whose nibble is in the run.
        limit = tl.minimum((cursor - first) * 32, (numel + 3) // 4)
        step = lowest + (tiles - 1) * _STEPS
        rest = _rest(numel, step) - 32 * place
        at = ((start + step * _STEP_BITS) >> 5) + place
        low, high = _read(words + at, rest, by)
        for i in range(tiles):
            inside = _inside(rest)
            tile = (low >> by) | tl.where(by > 0, high << ((32 - by) & 31), 0)
            tile = (tile & inside) | (fill & (inside ^ 0xFFFFFFFF))
            live = tl.minimum(limit - step * 32, 1 << 20).to(tl.int32)
            # The next tile's words are on their way while this one's are coded.
            step -= _STEPS
            rest = tl.where(i + 1 < tiles, _rest(numel, step) - 32 * place, 0)
            at = ((start + step * _STEP_BITS) >> 5) + place
            low, high = _read(words + at, rest, by)
            nibbles = _transpose(tile, lane)
            for k in tl.static_range(_STEPS):
                j = _STEPS - 1 - k
                s = ((nibbles >> (4 * j)) & 15).to(tl.int32)
                on = lane < live - 32 * j
                x, end = _encode_step(x, end, s, on, rate, reciprocal, shift, bit, scratch)
        cursor = first + lowest
        run -= 1
    tl.store(states + c * 32 + lane, x.to(tl.int32, bitcast=True))
    tl.store(directory + c, room - end)
    tl.store(counts + 1 + c, (room - end).to(tl.int64))


@triton.jit
def _decode_mask(payload, pairs, states, offsets, plan, runs, steps, chunk, words, broken):
    """Chunk by chunk into words that are zero before; chunks and runs may share some."""
    c = tl.program_id(0)
    lane = tl.arange(0, 32)
    bit = tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)
    place = 4 * (lane & 7) + (lane >> 3)
    cursor = c.to(tl.int64) * chunk
    end = tl.minimum(cursor + chunk, steps)
    x = tl.load(payload + states + c * 32 + lane).to(tl.uint32, bitcast=True)
    begin = tl.load(offsets + c)
    stream, left, now, then, ahead, base, at = _open_stream(payload, begin, pairs, lane)
    wrong = tl.zeros((32,), tl.uint32)
    run = _run_of(plan, runs, cursor)
    while cursor < end:
        row = plan + run * _ROW
        first = tl.load(row)
        start = tl.load(row + 1)
        numel = tl.load(row + 2)
        fill = tl.load(row + 3).to(tl.uint32)
        f = tl.load(row + 4 + (lane & 15)).to(tl.int32)
        table, s4, s8, s12 = _decoding_table(f, lane)
        by = (start & 31).to(tl.uint32)
        highest = tl.minimum((numel + _STEP_BITS - 1) // _STEP_BITS, end - first)
        step = cursor - first
        tiles = ((highest - step + _STEPS - 1) // _STEPS).to(tl.int32)
        limit = tl.minimum(highest * 32, (numel + 3) // 4)
        for _ in range(tiles):
            live = tl.minimum(limit - step * 32, 1 << 20).to(tl.int32)
            nibbles = tl.zeros((32,), tl.uint32)
            for j in tl.static_range(_STEPS):
                on = lane < live - 32 * j
                x, s, now, then, ahead, base, at = _decode_step(
                    x, on, table, s4, s8, s12, stream, left, now, then, ahead, base, at, lane, bit
                )
                nibbles = nibbles | (tl.where(on, s, 0).to(tl.uint32) << (4 * j))
            tile = _transpose(nibbles, lane)
            rest = _rest(numel, step) - 32 * place
            inside = _inside(rest)
            beyond = (_inside((rest + 3) // 4 * 4) ^ inside) & (tile ^ fill)
            wrong = wrong | tl.where((rest > 0) & (8 * place < live), beyond, 0)
            tile = tile & inside
            to = ((start + step * _STEP_BITS) >> 5) + place
            low = (tile << by).to(tl.int32, bitcast=True)
            high = tl.where(by > 0, tile >> ((32 - by) & 31), 0).to(tl.int32, bitcast=True)
            tl.atomic_or(words + to, low, mask=low != 0, sem="relaxed")
            tl.atomic_or(words + to + 1, high, mask=high != 0, sem="relaxed")
            step += _STEPS
        cursor = first + highest
        run += 1
    taken = 2 * base + at - (begin & 1)
    sound = (x == (1 << 15)) & (wrong == 0) & (taken == tl.load(offsets + c + 1) - begin)
    tl.store(broken + c, tl.max(1 - sound.to(tl.int32), 0))


@triton.jit
def _fill(words, spans, BLOCK: tl.constexpr):
    """Ones from bit spans[r, 0] up to bit spans[r, 1]."""
    r = tl.program_id(1).to(tl.int64)
    first = tl.load(spans + 2 * r)
    last = tl.load(spans + 2 * r + 1)
    at = first // 32 + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    below = tl.minimum(tl.maximum(first - at * 32, 0), 32).to(tl.int32)
    upto = tl.minimum(tl.maximum(last - at * 32, 0), 32).to(tl.int32)
    ones = (_inside(upto) & (_inside(below) ^ 0xFFFFFFFF)).to(tl.int32, bitcast=True)
    tl.atomic_or(words + at, ones, mask=ones != 0, sem="relaxed")


@triton.jit
def _compact(scratch, room, offsets, escapes, out, base, limit, size, chunks, BLOCK: tl.constexpr):
    """The words of all chunks side by side, from word `base` of the payload on; and its size."""
    c = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + c)
    count = (tl.load(offsets + c + 1) - begin).to(tl.int32)
    source = scratch + (c + 1) * room - count
    for start in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        to = base + begin + i
        word = tl.load(source + i, mask=i < count, other=0)
        tl.store(out + to, word, mask=(i < count) & (to < limit))
    if (c == 0) & (tl.program_id(1) == 0):
        total = 2 * (base + tl.load(offsets + chunks))
        if escapes is not None:
            total = (total + 3) // 4 * 4 + (tl.load(escapes + chunks) + 3) // 4 * 4
        tl.store(size, total)


@triton.jit
def _bits_of(values, at, inside):
    return tl.load(values + at, mask=inside, other=0).to(tl.uint32)


@triton.jit
def _symbol(top, e):
    return tl.where((e <= top) & (e + _ESCAPE > top), top - e, _ESCAPE)


@triton.jit
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
):
    """A chunk's entry of the directory but for its words, its planes, and its symbols."""
    c = tl.program_id(0)
    begin = c.to(tl.int64) * CHUNK
    size = tl.minimum(n - begin, CHUNK).to(tl.int32)
    bins = tl.arange(0, 256)
    counts = tl.zeros((256,), tl.int32)
    blocks = (size + BLOCK - 1) // BLOCK
    for block in range(blocks):
        i = block * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        v = _bits_of(values, begin + i, inside)
        e = (v >> (LOW + HIGH - 1)) & ((1 << EXPONENT) - 1)
        counts += tl.histogram(e.to(tl.int32), 256)
        sign = v >> (LOW + HIGH + EXPONENT - 1)
        h = (sign << (HIGH - 1)) | ((v & ((1 << (LOW + HIGH - 1)) - 1)) >> LOW)
        if LOW > 0:
            tl.store(low + begin + i, v.to(low.dtype.element_ty), mask=inside)
        if HIGH == 8:
            tl.store(high + begin + i, h.to(tl.uint8), mask=inside)
        else:  # eight values make three bytes
            eights = tl.reshape(h, (BLOCK // 8, 8)) << (3 * tl.arange(0, 8)[None, :]).to(tl.uint32)
            group = tl.sum(eights, 1)
            k = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
            for byte in tl.static_range(3):
                at = 3 * k + byte
                part = (group >> (8 * byte)).to(tl.uint8)
                tl.store(high + 3 * (begin // 8) + at, part, mask=8 * at < 3 * size)
    counts -= tl.where(bins == 0, blocks * BLOCK - size, 0)  # lanes past the end
    through = tl.cumsum(counts, 0)
    earlier = tl.where(bins >= 15, tl.gather(through, tl.maximum(bins - 15, 0), 0), 0)
    top = 255 - (tl.max((through - earlier) * 256 + 255 - bins, 0) & 255)
    s = tl.arange(0, 16)
    known = tl.where((s < 15) & (s <= top), tl.gather(counts, tl.maximum(top - s, 0), 0), 0)
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
    tile = tl.arange(0, BLOCK // 256)[:, None, None]
    step = tl.arange(0, 8)[None, :, None]
    lane = tl.arange(0, 32)
    for block in range(blocks):
        i = block * BLOCK + 256 * tile + 32 * step + lane[None, None, :]
        v = _bits_of(values, begin + i, i < size)
        e = ((v >> (LOW + HIGH - 1)) & ((1 << EXPONENT) - 1)).to(tl.int32)
        eight = tl.sum(_symbol(top, e) << (4 * step), 1)
        to = block * (BLOCK // 256) + tl.arange(0, BLOCK // 256)[:, None]
        tl.store(nibbles + c.to(tl.int64) * (CHUNK // 8) + 32 * to + lane[None, :], eight)


@triton.jit
def _frequencies(directory, c, lane):
    return tl.load(directory + c * _ENTRY + 4 + (lane & 15)).to(tl.int32)


@triton.jit
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
        for k in tl.static_range(_STEPS):
            j = _STEPS - 1 - k
            s = ((eight >> (4 * j)) & 15).to(tl.int32)
            on = lane < live - 32 * j
            x, end = _encode_step(x, end, s, on, rate, reciprocal, shift, bit, scratch)
    tl.store(states + c * 32 + lane, x.to(tl.int32, bitcast=True))
    words = CHUNK - end
    tl.store(directory + c * _ENTRY, words.to(tl.uint16))
    tl.store(counts + 1 + c, words.to(tl.int64))


@triton.jit
def _escapes(
    values,
    n,
    directory,
    offsets,
    escapes,
    out,
    base,
    limit,
    chunks,
    CHUNK: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The exponents that have no symbol, behind the words."""
    c = tl.program_id(0).to(tl.int64)
    to = base + (2 * tl.load(offsets + chunks) + 3) // 4 * 4 + tl.load(escapes + c)
    values += c * CHUNK
    size = tl.minimum(n - c * CHUNK, CHUNK).to(tl.int32)
    top = tl.load(directory + c * _ENTRY + 2).to(tl.int32) & 255
    if tl.load(escapes + c + 1) > tl.load(escapes + c):
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            v = _bits_of(values, i, i < size)
            e = ((v >> MANTISSA) & ((1 << EXPONENT) - 1)).to(tl.int32)
            escaped = (i < size) & (_symbol(top, e) == _ESCAPE)
            flags = escaped.to(tl.int32)
            place = to + exclusive(flags)
            tl.store(out + place, e.to(tl.uint8), mask=escaped & (place < limit))
            to += tl.sum(flags, 0)


@triton.jit
def _decode_values(
    payload, directory, pairs, states, offsets, n, nibbles, broken, CHUNK: tl.constexpr
):
    """A chunk's symbols: 8 steps of a lane a register."""
    c = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    bit = tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)
    size = tl.minimum(n - c * CHUNK, CHUNK).to(tl.int32)
    table, s4, s8, s12 = _decoding_table(_frequencies(directory, c, lane), lane)
    x = tl.load(payload + states + c * 32 + lane).to(tl.uint32, bitcast=True)
    begin = tl.load(offsets + c)
    stream, left, now, then, ahead, base, at = _open_stream(payload, begin, pairs, lane)
    for tile in range((size + 255) // 256):
        symbols = tl.zeros((32,), tl.uint32)
        live = size - tile * 256
        for j in tl.static_range(_STEPS):
            on = lane < live - 32 * j
            x, s, now, then, ahead, base, at = _decode_step(
                x, on, table, s4, s8, s12, stream, left, now, then, ahead, base, at, lane, bit
            )
            symbols = symbols | (s.to(tl.uint32) << (4 * j))
        to = nibbles + c * (CHUNK // 8) + tile * 32 + lane
        tl.store(to, symbols.to(tl.int32, bitcast=True))
    taken = 2 * base + at - (begin & 1)
    sound = (x == (1 << 15)) & (taken == tl.load(offsets + c + 1) - begin)
    tl.store(broken + c, tl.max(1 - sound.to(tl.int32), 0))


@triton.jit
def _join(
    nibbles,
    directory,
    low,
    high,
    offsets,
    escapes,
    n,
    out,
    broken,
    CHUNK: tl.constexpr,
    EXPONENT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values from symbols, escapes and planes."""
    c = tl.program_id(0).to(tl.int64)
    begin = c * CHUNK
    size = tl.minimum(n - begin, CHUNK).to(tl.int32)
    top = tl.load(directory + c * _ENTRY + 2).to(tl.int32) & 255
    next_escape = tl.load(offsets + c)
    last_escape = tl.load(offsets + c + 1)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        eight = tl.load(nibbles + c * (CHUNK // 8) + (i >> 8) * 32 + (i & 31), mask=inside, other=0)
        s = (eight >> (((i >> 5) & 7) * 4)) & 15
        escaped = inside & (s == _ESCAPE)
        flags = escaped.to(tl.int32)
        at = next_escape + exclusive(flags)
        e = tl.load(escapes + at, mask=escaped & (at < last_escape), other=0).to(tl.int32)
        next_escape += tl.sum(flags, 0)
        impossible = (s > top) & (s != _ESCAPE)
        wrong = wrong | (inside & (impossible | (e >= (1 << EXPONENT)))).to(tl.int32)
        e = tl.where(escaped, e, top - s).to(tl.uint32)
        if HIGH == 8:
            h = tl.load(high + begin + i, mask=inside, other=0).to(tl.uint32)
        else:
            place = 3 * (begin // 8) + ((3 * i) >> 3)
            offset = (3 * i) & 7
            h = tl.load(high + place, mask=inside, other=0).to(tl.uint32)
            spill = tl.load(high + place + 1, mask=inside & (offset > 5), other=0).to(tl.uint32)
            h = ((h | (spill << 8)) >> offset.to(tl.uint32)) & 7
        v = ((h >> (HIGH - 1)) << (LOW + HIGH + EXPONENT - 1)) | (e << (LOW + HIGH - 1))
        v = v | ((h & ((1 << (HIGH - 1)) - 1)) << LOW)
        if LOW > 0:
            v = v | tl.load(low + begin + i, mask=inside, other=0).to(tl.uint32)
        tl.store(out + begin + i, v.to(out.dtype.element_ty), mask=inside)
    ragged = (next_escape != last_escape).to(tl.int32)
    tl.store(broken + c, tl.maximum(tl.max(wrong, 0), ragged))


@triton.jit
def _ranks_at(words, rank, positions, out):
    """Survivors before a position."""
    at = tl.load(positions + tl.program_id(0))
    block = at // 2048
    w = block * 64 + tl.arange(0, 64)
    bits = load_words(words, w, (at + 31) // 32)
    rest = tl.minimum(tl.maximum(at - w * 32, 0), 32).to(tl.int32)
    counts = popcount(bits & _inside(rest))
    tl.store(out + tl.program_id(0), tl.load(rank + block) + tl.sum(counts, 0).to(tl.int64))


def ranks_at(words: Tensor, rank: Tensor, positions: Tensor) -> Tensor:
    """Survivors before each of `positions`, all on the words' device."""
    out = torch.empty_like(positions)
    if out.numel():
        _ranks_at[(out.numel(),)](words, rank, positions, out, num_warps=1)
    return out


def _raw(t: Tensor) -> Tensor:
    return t.view(-1).view(torch.uint32 if t.dtype == torch.float32 else torch.uint16)


def _room(capacity: int, head: Tensor, device: torch.device) -> Tensor:
    """Zeros for a payload of `capacity` bytes that begins with `head`."""
    out = torch.zeros(-(-capacity // 4) * 4, dtype=torch.uint8, device=device)
    out[: head.numel()].copy_(head)
    return out


def encode_mask(
    words: Tensor, plan: Tensor, steps: int, chunk: int, head: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """(payload, its size, which is above `capacity` where the payload did not fit).

    Args:
        words: the bitmap.
        plan: int64[runs, ROW] on the words' device, one row for each coded run.
        steps: of all runs, at least 1.
        chunk: steps a chunk.
        head: uint8, the payload up to the directory. Head, directory and states fit.
    """
    device, chunks = words.device, triton.cdiv(steps, chunk)
    out = _room(capacity, head, device)
    room = LANES * min(chunk, steps)
    scratch = torch.empty(chunks * room, dtype=torch.int16, device=device).view(torch.uint16)
    counts = torch.zeros(chunks + 1, dtype=torch.int64, device=device)
    size = torch.empty(1, dtype=torch.int64, device=device)
    directory = out[head.numel() :].view(torch.int32)
    _encode_mask[(chunks,)](
        words,
        plan,
        plan.shape[0],
        steps,
        chunk,
        room,
        scratch,
        counts,
        directory,
        directory[chunks:],
        num_warps=1,
    )
    base = head.numel() // 2 + 2 * chunks + 2 * LANES * chunks
    _compact[(chunks, _shares(room))](
        scratch,
        room,
        counts.cumsum(0),
        None,
        out.view(torch.uint16),
        base,
        capacity // 2,
        size,
        chunks,
        BLOCK=_WORDS,
    )
    return out, size


def _shares(room: int) -> int:
    """Programs that copy a chunk's words; they are a quarter of its room or less."""
    return max(1, min(16, room // (8 * _WORDS)))


def decode_mask(
    payload: Tensor,
    states: int,
    offsets: Tensor,
    plan: Tensor,
    steps: int,
    chunk: int,
    spans: Tensor,
    num_words: int,
) -> tuple[Tensor, Tensor]:
    """(bitmap, whether each chunk is broken).

    Args:
        payload: a multiple of 4 bytes.
        states: where they are in it, a multiple of 4.
        offsets: int64[chunks + 1], where each chunk's words are, in words.
        plan, steps, chunk: as in `encode_mask`.
        spans: int64[runs, 2] on the CPU, begin and end of the runs that are all ones.
    """
    device = payload.device
    words = torch.zeros(num_words, dtype=torch.int32, device=device)
    chunks = offsets.numel() - 1
    broken = torch.zeros(chunks, dtype=torch.int32, device=device)
    if spans.numel():
        longest = int((spans[:, 1] - spans[:, 0]).max())
        grid = (triton.cdiv(longest, 32 * _WORDS) + 1, spans.shape[0])
        _fill[grid](words, spans.to(device), BLOCK=_WORDS)
    if chunks:
        _decode_mask[(chunks,)](
            payload.view(torch.int32),
            payload.numel() // 4,
            states // 4,
            offsets,
            plan,
            plan.shape[0],
            steps,
            chunk,
            words,
            broken,
            num_warps=1,
        )
    return words, broken


#: Bits of the exponent, of the low plane and of the high plane; the low plane's integers.
_SPLIT = {
    torch.float32: (8, 16, 8, torch.uint16),
    torch.float16: (5, 8, 3, torch.uint8),
    torch.bfloat16: (8, 0, 8, torch.uint8),
}


def encode_values(values: Tensor, parts: tuple[int, ...], capacity: int) -> tuple[Tensor, Tensor]:
    """(payload, its size), as `encode_mask`.

    Args:
        parts: where states, low plane, high plane and words begin, each a multiple of 4.
    """
    device, n = values.device, values.numel()
    chunks = triton.cdiv(n, CHUNK)
    exponent, low_bits, high_bits, low_type = _SPLIT[values.dtype]
    states, low, high, base = parts
    out = torch.zeros(-(-capacity // 4) * 4, dtype=torch.uint8, device=device)
    scratch = torch.empty(chunks * CHUNK, dtype=torch.int16, device=device).view(torch.uint16)
    nibbles = torch.empty(chunks * CHUNK // 8, dtype=torch.int32, device=device)
    counts = torch.zeros(2, chunks + 1, dtype=torch.int64, device=device)
    size = torch.empty(1, dtype=torch.int64, device=device)
    bits, shorts, mantissa = _raw(values), out.view(torch.uint16), low_bits + high_bits - 1
    _describe[(chunks,)](
        bits,
        n,
        shorts,
        out[low:].view(low_type),
        out[high:],
        counts[1],
        nibbles,
        CHUNK=CHUNK,
        EXPONENT=exponent,
        LOW=low_bits,
        HIGH=high_bits,
        BLOCK=min(4096, CHUNK),
        num_warps=8,
    )
    _encode_values[(chunks,)](
        nibbles,
        n,
        shorts,
        out[states:].view(torch.int32),
        scratch,
        counts[0],
        CHUNK=CHUNK,
        num_warps=1,
    )
    words, escapes = counts.cumsum(1)
    _compact[(chunks, 4)](
        scratch,
        CHUNK,
        words,
        escapes,
        shorts,
        base // 2,
        capacity // 2,
        size,
        chunks,
        BLOCK=_WORDS,
    )
    _escapes[(chunks,)](
        bits,
        n,
        shorts,
        words,
        escapes,
        out,
        base,
        capacity,
        chunks,
        CHUNK=CHUNK,
        EXPONENT=exponent,
        MANTISSA=mantissa,
        BLOCK=2048,
    )
    return out, size


def decode_values(
    payload: Tensor, parts: tuple[int, ...], places: Tensor, numel: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(values, whether each chunk is broken, in two rows).

    Args:
        payload: a multiple of 4 bytes.
        parts: as in `encode_values`.
        places: int64[2, chunks + 1], where each chunk's words (in words) and escapes (in bytes)
            are.
    """
    chunks = places.shape[1] - 1
    exponent, low_bits, high_bits, low_type = _SPLIT[dtype]
    states, low, high, _ = parts
    out = torch.empty(numel, dtype=dtype, device=payload.device)
    nibbles = torch.empty(chunks * CHUNK // 8, dtype=torch.int32, device=payload.device)
    broken = torch.empty(2, chunks, dtype=torch.int32, device=payload.device)
    shorts = payload.view(torch.uint16)
    _decode_values[(chunks,)](
        payload.view(torch.int32),
        shorts,
        payload.numel() // 4,
        states // 4,
        places[0],
        numel,
        nibbles,
        broken[0],
        CHUNK=CHUNK,
        num_warps=1,
    )
    _join[(chunks,)](
        nibbles,
        shorts,
        payload[low:].view(low_type),
        payload[high:],
        places[1],
        payload,
        numel,
        _raw(out),
        broken[1],
        CHUNK=CHUNK,
        EXPONENT=exponent,
        LOW=low_bits,
        HIGH=high_bits,
        BLOCK=2048,
        num_warps=8,
    )
    return out, broken
