"""The search for a selection's threshold: sample, bracket, one read, radix histograms.

A launch ends with its last program, which draws the conclusion that the next launch starts from:
each program takes a ticket when its atomics are done, and the last ticket sees them all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedmap_sparse.triton_kernels._bits import exclusive, load_words, popcount, survivor

# Slots of the state, int64. Of the bracket: its top key. Of what is known: the wanted key lies in
# [LOW, LOW + 2^SHIFT) and is the WANTED-th largest there. Counts of the read: keys above the
# bracket and within. Whether the bracket missed; if so, SHIFT holds _ASTRAY too, so that a
# refinement that has nothing to do ends after one load. Then a ticket of each launch, and the ties
# with the key, kept or not.
_TOP, _LOW, _SHIFT, _WANTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_ABOVE, _FOUND, _MISSED = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
_TICKETS, _ALL_TIES = tl.constexpr(7), tl.constexpr(15)
SLOTS = 16
_ASTRAY = tl.constexpr(64)

# Bins of the sample: the highest 13 bits of a key. Of the histograms: 11 bits a level.
SAMPLE_BINS, BINS = 8192, 2048
_SAMPLE_BINS, _BINS, _BITS = tl.constexpr(SAMPLE_BINS), tl.constexpr(BINS), tl.constexpr(11)
# Standard deviations of the sampled rank to either side: a miss in 16 000 on unordered data.
_WIDTH = tl.constexpr(4.0)
# A block with more candidates than this may hold one key over and over.
_CROWD = tl.constexpr(256)


@triton.jit
def _keys(bits, KEY_BITS: tl.constexpr):
    """|x| as an int32 whose order is that of magnitudes."""
    return bits.to(tl.int32) & ((1 << KEY_BITS) - 1)


@triton.jit
def _is_last(state, LAUNCH: tl.constexpr):
    """Whether every other program of this launch is done with its atomics."""
    tl.debug_barrier()
    ticket = tl.atomic_add(state + _TICKETS + LAUNCH, 1, sem="acq_rel")
    return ticket == tl.num_programs(0) - 1


@triton.jit
def _narrow(state, histogram, copies, low, wanted, shift, ROWS: tl.constexpr):
    """One program: from a histogram in bins of 2^shift keys from `low` on to the bin that holds the
    `wanted`-th largest. Leaves the histogram zero for the next one. Takes ROWS copies at a time:
    one by one, each load waits for the one before (on an H100 11 us for 16 copies)."""
    lane, row = tl.arange(0, _BINS), tl.arange(0, ROWS)
    counts = tl.zeros((_BINS,), tl.int64)
    for i in range(0, copies, ROWS):
        at = (i + row)[:, None] * _BINS + lane[None, :]
        inside = (i + row < copies)[:, None] & (lane >= 0)[None, :]
        some = tl.load(histogram + at, mask=inside, other=0)
        tl.store(histogram + at, tl.zeros((ROWS, _BINS), tl.int32), mask=inside)
        counts += tl.sum(some.to(tl.int64), 0)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    here = tl.max(tl.where(above + counts >= wanted, lane, 0), 0)
    tl.store(state + _LOW, low + (here.to(tl.int64) << shift))
    tl.store(state + _SHIFT, shift)
    tl.store(state + _WANTED, wanted - tl.sum(tl.where(lane > here, counts, 0), 0))


@triton.jit
def _add_least(histogram, bin, live):
    """Count what shares the least bin at once, as zeros often do; returns which are left."""
    least = tl.min(tl.where(live, bin, _BINS - 1), 0)
    common = (live & (bin == least)).to(tl.int32)
    count = tl.sum(common, 0)
    tl.atomic_add(histogram + least, count, mask=count > 0, sem="relaxed")
    return common == 0


@triton.jit(
    do_not_specialize=["num_words", "runs", "keep", "eligible", "last"],
    do_not_specialize_on_alignment=["within"],
)
def _sample(
    values, within, state, sample, num_words, runs, keep, eligible, last, KEY_BITS: tl.constexpr,
    RUNS: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Runs of 32 elements (a word of the mask), one at a pseudo-random place of each stretch; of
    the last tensor's launch the last program finds the keys between which the wanted one lies, in
    whole bins of the sample."""
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    begin = run.to(tl.int64) * num_words // runs
    room = (run + 1).to(tl.int64) * num_words // runs - begin
    mixed = ((run.to(tl.uint32) * 0x9E3779B1) >> 8).to(tl.int64)
    word = begin + mixed % tl.maximum(room, 1)
    inside = (run < runs) & (word < num_words - 1)  # the last word may be short
    bit = tl.arange(0, 32)
    take = inside[:, None] & (bit[None, :] >= 0)
    if within is not None:
        w = tl.load(within + word, mask=inside, other=0)
        take = take & (((w[:, None] >> bit[None, :]) & 1) != 0)
    at = word[:, None] * 32 + bit[None, :]
    key = _keys(tl.load(values + at, mask=take, other=0), KEY_BITS)
    mine = sample + (tl.program_id(0) % COPIES) * _SAMPLE_BINS
    tl.atomic_add(mine + (key >> (KEY_BITS - 13)), 1, mask=take, sem="relaxed")
    if _is_last(state, 0):
        if last != 0:
            _bracket(state, sample, keep, eligible, KEY_BITS, COPIES)
        else:
            tl.store(state + _TICKETS, tl.zeros((), tl.int64))


