"""Top-k by magnitude in one read of the values.

A sample brackets the key of the wanted rank. One read writes the bits above the bracket, collects
the candidates within it, each block's in order, and counts them in a radix histogram. Histograms of
the candidates give the exact key and how many of its ties are kept; counts a block place them,
never the order of atomics. If the bracket missed, the histograms are taken of the values, by
kernels that exit at once otherwise, so that the host need not be asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.mask import num_ranks, num_words
from fedmap_sparse.triton_kernels import _tuning
from fedmap_sparse.triton_kernels._bits import exclusive, load_words, popcount, raw
from fedmap_sparse.triton_kernels._launch import cdiv, launch, next_power_of_2
from fedmap_sparse.triton_kernels._scan import spread, sum_before
from fedmap_sparse.triton_kernels._search import (
    _ALL_TIES,
    _LOW,
    _MISSED,
    _WANTED,
    BINS,
    SAMPLE_BINS,
    SLOTS,
    _decide,
    _load_block,
    _read,
    _refine,
    _sample,
    _to_words,
)

_RUN = 32
# Of the kernels over all values: with four, 127 to 168 registers a thread halved the occupancy.
_WARPS = 8


@triton.jit(
    do_not_specialize=["num_words", "first_block"],
    do_not_specialize_on_alignment=["within", "words", "keys", "places"],
)
def _settle(
    values, within, words, keys, places, offsets, counts, above, kept, ties, state, n, num_words,
    first_block, KEY_BITS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The bits of a block's survivors and of every tie, and how many there are of each."""
    block = tl.program_id(0).to(tl.int64)
    slot = first_block + block
    exact = tl.load(state + _LOW).to(tl.int32)
    if tl.load(state + _MISSED) != 0:
        key, eligible = _load_block(values, within, block, n, num_words, KEY_BITS)
        over, equal = _to_words(eligible & (key > exact)), _to_words(eligible & (key == exact))
        at = block * 64 + tl.arange(0, 64)
        tl.store(words + at, (over | equal).to(tl.int32, bitcast=True), mask=at < num_words)
        tl.store(kept + slot, tl.sum(popcount(over), 0))
        tl.store(ties + slot, tl.sum(popcount(equal), 0))
    else:
        start, end = tl.load(offsets + slot), tl.load(counts + slot)
        more = tl.zeros((LANES,), tl.int32)
        same = tl.zeros((LANES,), tl.int32)
        for done in range(0, end, LANES):
            at = done + tl.arange(0, LANES)
            inside = at < end
            key = tl.load(keys + start + at, mask=inside, other=0).to(tl.int32)
            place = tl.load(places + start + at, mask=inside, other=0).to(tl.int32)
            tl.atomic_or(
                words + block * 64 + (place >> 5),
                (1 << (place & 31).to(tl.uint32)).to(tl.int32, bitcast=True),
                mask=inside & (key >= exact),
                sem="relaxed",
            )
            more += (inside & (key > exact)).to(tl.int32)
            same += (inside & (key == exact)).to(tl.int32)
        tl.store(kept + slot, tl.load(above + slot) + tl.sum(more, 0))
        tl.store(ties + slot, tl.sum(same, 0))


@triton.jit(do_not_specialize=["blocks", "first_block", "span"])
def _place(state, kept, ties, ties_before, rank, blocks, first_block, span, CHUNK: tl.constexpr):
    """The rank index, and how many ties lie before each block, over `span` blocks a program."""
    begin = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(begin + span, blocks)
    allowed = tl.load(state + _WANTED)
    earlier = sum_before(ties, first_block, CHUNK)  # in the tensors before this one
    tie_carry = earlier + sum_before(ties + first_block, begin, CHUNK)
    carry = sum_before(kept + first_block, begin, CHUNK) - tl.minimum(earlier, allowed)
    if tl.program_id(0) == 0:
        tl.store(rank, tl.zeros((), tl.int64))
    for start in range(begin, end, CHUNK):
        at = start + tl.arange(0, CHUNK)
        inside = at < end
        over = tl.load(kept + first_block + at, mask=inside, other=0).to(tl.int64)
        equal = tl.load(ties + first_block + at, mask=inside, other=0).to(tl.int64)
        through = tie_carry + tl.cumsum(equal, 0)
        survivors = carry + tl.cumsum(over, 0) + tl.minimum(through, allowed)
        tl.store(rank + 1 + at, survivors, mask=inside)
        tl.store(ties_before + first_block + at, through - equal, mask=inside)
        carry += tl.sum(over, 0)
        tie_carry += tl.sum(equal, 0)
    if end == blocks:
        tl.store(state + _ALL_TIES, tie_carry)


