"""Survivors side by side, and back: one launch each way over the mask's rank index."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.triton_kernels import _tuning
from fedmap_sparse.triton_kernels._bits import (
    KINDS,
    convert,
    exclusive,
    load_words,
    popcount,
    raw,
    survivor,
)
from fedmap_sparse.triton_kernels._launch import cdiv, launch


@triton.jit(do_not_specialize=["num_words"], do_not_specialize_on_alignment=["words"])
def _pack(
    values,
    words,
    rank,
    out,
    num_words,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    FLAT: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
):
    """Lanes stand for survivors: each finds its element, so that a warp's reads lie side by side
    as nearly as the mask allows, and its writes exactly (a scatter from elements asked for twice
    the sectors at density 0.1)."""
    tile = tl.program_id(0).to(tl.int64)
    w = load_words(words, tile * WORDS + tl.arange(0, WORDS), num_words)
    counts = popcount(w)
    before = exclusive(counts)
    count = tl.sum(counts, 0)
    base = tl.load(rank + tile * (WORDS // 64))
    skew = (base & 15).to(tl.int32)  # writes start at a sector
    values += tile * (WORDS * 32)
    if (count == WORDS * 32) & (skew == 0):
        base = base // 16 * 16  # tells the compiler of the multiple
        for start in range(0, WORDS * 32, FLAT):
            at = start + tl.arange(0, FLAT)
            tl.store(out + base + at, convert(tl.load(values + at), FROM, TO))
    else:
        for start in range(-skew, count, LANES):
            j = start + tl.arange(0, LANES)
            live = (j >= 0) & (j < count)
            element = survivor(w, before, tl.maximum(j, 0), WORDS, STEPS)
            bits = tl.load(values + element, mask=live, other=0)
            tl.store(out + base + j, convert(bits, FROM, TO), mask=live)


@triton.jit
def _places(words, rank, tile, num_words, WORDS: tl.constexpr):
    """Of each element of WORDS words: whether it survives, and how many do before it, from the
    returned rank on."""
    w = load_words(words, tile * WORDS + tl.arange(0, WORDS), num_words)
    lane = tl.arange(0, WORDS * 32)
    bit = (lane & 31).to(tl.uint32)
    mine = tl.gather(w, lane >> 5, 0)
    place = tl.gather(exclusive(popcount(w)), lane >> 5, 0) + popcount(mine & ((1 << bit) - 1))
    return (mine & (1 << bit)) != 0, tl.load(rank + tile * (WORDS // 64)), place


@triton.jit(
    do_not_specialize=["numel", "num_words"],
    do_not_specialize_on_alignment=["values", "words", "out"],
)
def _pack_rows(
    values, words, rank, out, numel, num_words, WORDS: tl.constexpr, FROM: tl.constexpr,
    TO: tl.constexpr,
):  # fmt: skip
    """Lanes stand for elements, a warp's for those of one word: all are read, and each survivor
    counts the bits below its own. No search, but what is pruned is read too."""
    tile = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, WORDS * 32)
    values += tile * (WORDS * 32)
    if (tile + 1) * (WORDS * 32) <= numel:
        bits = tl.load(values + local)  # without waiting for the words
        keep, base, place = _places(words, rank, tile, num_words, WORDS)
        tl.store(out + base + place, convert(bits, FROM, TO), mask=keep)
    else:
        keep, base, place = _places(words, rank, tile, num_words, WORDS)
        bits = tl.load(values + local, mask=keep, other=0)
        tl.store(out + base + place, convert(bits, FROM, TO), mask=keep)


@triton.jit(
    do_not_specialize=["numel", "num_words"],
    do_not_specialize_on_alignment=["packed", "words", "out"],
)
def _unpack_rows(
    packed, words, rank, out, numel, num_words, WORDS: tl.constexpr, FROM: tl.constexpr,
    TO: tl.constexpr,
):  # fmt: skip
    """As `_pack_rows`: a warp's lanes read the survivors of one word and write its elements."""
    tile = tl.program_id(0).to(tl.int64)
    keep, base, place = _places(words, rank, tile, num_words, WORDS)
    dense = convert(tl.load(packed + base + place, mask=keep, other=0), FROM, TO)
    local = tl.arange(0, WORDS * 32)
    out += tile * (WORDS * 32)
    if (tile + 1) * (WORDS * 32) <= numel:
        tl.store(out + local, dense)
    else:
        tl.store(out + local, dense, mask=local < numel - tile * (WORDS * 32))


def pack_out(values: Tensor, words: Tensor, rank: Tensor, out: Tensor) -> None:
    """The survivors of `values` into `out`, converted on the way."""
    if not out.numel():
        return
    density = out.numel() / values.numel()
    if _tuning.PACK_ROWS < density < 0.98:
        launch(
            _pack_rows,
            (cdiv(words.numel(), 64),),
            raw(values),
            words,
            rank,
            raw(out),
            values.numel(),
            words.numel(),
            WORDS=64,
            FROM=KINDS[values.dtype],
            TO=KINDS[out.dtype],
            num_warps=_tuning.PACK_WARPS,
        )
        return
    size, lanes, warps, flat = _tuning.pack_shape(density)
    launch(
        _pack,
        (cdiv(words.numel(), size),),
        raw(values),
        words,
        rank,
        raw(out),
        words.numel(),
        WORDS=size,
        STEPS=size.bit_length() - 1,
        LANES=lanes,
        FLAT=flat,  # not the same as LANES: the compiler would give both the flat layout
        FROM=KINDS[values.dtype],
        TO=KINDS[out.dtype],
        num_warps=warps,
    )


def unpack_out(packed: Tensor, words: Tensor, rank: Tensor, out: Tensor) -> None:
    """`packed` at the survivors of `out`, +0.0 elsewhere."""
    if not out.numel():
        return
    launch(
        _unpack_rows,
        (cdiv(words.numel(), 64),),
        raw(packed),
        words,
        rank,
        raw(out),
        out.numel(),
        words.numel(),
        WORDS=64,
        FROM=KINDS[packed.dtype],
        TO=KINDS[out.dtype],
        num_warps=_tuning.UNPACK_WARPS,
    )