@triton.jit
def _bracket(state, sample, keep, eligible, KEY_BITS: tl.constexpr, COPIES: tl.constexpr):
    lane = tl.arange(0, _SAMPLE_BINS)
    counts = tl.load(sample + lane)
    for i in tl.static_range(1, COPIES):
        counts += tl.load(sample + i * _SAMPLE_BINS + lane)
    total = tl.sum(counts, 0)
    at_or_above = (total - tl.cumsum(counts, 0) + counts).to(tl.float32)
    share = keep.to(tl.float32) / eligible.to(tl.float32)
    middle = share * total.to(tl.float32)
    spread = _WIDTH * tl.sqrt(middle * (1.0 - share)) + 1.0
    low = tl.max(tl.where(at_or_above >= middle + spread, lane, 0), 0)
    high = tl.min(tl.where(at_or_above <= middle - spread, lane, _SAMPLE_BINS), 0)
    high = tl.maximum(high, low + 1).to(tl.int64)
    keys = (high - low) << (KEY_BITS - 13)
    shift = tl.zeros((), tl.int64)
    while ((keys - 1) >> shift) >= _BINS:
        shift += 1
    tl.store(state + _LOW, low.to(tl.int64) << (KEY_BITS - 13))
    tl.store(state + _TOP, (high << (KEY_BITS - 13)) - 1)
    tl.store(state + _SHIFT, shift)


