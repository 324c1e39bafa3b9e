"""Masks under rANS: nibbles of the bitmap, a density a tensor. docs/format.md, 4."""

from __future__ import annotations

import triton
import triton.language as tl

from fedmap_sparse.triton_kernels._rans import (
    _STEPS,
    _decode_tile,
    _decoding_table,
    _encode_tile,
    _encoding_table,
    _open_stream,
    _transpose,
)

#: Columns of a row of a mask's plan: first step, first bit, bits, filling, then 16 frequencies.
ROW = 20
_STEP_BITS = tl.constexpr(128)
_ROW = tl.constexpr(ROW)


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


@triton.jit(
    do_not_specialize=["runs", "steps", "chunk", "room"],
    do_not_specialize_on_alignment=["directory", "states"],
)
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
            x, end = _encode_tile(
                x, end, nibbles, live, lane, bit, rate, reciprocal, shift, scratch
            )
        cursor = first + lowest
        run -= 1
    tl.store(states + c * 32 + lane, x.to(tl.int32, bitcast=True))
    tl.store(directory + c, room - end)
    tl.store(counts + 1 + c, (room - end).to(tl.int64))


@triton.jit(do_not_specialize=["pairs", "states", "runs", "steps", "chunk"])
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
        each, table, s4, s8, s12 = _decoding_table(f, lane)
        by = (start & 31).to(tl.uint32)
        highest = tl.minimum((numel + _STEP_BITS - 1) // _STEP_BITS, end - first)
        step = cursor - first
        tiles = ((highest - step + _STEPS - 1) // _STEPS).to(tl.int32)
        limit = tl.minimum(highest * 32, (numel + 3) // 4)
        for _ in range(tiles):
            live = tl.minimum(limit - step * 32, 1 << 20).to(tl.int32)
            x, nibbles, now, then, ahead, base, at = _decode_tile(
                x, live, table, each, s4, s8, s12, stream, left, now, then, ahead, base, at, lane,
                bit,
            )  # fmt: skip
            tile = _transpose(nibbles & _inside(4 * ((live - lane + 31) >> 5)), lane)
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
