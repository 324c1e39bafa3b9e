"""What leads a selection to its key: sample, bracket, one read, radix histograms."""

from __future__ import annotations

import triton
import triton.language as tl

from fedmap_sparse.triton_kernels._bits import exclusive, load_words, popcount

# Slots of the state, int64: the bracket's lowest and highest key, its first shift; counts above it
# and within; then what was found: the key, how many ties of it are kept, whether the bracket
# missed. Behind them, the sums that the scan carries into each tensor: survivors, ties.
_LOW, _TOP, _SHIFT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_ABOVE, _FOUND = tl.constexpr(3), tl.constexpr(4)
_KEY, _TIES, _MISSED = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)

# Bins of the sample: the highest 13 bits of a key.
_SAMPLE_BINS = tl.constexpr(8192)
# Radix levels of 11, 10 and 10 bits cover the 31 of a float32 key.
_BINS1, _BINS = tl.constexpr(2048), tl.constexpr(1024)
# Standard deviations of the sampled rank to either side: a miss in 16 000 on unordered data.
_WIDTH = tl.constexpr(4.0)


@triton.jit
def _keys(bits, KEY_BITS: tl.constexpr):
    """|x| as an int32 whose order is that of magnitudes."""
    return bits.to(tl.int32) & ((1 << KEY_BITS) - 1)


@triton.jit
def _pick(histogram, wanted, BINS: tl.constexpr):
    """The bin that holds the `wanted`-th largest, and how many of it are wanted."""
    lane = tl.arange(0, BINS)
    counts = tl.load(histogram + lane).to(tl.int64)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    here = tl.max(tl.where(above + counts >= wanted, lane, 0), 0)
    return here, wanted - tl.sum(tl.where(lane > here, counts, 0), 0)


@triton.jit
def _missed(state, keep, capacity):
    """Whether the wanted key lies outside the bracket, or the candidates did not fit."""
    found = tl.load(state + _FOUND)
    wanted = keep - tl.load(state + _ABOVE)
    return (wanted <= 0) | (wanted > found) | (found > capacity)


@triton.jit
def _resolve(state, histograms, keep, missed, LEVELS: tl.constexpr, KEY_BITS: tl.constexpr):
    """After LEVELS histograms: lowest key still possible, its shift, how many are wanted from
    there. If the bracket missed, it is every key, and the second set of histograms speaks."""
    base = histograms + tl.where(missed, 4096, 0)
    low = tl.where(missed, 0, tl.load(state + _LOW))
    shift = tl.where(missed, KEY_BITS - 11, tl.load(state + _SHIFT))
    wanted = keep - tl.where(missed, 0, tl.load(state + _ABOVE))
    if LEVELS > 0:
        here, wanted = _pick(base, wanted, _BINS1)
        low += here.to(tl.int64) << shift
    if LEVELS > 1:
        if shift > 0:
            shift = tl.maximum(shift - 10, 0)
            here, wanted = _pick(base + 2048, wanted, _BINS)
            low += here.to(tl.int64) << shift
    if LEVELS > 2:
        if shift > 0:
            shift = tl.maximum(shift - 10, 0)
            here, wanted = _pick(base + 3072, wanted, _BINS)
            low += here.to(tl.int64) << shift
    return low, shift, wanted


@triton.jit(do_not_specialize=["spacing"], do_not_specialize_on_alignment=["values", "within"])
def _sample(
    values, within, sample, num_words, spacing, runs, KEY_BITS: tl.constexpr, RUNS: tl.constexpr
):
    """Runs of 32 elements (a word of the mask), one at a pseudo-random place of each stretch."""
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    mixed = (run.to(tl.uint32) * 0x9E3779B1) >> 8
    word = run.to(tl.int64) * spacing + (mixed % spacing.to(tl.uint32)).to(tl.int64)
    inside = (run < runs) & (word < num_words - 1)  # the last word may be short
    bit = tl.arange(0, 32)
    take = inside[:, None] & (bit[None, :] >= 0)
    if within is not None:
        w = tl.load(within + word, mask=inside, other=0)
        take = take & (((w[:, None] >> bit[None, :]) & 1) != 0)
    at = word[:, None] * 32 + bit[None, :]
    key = _keys(tl.load(values + at, mask=take, other=0), KEY_BITS)
    tl.atomic_add(sample + (key >> (KEY_BITS - 13)), 1, mask=take, sem="relaxed")