@triton.jit
def _load_rows(
    values, within, first_word, n, num_words, KEY_BITS: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The keys of ROWS words of the mask as [ROWS, 32 bits], and which are eligible."""
    word, bit = first_word + tl.arange(0, ROWS), tl.arange(0, 32)
    at = word[:, None] * 32 + bit[None, :]
    if FULL:
        eligible = at >= 0
    else:
        eligible = at < n
    if within is not None:
        w = load_words(within, word, num_words)[:, None]
        eligible = eligible & (((w >> bit[None, :].to(tl.uint32)) & 1) != 0)
        if FULL:
            # Four elements a load, wherever one of the four is eligible.
            four = (w >> (bit & 28).to(tl.uint32)[None, :]) & 15
            wanted = tl.max_constancy(four != 0, [1, 4])
            bits = tl.load(values + at, mask=wanted, other=0)
        else:
            bits = tl.load(values + at, mask=eligible, other=0)
    elif FULL:
        bits = tl.load(values + at)
    else:
        bits = tl.load(values + at, mask=eligible, other=0)
    return _keys(bits, KEY_BITS), eligible


@triton.jit
def _load_block(values, within, block, n, num_words, KEY_BITS: tl.constexpr):
    return _load_rows(values, within, block * 64, n, num_words, KEY_BITS, False, 64)


@triton.jit
def _to_words(flags):
    """[64, 32] flags to 64 words."""
    bit = tl.arange(0, 32).to(tl.uint32)
    return tl.sum(flags.to(tl.uint32) << bit[None, :], 1)


@triton.jit
def _sort_out(
    values, within, words, first_word, low, top, n, num_words, KEY_BITS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Of half a block: writes the bits above the bracket; returns their count, and the words of
    the candidates. Of a whole one the keys took up to 200 registers a thread."""
    key, eligible = _load_rows(values, within, first_word, n, num_words, KEY_BITS, FULL, 32)
    over = _to_words(eligible & (key > top))
    if words is not None:
        row = first_word + tl.arange(0, 32)
        tl.store(words + row, over.to(tl.int32, bitcast=True), mask=row < num_words)
    some = _to_words(eligible & (key >= low) & (key <= top))
    return tl.sum(popcount(over), 0), some


@triton.jit
def _collect(
    values, keys, places, histogram, some, first, start, low, shift, crowded,
    KEY_BITS: tl.constexpr,
):  # fmt: skip
    """Half a block's candidates, in order, from `start` on; `first` is the half's first element
    within the block that `values` points to."""
    # One word per lane: as a result of a sum over rows each search would move it through all lanes.
    some = tl.gather(some, tl.arange(0, 32), 0)
    each = popcount(some)
    before, found = exclusive(each), tl.sum(each, 0)
    for begin in range(0, found, 32):
        j = begin + tl.arange(0, 32)
        live = j < found
        place = first + survivor(some, before, j, 32, 5)
        key = _keys(tl.load(values + place, mask=live, other=0), KEY_BITS)
        tl.store(keys + start + j, key.to(keys.dtype.element_ty), mask=live)
        tl.store(places + start + j, place.to(tl.int16), mask=live)
        bin = (key - low) >> shift
        if crowded:
            live = live & _add_least(histogram, bin, live)
        tl.atomic_add(histogram + bin, 1, mask=live, sem="relaxed")


@triton.jit
def _read_block(
    values, within, words, keys, places, offsets, counts, above, state, histogram, copies, n,
    num_words, block, first_block, capacity, KEY_BITS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    low = tl.load(state + _LOW).to(tl.int32)
    top = tl.load(state + _TOP).to(tl.int32)
    shift = tl.load(state + _SHIFT).to(tl.int32)
    word = block * 64
    over0, some0 = _sort_out(values, within, words, word, low, top, n, num_words, KEY_BITS, FULL)
    word += 32
    over1, some1 = _sort_out(values, within, words, word, low, top, n, num_words, KEY_BITS, FULL)
    found0 = tl.sum(popcount(some0), 0)
    found, over = found0 + tl.sum(popcount(some1), 0), over0 + over1
    start = tl.atomic_add(state + _FOUND, found.to(tl.int64), sem="relaxed")
    tl.atomic_add(state + _ABOVE, over.to(tl.int64), sem="relaxed")
    tl.store(offsets + first_block + block, start)
    tl.store(counts + first_block + block, found)
    tl.store(above + first_block + block, over)
    if start + found <= capacity:
        # A copy of the histogram for every so many programs: they would wait at a common key.
        mine = histogram + (tl.program_id(0) % copies) * _BINS
        crowded = found > _CROWD
        values += block * 2048
        _collect(values, keys, places, mine, some0, 0, start, low, shift, crowded, KEY_BITS)
        start += found0
        _collect(values, keys, places, mine, some1, 1024, start, low, shift, crowded, KEY_BITS)


@triton.jit(
    do_not_specialize=["copies", "num_words", "first_block", "capacity"],
    do_not_specialize_on_alignment=["within", "words"],
)
def _read(
    values, within, words, keys, places, offsets, counts, above, state, histogram, copies, n,
    num_words, first_block, capacity, KEY_BITS: tl.constexpr,
):  # fmt: skip
    """A block of 2048 a program, of one warp: nothing in it waits for other warps."""
    block = tl.program_id(0).to(tl.int64)
    if (block + 1) * 2048 <= n:
        _read_block(
            values, within, words, keys, places, offsets, counts, above, state, histogram, copies,
            n, num_words, block, first_block, capacity, KEY_BITS, True,
        )  # fmt: skip
    else:
        _read_block(
            values, within, words, keys, places, offsets, counts, above, state, histogram, copies,
            n, num_words, block, first_block, capacity, KEY_BITS, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["keep", "copies", "capacity"])
def _decide(state, histogram, copies, keep, capacity, KEY_BITS: tl.constexpr, ROWS: tl.constexpr):
    """One program: whether the bracket holds the wanted key, and the bin of the first histogram."""
    found = tl.load(state + _FOUND)
    wanted = keep - tl.load(state + _ABOVE)
    low, shift = tl.load(state + _LOW), tl.load(state + _SHIFT)
    missed = (wanted <= 0) | (wanted > found) | (found > capacity)
    tl.store(state + _MISSED, missed.to(tl.int64))
    _narrow(state, histogram, copies, low, wanted, shift, ROWS)
    if missed:  # then it may be any key
        tl.store(state + _LOW, tl.zeros((), tl.int64))
        tl.store(state + _SHIFT, tl.zeros((), tl.int64) + (KEY_BITS + _ASTRAY))
        tl.store(state + _WANTED, tl.zeros((), tl.int64) + keep)


@triton.jit
def _count(histogram, key, live, low, shift, finer):
    """In bins of 2^finer keys, what lies within 2^shift of `low`."""
    wide = key.to(tl.int64)
    inside = live & (wide >= low) & (((wide - low) >> shift) == 0)
    bin = ((wide - low) >> finer).to(tl.int32)
    apart = inside & _add_least(histogram, bin, inside)
    tl.atomic_add(histogram + bin, 1, mask=apart, sem="relaxed")


@triton.jit(
    do_not_specialize=["copies", "num_words", "blocks", "last"],
    do_not_specialize_on_alignment=["within", "keys"],
)
def _refine(
    values, within, keys, state, histogram, copies, n, num_words, blocks, last,
    KEY_BITS: tl.constexpr, LAUNCH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The next 11 bits of the wanted key, unless it is known: from the candidates, with the last
    tensor's launch, or from all values if the bracket missed."""
    known = tl.load(state + _SHIFT)
    shift, missed = known % _ASTRAY, known >= _ASTRAY
    if (shift == 0) | ((last == 0) & (missed == 0)):
        return
    low = tl.load(state + _LOW)
    finer = tl.maximum(shift - _BITS, 0)
    if missed == 0:
        copies = tl.minimum(copies, 2)  # a hundredth of the values seldom meet at a bin
    mine = histogram + (tl.program_id(0) % copies) * _BINS
    if missed:
        for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
            block = tl.zeros((), tl.int64) + i
            key, eligible = _load_block(values, within, block, n, num_words, KEY_BITS)
            key, eligible = tl.reshape(key, (2048,)), tl.reshape(eligible, (2048,))
            _count(mine, key, eligible, low, shift, finer)
    else:
        found = tl.load(state + _FOUND)
        for start in range(tl.program_id(0) * LANES, found, tl.num_programs(0) * LANES):
            at = start + tl.arange(0, LANES)
            key = tl.load(keys + at, mask=at < found, other=0)
            _count(mine, key, at < found, low, shift, finer)
    if _is_last(state, LAUNCH):
        if last != 0:
            _narrow(state, histogram, copies, low, tl.load(state + _WANTED), finer, ROWS)
            if missed:
                tl.store(state + _SHIFT, finer + _ASTRAY)
        else:
            tl.store(state + _TICKETS + LAUNCH, tl.zeros((), tl.int64))
