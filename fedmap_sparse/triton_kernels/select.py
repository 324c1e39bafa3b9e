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
from fedmap_sparse.triton_kernels._search import (
    _KEY,
    _MISSED,
    _TIES,
    _bracket,
    _load_block,
    _missed,
    _read,
    _refine,
    _refine_values,
    _resolve,
    _sample,
    _to_words,
)

# Of the scratch: int64 slots of the state, bins of the sample, bins of one set of histograms.
_SLOTS = 8
_SAMPLE = 8192
_HISTOGRAMS = 2048 + 1024 + 1024
_RUN = 32
# Of the kernels over blocks: with four, 127 to 168 registers a thread halved the occupancy.
_WARPS = 8


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
        sizes = [_SAMPLE, 2 * _HISTOGRAMS, 2 * _SLOTS, 4 * (len(self.values) + 1)]
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