@triton.jit(do_not_specialize=["keep", "eligible"])
def _bracket(state, sample, keep, eligible, KEY_BITS: tl.constexpr):
    """One program: the keys between which the wanted one lies, in whole bins of the sample."""
    lane = tl.arange(0, _SAMPLE_BINS)
    counts = tl.load(sample + lane)
    total = tl.sum(counts, 0)
    at_or_above = total - tl.cumsum(counts, 0) + counts
    share = keep.to(tl.float32) / eligible.to(tl.float32)
    middle = share * total.to(tl.float32)
    spread = _WIDTH * tl.sqrt(middle * (1.0 - share)) + 1.0
    low = tl.max(tl.where(at_or_above.to(tl.float32) >= middle + spread, lane, 0), 0)
    high = tl.min(tl.where(at_or_above.to(tl.float32) <= middle - spread, lane, 8192), 0)
    high = tl.maximum(high, low + 1).to(tl.int64)
    keys = (high - low) << (KEY_BITS - 13)
    shift = tl.zeros((), tl.int64)
    while ((keys - 1) >> shift) >= 2048:
        shift += 1
    tl.store(state + _LOW, low.to(tl.int64) << (KEY_BITS - 13))
    tl.store(state + _TOP, (high << (KEY_BITS - 13)) - 1)
    tl.store(state + _SHIFT, shift)


@triton.jit
def _load_block(values, within, block, n, num_words, KEY_BITS: tl.constexpr, FULL: tl.constexpr):
    """The keys of a block as [64 words, 32 bits], and which are eligible."""
    row, bit = tl.arange(0, 64), tl.arange(0, 32)
    at = block * 2048 + row[:, None] * 32 + bit[None, :]
    if FULL:
        eligible = at >= 0
    else:
        eligible = at < n
    if within is not None:
        w = load_words(within, block * 64 + row, num_words)[:, None]
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
def _to_words(flags):
    """[64, 32] flags to 64 words."""
    bit = tl.arange(0, 32).to(tl.uint32)
    return tl.sum(flags.to(tl.uint32) << bit[None, :], 1)


