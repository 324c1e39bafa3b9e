"""Top-k by magnitude in one read of the values.

A sample brackets the key of the wanted rank. One read writes the bits above the bracket and
collects the candidates within it, each block's in order. Radix histograms of the candidates give
the exact key and how many of its ties are kept; counts a block place them, never the order of
atomics. If the bracket missed, the same histograms are taken of the values, by kernels that exit at
once otherwise, so that the host need not be asked. At most eight launches do work, of twelve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.mask import num_ranks, num_words
from fedmap_sparse.triton_kernels._bits import exclusive, load_words, popcount, raw

# Slots of the state, int64: the bracket's lowest and highest key, its first shift; counts above it
# and within; then what was found: the key, how many ties of it are kept, whether the bracket
# missed. Behind them, the sums that the scan carries into each tensor: survivors, ties.
_LOW, _TOP, _SHIFT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_ABOVE, _FOUND = tl.constexpr(3), tl.constexpr(4)
_KEY, _TIES, _MISSED = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
_SLOTS = 8

_SAMPLE_BITS = 13
_SAMPLE_BINS = tl.constexpr(1 << _SAMPLE_BITS)
# Radix levels of 11, 10 and 10 bits cover the 31 of a float32 key.
_BINS1, _BINS = tl.constexpr(2048), tl.constexpr(1024)
_HISTOGRAMS = 2048 + 1024 + 1024
_RUN = 32
# Of the kernels over blocks: with four, 127 to 168 registers a thread halved the occupancy.
_WARPS = 8
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


@triton.jit(do_not_specialize=["keep"], do_not_specialize_on_alignment=["within", "words", "keys"])
def _count(
    values, within, words, keys, offsets, counts, above, kept, ties, state, histograms, keep,
    capacity, n, num_words, blocks, first_block, KEY_BITS: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Survivors above the key, and ties with it, in each block."""
    missed = _missed(state, keep, capacity)
    found, _, wanted = _resolve(state, histograms, keep, missed, 3, KEY_BITS)
    if tl.program_id(0) == 0:
        tl.store(state + _KEY, found)
        tl.store(state + _TIES, wanted)
        tl.store(state + _MISSED, missed.to(tl.int64))
    exact = found.to(tl.int32)
    if missed:
        for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
            block = tl.zeros((), tl.int64) + i
            key, eligible = _load_block(values, within, block, n, num_words, KEY_BITS, False)
            over = _to_words(eligible & (key > exact))
            row = tl.arange(0, 64)
            tl.store(
                words + block * 64 + row,
                over.to(tl.int32, bitcast=True),
                mask=block * 64 + row < num_words,
            )
            equal = _to_words(eligible & (key == exact))
            tl.store(kept + first_block + block, tl.sum(popcount(over), 0))
            tl.store(ties + first_block + block, tl.sum(popcount(equal), 0).to(tl.int64))
    else:
        # ROWS blocks at a time: one after the other, each cost a chain of dependent loads.
        for i in range(tl.program_id(0) * ROWS, blocks, tl.num_programs(0) * ROWS):
            block = i + tl.arange(0, ROWS)
            slot, real = first_block + block, block < blocks
            start = tl.load(offsets + slot, mask=real, other=0)
            end = tl.load(counts + slot, mask=real, other=0)
            more = tl.zeros((ROWS,), tl.int32)
            equal_count = tl.zeros((ROWS,), tl.int32)
            for done in range(0, tl.max(end, 0), LANES):
                at = done + tl.arange(0, LANES)
                inside = at[None, :] < end[:, None]
                candidate = tl.load(keys + start[:, None] + at[None, :], mask=inside, other=0).to(
                    tl.int32
                )
                more += tl.sum(((candidate > exact) & inside).to(tl.int32), 1)
                equal_count += tl.sum(((candidate == exact) & inside).to(tl.int32), 1)
            over_counts = tl.load(above + slot, mask=real, other=0)
            tl.store(kept + slot, over_counts + more, mask=real)
            tl.store(ties + slot, equal_count.to(tl.int64), mask=real)


@triton.jit
def _place(state, carries, kept, ties, rank, blocks, first_block, CHUNK: tl.constexpr):
    """One program: the rank index, and how many ties lie before each block."""
    allowed = tl.load(state + _TIES)
    carry, tie_carry = tl.load(carries), tl.load(carries + 1)
    begin = carry + tl.minimum(tie_carry, allowed)
    tl.store(rank, tl.zeros((), tl.int64))
    for start in range(0, blocks, CHUNK):
        at = start + tl.arange(0, CHUNK)
        inside = at < blocks
        over = tl.load(kept + first_block + at, mask=inside, other=0).to(tl.int64)
        equal = tl.load(ties + first_block + at, mask=inside, other=0)
        ties_through = tie_carry + tl.cumsum(equal, 0)
        survivors = carry + tl.cumsum(over, 0) + tl.minimum(ties_through, allowed)
        tl.store(rank + 1 + at, survivors - begin, mask=inside)
        tl.store(ties + first_block + at, ties_through - equal, mask=inside)
        carry += tl.sum(over, 0)
        tie_carry += tl.sum(equal, 0)
    tl.store(carries + 2, carry)
    tl.store(carries + 3, tie_carry)


