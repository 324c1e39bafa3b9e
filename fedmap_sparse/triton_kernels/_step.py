"""The walk that the masked steps share: one launch over every segment of a flat buffer.

A program takes a tile of one segment. A tile without holes goes through as flat streams, 16 bytes
a thread. In any other, lanes stand for survivors: their state lies side by side, their weights and
gradients are gathered, so that a warp touches the sectors that hold a survivor, once each.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.ops._segments import SKIPPED, ZEROED
from fedmap_sparse.triton_kernels import _tuning
from fedmap_sparse.triton_kernels._bits import (
    KINDS,
    exclusive,
    load_words,
    narrow,
    nonzero,
    popcount,
    raw,
    survivor,
    widen,
)
from fedmap_sparse.triton_kernels._launch import launch
from fedmap_sparse.triton_kernels._tables import to_device

_ZEROED, _SKIPPED = tl.constexpr(ZEROED), tl.constexpr(SKIPPED)


@triton.jit
def _find_segment(first_tiles, count, tile):
    """The last segment whose first tile is at or before `tile`."""
    low = tl.zeros((), tl.int32)
    high = low + count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(first_tiles + middle) <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _update_lanes(
    weights,
    gradient,
    at,
    state,
    live,
    first,
    second,
    optional,
    master,
    use_optional,
    rule,
    UPDATE: tl.constexpr,
    KIND: tl.constexpr,
):
    """Load, update and store the elements `at` of a segment, whose states lie at `state`."""
    g = widen(tl.load(gradient + at, mask=live, other=0), KIND)
    if master is None:
        p = widen(tl.load(weights + at, mask=live, other=0), KIND)
    else:
        # A value that is not its master rounded was written by someone.
        value = tl.load(weights + at, mask=live, other=0)
        p = tl.load(master + state, mask=live, other=0.0)
        p = tl.where(narrow(p, KIND) == value, p, widen(value, KIND))
    a, b, c = p, p, p
    if first is not None:
        a = tl.load(first + state, mask=live, other=0.0)
        b = tl.load(second + state, mask=live, other=0.0)
    if optional is not None:
        c = tl.load(optional + state, mask=live & use_optional, other=0.0)
    p, a, b, c = UPDATE(p, g, a, b, c, optional is not None, rule)
    if first is not None:
        tl.store(first + state, a, mask=live)
        tl.store(second + state, b, mask=live)
    if optional is not None:
        tl.store(optional + state, c, mask=live & use_optional)
    if master is not None:
        tl.store(master + state, p, mask=live)
    tl.store(weights + at, narrow(p, KIND), mask=live)


@triton.jit(
    do_not_specialize=["segments", "prunable", "nnz", "num_words"],
    do_not_specialize_on_alignment=["words"],
)
def step(
    values,
    words,
    rank,
    rows,
    first_tiles,
    scalars,
    first,
    second,
    optional,
    master,
    segments,
    prunable,
    nnz,
    num_words,
    SETUP: tl.constexpr,
    UPDATE: tl.constexpr,
    USES: tl.constexpr,
    KIND: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    FLAT: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile of one segment.

    `rows` is [segments, 4]: offset, numel, gradient's address, flags; `scalars` is [segments, 8];
    `first_tiles` counts the tiles before each segment. ALIGNED: every gradient starts at a
    multiple of 16 bytes.
    """
    tile = tl.program_id(0).to(tl.int64)
    segment = _find_segment(first_tiles, segments, tile)
    row = rows + segment * 4
    offset = tl.load(row)
    flags = tl.load(row + 3).to(tl.int32)
    mine = scalars + segment * 8
    use_optional = USES(flags, mine)
    inside = (tile - tl.load(first_tiles + segment)) * (WORDS * 32)
    elements = tl.minimum(tl.load(row + 1) - inside, WORDS * 32).to(tl.int32)
    elements = tl.where(nonzero(tl.load(mine + _SKIPPED)), 0, elements)
    start = tl.multiple_of(offset + inside, 8)
    pointer = values.dtype
    gradient = tl.load(row + 2).to(pointer, bitcast=True)
    if ALIGNED:
        gradient = tl.multiple_of(gradient, 16)
    gradient += tl.multiple_of(inside, 32)

    lane = tl.arange(0, WORDS)
    valid = tl.minimum(tl.maximum(elements - lane * 32, 0), 32)
    covered = tl.where(valid == 32, 0xFFFFFFFF, (1 << (valid & 31).to(tl.uint32)) - 1).to(tl.uint32)
    if start >= prunable:
        w = covered
        base = nnz + start - prunable
    else:
        first_word = start // 32
        w = load_words(words, first_word + lane, num_words) & covered
        base = tl.load(rank + start // 2048)
        skipped = tl.arange(0, 64)
        earlier = load_words(words, start // 2048 * 64 + skipped, first_word)
        base += tl.sum(popcount(earlier), 0)
    counts = popcount(w)
    before = exclusive(counts)
    count = tl.sum(counts, 0)
    skew = (base & 7).to(tl.int32)
    rule = SETUP(flags, mine)

    if (count == WORDS * 32) & (skew == 0):
        base = base // 8 * 8  # tells the compiler of the multiple
        for part in range(0, WORDS * 32, FLAT):
            at = part + tl.arange(0, FLAT)
            _update_lanes(
                values + start,
                gradient,
                at,
                base + at,
                at >= 0,
                first,
                second,
                optional,
                master,
                use_optional,
                rule,
                UPDATE,
                KIND,
            )
    else:
        # Gathers may give a thread neighbouring lanes, which would ask for each sector once a lane:
        # they stand for what lies as far apart as the program is wide.
        order = tl.arange(0, LANES)
        order = order % EACH * (LANES // EACH) + order // EACH
        if ROWS:
            # Lanes stand for elements, and a survivor counts those before it: no search.
            for part in range(0, WORDS * 32, LANES):
                at = part + order
                held = tl.gather(w, at >> 5, 0)
                bit = 1 << (at & 31).to(tl.uint32)
                state = tl.gather(before, at >> 5, 0) + popcount(held & (bit - 1))
                _update_lanes(
                    values + start,
                    gradient,
                    at,
                    base + state,
                    (held & bit) != 0,
                    first,
                    second,
                    optional,
                    master,
                    use_optional,
                    rule,
                    UPDATE,
                    KIND,
                )
        else:
            for begin in range(-skew, count, LANES):
                j = begin + order
                live = (j >= 0) & (j < count)
                at = survivor(w, before, tl.maximum(j, 0), WORDS, STEPS)
                _update_lanes(
                    values + start,
                    gradient,
                    at,
                    base + j,
                    live,
                    first,
                    second,
                    optional,
                    master,
                    use_optional,
                    rule,
                    UPDATE,
                    KIND,
                )
        if (flags & _ZEROED) == 0:
            for begin in range(0, elements, LANES):
                at = begin + tl.arange(0, LANES)
                pruned = ((tl.gather(w, at >> 5, 0) >> (at & 31)) & 1) == 0
                tl.store(values + start + at, 0, mask=pruned & (at < elements))


@functools.lru_cache(maxsize=64)
def _table(
    rows: bytes, pointers: tuple[int, ...], size: int
) -> tuple[np.ndarray[Any, Any], int, bool]:
    """(rows with the gradients' addresses, then the tiles before each; tiles of all; whether every
    address is a multiple of 16). Steps of one model differ in none of it."""
    table = np.frombuffer(rows, np.int64).reshape(-1, 4).copy()
    table[:, 2] = pointers
    tiles = np.where(table[:, 2] != 0, -(-table[:, 1] // (size * 32)), 0)
    first = np.cumsum(tiles) - tiles
    aligned = bool((table[:, 2] % 16 == 0).all())
    return np.concatenate([table.ravel(), first]), int(tiles.sum()), aligned


def walk(
    values: Tensor,
    words: Tensor,
    rank: Tensor,
    prunable: int,
    nnz: int,
    grads: list[Tensor | None],
    rows: Tensor,
    scalars: Tensor,
    states: tuple[Tensor | None, Tensor | None, Tensor | None],
    master: Tensor | None,
    rule: tuple[Any, Any, Any],
) -> None:
    """Step every segment that has a gradient; `states` are two that a rule always keeps or never,
    and one that single segments may do without. `rule` is how to prepare a segment's scalars, to
    update an element, and to tell whether a segment uses the last state.

    `rows` lies on the host, `scalars` there or on the device, where a captured CUDA graph reads
    what is in it at each replay.
    """
    density = nnz / prunable if prunable else 1.0
    # Where two states are updated, arithmetic on pruned lanes costs more than the search.
    by_rows = states[0] is None and _tuning.STEP_ROWS < density < 0.98
    shape = _tuning.STEP_BY_ROWS if by_rows else _tuning.step_shape(density)
    size, lanes, warps, flat = shape
    pointers = tuple([0 if g is None else g.data_ptr() for g in grads])
    table, total, aligned = _table(rows.numpy().tobytes(), pointers, size)
    if not total:
        return
    rows_there, first_tiles = to_device(table, values.device).tensor_split((4 * len(grads),))
    if scalars.device != values.device:
        scalars = to_device(scalars.view(torch.int64).numpy(), values.device).view(torch.float64)
    setup, update, uses = rule
    launch(
        step,
        (total,),
        raw(values),
        words,
        rank,
        rows_there,
        first_tiles,
        scalars,
        *states,
        master,
        len(grads),
        prunable,
        nnz,
        words.numel(),
        SETUP=setup,
        UPDATE=update,
        USES=uses,
        KIND=KINDS[values.dtype],
        WORDS=size,
        STEPS=size.bit_length() - 1,
        LANES=lanes,
        FLAT=flat,
        EACH=max(1, lanes // (32 * warps)),
        ROWS=by_rows,
        ALIGNED=aligned,
        num_warps=warps,
    )