@triton.jit
def _read_block(
    values, within, words, keys, places, offsets, counts, above, state, histograms, n, num_words,
    block, first_block, capacity, KEY_BITS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    low = tl.load(state + _LOW).to(tl.int32)
    top = tl.load(state + _TOP).to(tl.int32)
    shift = tl.load(state + _SHIFT).to(tl.int32)
    key, eligible = _load_block(values, within, block, n, num_words, KEY_BITS, FULL)
    row, bit = tl.arange(0, 64), tl.arange(0, 32)
    over = _to_words(eligible & (key > top))
    candidate = eligible & (key >= low) & (key <= top)
    some = _to_words(candidate)
    if words is not None:
        tl.store(
            words + block * 64 + row,
            over.to(tl.int32, bitcast=True),
            mask=block * 64 + row < num_words,
        )
    each = popcount(some)
    found = tl.sum(each, 0)
    over_count = tl.sum(popcount(over), 0)
    start = tl.atomic_add(state + _FOUND, found.to(tl.int64), sem="relaxed")
    tl.atomic_add(state + _ABOVE, over_count.to(tl.int64), sem="relaxed")
    tl.store(offsets + first_block + block, start)
    tl.store(counts + first_block + block, found)
    tl.store(above + first_block + block, over_count)
    before = some[:, None] & ((1 << bit.to(tl.uint32)) - 1)[None, :]
    place = start + exclusive(each)[:, None] + popcount(before)
    room = candidate & (place < capacity)
    tl.store(keys + place, key.to(keys.dtype.element_ty), mask=room)
    tl.store(places + place, (row[:, None] * 32 + bit[None, :]).to(tl.int16), mask=room)
    tl.atomic_add(histograms + ((key - low) >> shift), 1, mask=candidate, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["within", "words"])
def _read(
    values, within, words, keys, places, offsets, counts, above, state, histograms, n, num_words,
    first_block, capacity, KEY_BITS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    if (block + 1) * 2048 <= n:
        _read_block(
            values, within, words, keys, places, offsets, counts, above, state, histograms, n,
            num_words, block, first_block, capacity, KEY_BITS, True,
        )  # fmt: skip
    else:
        _read_block(
            values, within, words, keys, places, offsets, counts, above, state, histograms, n,
            num_words, block, first_block, capacity, KEY_BITS, False,
        )  # fmt: skip


@triton.jit
def _add_histogram(histogram, total, BINS: tl.constexpr):
    tl.atomic_add(histogram + tl.arange(0, BINS), total, mask=total > 0, sem="relaxed")


@triton.jit(do_not_specialize=["keep"], do_not_specialize_on_alignment=["keys"])
def _refine(
    state, histograms, keys, keep, capacity, LEVEL: tl.constexpr, KEY_BITS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Histogram LEVEL of the candidates, unless the level before was exact."""
    if _missed(state, keep, capacity):
        return
    low, shift, _ = _resolve(state, histograms, keep, False, LEVEL - 1, KEY_BITS)
    if shift == 0:
        return
    next_shift = tl.maximum(shift - 10, 0)
    found = tl.load(state + _FOUND)
    total = tl.zeros((_BINS,), tl.int32)
    for start in range(tl.program_id(0) * LANES, found, tl.num_programs(0) * LANES):
        at = start + tl.arange(0, LANES)
        key = tl.load(keys + at, mask=at < found, other=0).to(tl.int64)
        inside = (at < found) & (key >= low) & (((key - low) >> shift) == 0)
        bin = tl.where(inside, (key - low) >> next_shift, 0).to(tl.int32)
        total += tl.histogram(bin, _BINS, mask=inside)
    _add_histogram(histograms + 2048 + (LEVEL - 2) * 1024, total, _BINS)


@triton.jit(do_not_specialize=["keep"], do_not_specialize_on_alignment=["within"])
def _refine_values(
    values, within, state, histograms, keep, capacity, n, num_words, blocks, LEVEL: tl.constexpr,
    KEY_BITS: tl.constexpr,
):  # fmt: skip
    """Histogram LEVEL of all values, if the bracket missed."""
    if not _missed(state, keep, capacity):
        return
    low, shift, _ = _resolve(state, histograms, keep, True, LEVEL - 1, KEY_BITS)
    BINS: tl.constexpr = _BINS1 if LEVEL == 1 else _BINS
    next_shift = shift
    if LEVEL > 1:
        if shift == 0:
            return
        next_shift = tl.maximum(shift - 10, 0)
    total = tl.zeros((BINS,), tl.int32)
    for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
        block = tl.zeros((), tl.int64) + i
        key, eligible = _load_block(values, within, block, n, num_words, KEY_BITS, False)
        wide = key.to(tl.int64)
        if LEVEL > 1:
            eligible = eligible & (wide >= low) & (((wide - low) >> shift) == 0)
        bin = tl.where(eligible, (wide - low) >> next_shift, 0).to(tl.int32)
        total += tl.histogram(tl.reshape(bin, (2048,)), BINS, mask=tl.reshape(eligible, (2048,)))
    if LEVEL == 1:
        _add_histogram(histograms + 4096, total, BINS)
    else:
        _add_histogram(histograms + 4096 + 2048 + (LEVEL - 2) * 1024, total, BINS)