@triton.jit(
    do_not_specialize=["num_words", "blocks", "first_block"],
    do_not_specialize_on_alignment=["within", "words", "keys", "places"],
)
def _trim(
    values, within, words, keys, places, offsets, counts, ties, ties_before, state, n, num_words,
    blocks, first_block, KEY_BITS: tl.constexpr, LANES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Clears the bits of ties that come too late to be kept, if there are any."""
    allowed = tl.load(state + _WANTED)
    if tl.load(state + _ALL_TIES) == allowed:
        return
    exact = tl.load(state + _LOW).to(tl.int32)
    missed = tl.load(state + _MISSED) != 0
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    for block in range(first, tl.minimum(first + BLOCKS, blocks)):
        left = allowed - tl.load(ties_before + first_block + block)
        if tl.load(ties + first_block + block) > tl.maximum(left, 0):
            if missed:
                key, eligible = _load_block(values, within, block, n, num_words, KEY_BITS)
                equal = eligible & (key == exact)
                some = _to_words(equal)
                bit = tl.arange(0, 32).to(tl.uint32)
                before = some[:, None] & ((1 << bit) - 1)[None, :]
                number = exclusive(popcount(some))[:, None] + popcount(before)
                late = _to_words(equal & (number >= left)).to(tl.int32, bitcast=True)
                at = block * 64 + tl.arange(0, 64)
                old = tl.load(words + at, mask=at < num_words, other=0)
                tl.store(words + at, old & (late ^ -1), mask=at < num_words)
            else:
                start = tl.load(offsets + first_block + block)
                end = tl.load(counts + first_block + block)
                for done in range(0, end, LANES):
                    at = done + tl.arange(0, LANES)
                    inside = at < end
                    key = tl.load(keys + start + at, mask=inside, other=0).to(tl.int32)
                    place = tl.load(places + start + at, mask=inside, other=0).to(tl.int32)
                    equal = ((key == exact) & inside).to(tl.int32)
                    tl.atomic_and(
                        words + block * 64 + (place >> 5),
                        (1 << (place & 31).to(tl.uint32)).to(tl.int32, bitcast=True) ^ -1,
                        mask=(equal != 0) & (exclusive(equal) >= left),
                        sem="relaxed",
                    )
                    left -= tl.sum(equal, 0)


@triton.jit(
    do_not_specialize=["n", "num_words"],
    do_not_specialize_on_alignment=["values", "before", "after"],
)
def _zero_pruned(values, before, after, n, num_words, WORDS: tl.constexpr):
    """A program reads its words once, then gathers them: loaded by each element's thread, they were
    asked for eight times over."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    gone = load_words(after, word, num_words) ^ 0xFFFFFFFF
    if before is not None:
        gone = gone & load_words(before, word, num_words)
    lane = tl.arange(0, WORDS * 32)
    at = tl.program_id(0).to(tl.int64) * (WORDS * 32) + lane
    pruned = ((tl.gather(gone, lane >> 5, 0) >> (lane & 31).to(tl.uint32)) & 1) != 0
    tl.store(values + at, 0, mask=pruned & (at < n))


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
        self.words = [num_words(v.numel()) for v in self.values]
        self.blocks = [num_ranks(v.numel()) - 1 for v in self.values]
        self.first_blocks = [sum(self.blocks[:i]) for i in range(len(self.blocks))]
        self.total = sum(v.numel() for v in self.values)
        self.capacity = max(self.total // 16, min(self.total, 65536))
        # Of the histograms: more for more values, whose counts collide where keys are few. On an
        # H100 26 M bfloat16 values took 332 us to read with one copy, 50 with 32.
        self.copies = min(_tuning.HISTOGRAMS, next_power_of_2(max(1, self.total >> 20)))
        self.samples = _tuning.SAMPLE_COPIES if self.total > 1 << 22 else 1
        sizes = [self.samples * SAMPLE_BINS, self.copies * BINS, 2 * SLOTS]
        scratch = torch.zeros(sum(sizes), dtype=torch.int32, device=first.device)
        self.sample, self.histogram, state = scratch.split(sizes)
        self.state = state.view(torch.int64)
        self.keys = torch.empty(self.capacity, dtype=self.raws[0].dtype, device=first.device)
        self.places = torch.empty(self.capacity, dtype=torch.int16, device=first.device)
        every = sum(self.blocks)
        self.offsets = torch.empty(every, dtype=torch.int64, device=first.device)
        self.counts = torch.empty(every, dtype=torch.int32, device=first.device)
        self.above = torch.empty_like(self.counts)
        #: What is not empty: the index of a tensor, its values, its mask.
        self.parts = [
            (i, value, within)
            for i, (value, within) in enumerate(zip(self.raws, self.within, strict=True))
            if value.numel()
        ]

    def find(self, words: list[Tensor] | None) -> None:
        """Launch what leads to the key; with `words`, write the bits above the bracket."""
        bits, final = self.key_bits, self.parts[-1][0]
        # A sixty-fourth, within limits: 4 to 2% of the input become candidates.
        wanted = min(self.total, max(16384, self.total // 64), _tuning.SAMPLES)
        for i, value, within in self.parts:
            runs = max(1, min(self.words[i], wanted * value.numel() // self.total // _RUN))
            launch(
                _sample, (cdiv(runs, 8),),
                value, within, self.state, self.sample, self.words[i], runs, self.keep,
                self.eligible, int(i == final), KEY_BITS=bits, RUNS=8, COPIES=self.samples,
                num_warps=_WARPS,
            )  # fmt: skip
        for i, value, within in self.parts:
            launch(
                _read, (self.blocks[i],),
                value, within, None if words is None else words[i], self.keys, self.places,
                self.offsets, self.counts, self.above, self.state, self.histogram, self.copies,
                value.numel(), self.words[i], self.first_blocks[i], self.capacity, KEY_BITS=bits,
                num_warps=1, maxnreg=_tuning.READ_REGISTERS,
            )  # fmt: skip
        launch(
            _decide, (1,),
            self.state, self.histogram, self.copies, self.keep, self.capacity, KEY_BITS=bits,
            ROWS=_tuning.DECIDE_ROWS, num_warps=_tuning.DECIDE_WARPS,
        )  # fmt: skip
        # 11 bits per level. The candidates' first was in the read; if the bracket missed, there are
        # three over all values.
        for number in (1, 2, 3) if bits == 31 else (1, 2):
            for i, value, within in self.parts:
                launch(
                    _refine, (self.refiners(i),),
                    value, within, self.keys, self.state, self.histogram, self.copies,
                    value.numel(), self.words[i], self.blocks[i], int(i == final), KEY_BITS=bits,
                    LAUNCH=number, LANES=_tuning.REFINE_LANES, ROWS=_tuning.REFINE_ROWS,
                    num_warps=_WARPS,
                )  # fmt: skip

    def refiners(self, i: int) -> int:
        """Programs that refine the key: of blocks if the bracket missed, else of candidates."""
        return max(1, min(self.blocks[i], _tuning.REFINE_PROGRAMS))

    def mask(self) -> list[Tensor]:
        """Words of every tensor, then rank indices of every tensor."""
        device, bits = self.state.device, self.key_bits
        words = [torch.empty(w, dtype=torch.int32, device=device) for w in self.words]
        ranks = [torch.empty(b + 1, dtype=torch.int64, device=device) for b in self.blocks]
        self.find(words)
        kept, ties = torch.empty_like(self.counts), torch.empty_like(self.counts)
        before = torch.empty_like(self.offsets)
        for i, value, within in self.parts:
            launch(
                _settle, (self.blocks[i],),
                value, within, words[i], self.keys, self.places, self.offsets, self.counts,
                self.above, kept, ties, self.state, value.numel(), self.words[i],
                self.first_blocks[i], KEY_BITS=bits, LANES=_tuning.SETTLE_LANES, num_warps=1,
            )  # fmt: skip
        for i, rank in enumerate(ranks):
            programs, span, chunk = spread(self.blocks[i])
            launch(
                _place, (programs,),
                self.state, kept, ties, before, rank, self.blocks[i], self.first_blocks[i], span,
                CHUNK=chunk, num_warps=_WARPS,
            )  # fmt: skip
        for i, value, within in self.parts:
            launch(
                _trim, (cdiv(self.blocks[i], _tuning.TRIM_BLOCKS),),
                value, within, words[i], self.keys, self.places, self.offsets, self.counts, ties,
                before, self.state, value.numel(), self.words[i], self.blocks[i],
                self.first_blocks[i], KEY_BITS=bits, LANES=_tuning.SETTLE_LANES,
                BLOCKS=_tuning.TRIM_BLOCKS, num_warps=1,
            )  # fmt: skip
        return words + ranks

    def threshold(self) -> Tensor:
        self.find(None)
        key: Tensor = self.state[_LOW.value].to(self.raws[0].dtype)
        return key.view(self.values[0].dtype)


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
        launch(
            _zero_pruned, (cdiv(after.numel(), 64),),
            raw(values), before, after, values.numel(), after.numel(), WORDS=64,
        )  # fmt: skip