@triton.jit(do_not_specialize_on_alignment=["within", "words", "keys", "places"])
def _finish(
    values, within, words, keys, places, offsets, counts, ties, state, n, num_words, first_block,
    KEY_BITS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The candidates' bits: those above the key, and as many ties as are left for this block."""
    block = tl.program_id(0).to(tl.int64)
    exact = tl.load(state + _KEY).to(tl.int32)
    left = tl.load(state + _TIES) - tl.load(ties + first_block + block)
    if tl.load(state + _MISSED) != 0:
        if left > 0:
            key, eligible = _load_block(values, within, block, n, num_words, KEY_BITS, False)
            row, bit = tl.arange(0, 64), tl.arange(0, 32)
            equal = eligible & (key == exact)
            some = _to_words(equal)
            before = some[:, None] & ((1 << bit.to(tl.uint32)) - 1)[None, :]
            number = exclusive(popcount(some))[:, None] + popcount(before)
            chosen = _to_words(equal & (number < left)).to(tl.int32, bitcast=True)
            at = block * 64 + row
            old = tl.load(words + at, mask=at < num_words, other=0)
            tl.store(words + at, old | chosen, mask=at < num_words)
    else:
        start = tl.load(offsets + first_block + block)
        end = tl.load(counts + first_block + block)
        for done in range(0, end, LANES):
            at = done + tl.arange(0, LANES)
            inside = at < end
            key = tl.load(keys + start + at, mask=inside, other=0).to(tl.int32)
            place = tl.load(places + start + at, mask=inside, other=0).to(tl.int32)
            equal = ((key == exact) & inside).to(tl.int32)
            chosen = (key > exact) | ((equal != 0) & (exclusive(equal) < left))
            left -= tl.sum(equal, 0)
            tl.atomic_or(
                words + block * 64 + (place >> 5),
                (1 << (place & 31).to(tl.uint32)).to(tl.int32, bitcast=True),
                mask=chosen & inside,
                sem="relaxed",
            )


@triton.jit(do_not_specialize=["keep"])
def _threshold(state, histograms, out, keep, capacity, KEY_BITS: tl.constexpr):
    missed = _missed(state, keep, capacity)
    found, _, _ = _resolve(state, histograms, keep, missed, 3, KEY_BITS)
    tl.store(out, found.to(out.dtype.element_ty))


@triton.jit(do_not_specialize_on_alignment=["values", "before", "after"])
def _zero_pruned(values, before, after, n, num_words, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word, bit = at >> 5, (at & 31).to(tl.uint32)
    gone = load_words(after, word, num_words) ^ 0xFFFFFFFF
    if before is not None:
        gone = gone & load_words(before, word, num_words)
    tl.store(values + at, 0, mask=(((gone >> bit) & 1) != 0) & (at < n))


@dataclass
class _Search:
    """The buffers of one selection, and the launches up to the exact key."""

    values: list[Tensor]
    within: list[Tensor | None]
    eligible: int
    keep: int

    def __post_init__(self) -> None:
        first = self.values[0]
        self.key_bits = 31 if first.dtype == torch.float32 else 15
        self.raws = [raw(v) for v in self.values]
        self.blocks = [num_ranks(v.numel()) - 1 for v in self.values]
        self.total = sum(v.numel() for v in self.values)
        self.capacity = max(self.total // 16, min(self.total, 65536))
        sizes = [1 << _SAMPLE_BITS, 2 * _HISTOGRAMS, 2 * _SLOTS, 4 * (len(self.values) + 1)]
        scratch = torch.zeros(sum(sizes), dtype=torch.int32, device=first.device)
        self.sample, self.histograms, state, carries = scratch.split(sizes)
        self.state, self.carries = state.view(torch.int64), carries.view(torch.int64)
        self.keys = torch.empty(self.capacity, dtype=self.raws[0].dtype, device=first.device)
        self.places = torch.empty(self.capacity, dtype=torch.int16, device=first.device)
        every = sum(self.blocks)
        self.offsets = torch.empty(every, dtype=torch.int64, device=first.device)
        self.counts = torch.empty(every, dtype=torch.int32, device=first.device)
        self.above = torch.empty_like(self.counts)
        # Enough programs for any device; each repeats the choice of bins.
        self.programs = max(1, min(256, self.total // 65536))

    def find(self, words: list[Tensor] | None) -> None:
        """Launch what leads to the key; with `words`, write the bits above the bracket."""
        bits = self.key_bits
        # A sixty-fourth, within limits: 4 to 2% of the input become candidates.
        wanted = min(self.total, max(16384, min(65536, self.total // 64)))
        for value, within in zip(self.raws, self.within, strict=True):
            size = num_words(value.numel())
            runs = max(1, min(size, wanted * value.numel() // self.total // _RUN)) if size else 0
            if runs:
                _sample[(triton.cdiv(runs, 32),)](
                    value, within, self.sample, size, size // runs, runs, KEY_BITS=bits, RUNS=32
                )  # fmt: skip
        _bracket[(1,)](
            self.state, self.sample, self.keep, self.eligible, KEY_BITS=bits, num_warps=16
        )
        base = 0
        for i, (value, within) in enumerate(zip(self.raws, self.within, strict=True)):
            if self.blocks[i]:
                _read[(self.blocks[i],)](
                    value, within, None if words is None else words[i], self.keys, self.places,
                    self.offsets, self.counts, self.above, self.state, self.histograms,
                    value.numel(), num_words(value.numel()), base, self.capacity, KEY_BITS=bits,
                    num_warps=_WARPS,
                )  # fmt: skip
            base += self.blocks[i]
        for level in (2, 3) if bits == 31 else (2,):
            _refine[(self.programs,)](
                self.state, self.histograms, self.keys, self.keep, self.capacity, LEVEL=level,
                KEY_BITS=bits, LANES=1024, num_warps=_WARPS,
            )  # fmt: skip
        for level in (1, 2, 3) if bits == 31 else (1, 2):
            for i, (value, within) in enumerate(zip(self.raws, self.within, strict=True)):
                if self.blocks[i]:
                    _refine_values[(min(self.blocks[i], 1024),)](
                        value, within, self.state, self.histograms, self.keep, self.capacity,
                        value.numel(), num_words(value.numel()), self.blocks[i], LEVEL=level,
                        KEY_BITS=bits, num_warps=_WARPS,
                    )  # fmt: skip

    def mask(self) -> list[Tensor]:
        """Words of every tensor, then rank indices of every tensor."""
        device, bits = self.state.device, self.key_bits
        words = [
            torch.empty(num_words(v.numel()), dtype=torch.int32, device=device) for v in self.values
        ]
        ranks = [torch.empty(b + 1, dtype=torch.int64, device=device) for b in self.blocks]
        self.find(words)
        ties, kept = torch.empty_like(self.offsets), torch.empty_like(self.counts)
        base = 0
        # Counted and placed tensor after tensor, as ties are kept; finished when all are placed.
        for i, (value, within) in enumerate(zip(self.raws, self.within, strict=True)):
            blocks, size = self.blocks[i], num_words(value.numel())
            if blocks:
                _count[(min(triton.cdiv(blocks, 16), 512),)](
                    value, within, words[i], self.keys, self.offsets, self.counts, self.above,
                    kept, ties, self.state, self.histograms, self.keep, self.capacity,
                    value.numel(), size, blocks, base, KEY_BITS=bits, ROWS=16, LANES=128,
                    num_warps=_WARPS,
                )  # fmt: skip
            _place[(1,)](
                self.state, self.carries[2 * i :], kept, ties, ranks[i], blocks, base,
                CHUNK=4096, num_warps=16,
            )  # fmt: skip
            if blocks:
                _finish[(blocks,)](
                    value, within, words[i], self.keys, self.places, self.offsets, self.counts,
                    ties, self.state, value.numel(), size, base, KEY_BITS=bits, LANES=128,
                )  # fmt: skip
            base += blocks
        return words + ranks

    def threshold(self) -> Tensor:
        self.find(None)
        out = torch.empty((), dtype=self.values[0].dtype, device=self.state.device)
        _threshold[(1,)](
            self.state, self.histograms, raw(out), self.keep, self.capacity, KEY_BITS=self.key_bits
        )
        return out


def magnitude_mask(
    values: list[Tensor], within: list[Tensor | None], eligible: int, keep: int
) -> list[Tensor]:
    """Words of each tensor's mask, then their rank indices; no synchronisation with the host."""
    if keep == 0:
        words = [v.new_zeros(num_words(v.numel()), dtype=torch.int32) for v in values]
        return words + [v.new_zeros(num_ranks(v.numel()), dtype=torch.int64) for v in values]
    return _Search(values, within, eligible, keep).mask()


def magnitude_threshold(
    values: list[Tensor], within: list[Tensor | None], eligible: int, keep: int
) -> Tensor:
    """The keep-th largest |x|, 0-d."""
    return _Search(values, within, eligible, keep).threshold()


def zero_pruned_(values: Tensor, before: Tensor | None, after: Tensor) -> None:
    """+0.0 where `before` (None: everywhere) has a bit and `after` has none."""
    if values.numel():
        _zero_pruned[(triton.cdiv(values.numel(), 1024),)](
            raw(values), before, after, values.numel(), after.numel(), BLOCK=1024
        )
