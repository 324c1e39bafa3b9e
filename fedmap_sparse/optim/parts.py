"""The kernel calls of a step: one, or one for the prunable parameters and one for the tail."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops import _segments
from fedmap_sparse.optim.packed import Packing

Array = np.ndarray[Any, Any]


@dataclass
class Part:
    """One kernel call of a step: the prunable parameters and the tail together where an optimizer
    has all parameters, else one of the two."""

    values: Tensor
    mask: Mask
    indices: list[int]  # into layout.entries
    ask: list[int] | None  # the same; None for all
    slot: slice  # of packed state
    segments: _segments.Segments
    rows: Array
    scalars: Array
    settled: bool = False  # no flag will change at the next step
    together: int | None = None  # the steps of every parameter, if they are as many

    def write(self, scalars: tuple[float, ...], flags: int, chosen: Container[int] | None) -> None:
        """Set scalars and flags of the segments of these parameters; None: of all."""
        rows: Any = slice(None)
        if chosen is not None:
            rows = [row for row, i in enumerate(self.indices) if i in chosen]
        self.scalars[rows, : len(scalars)] = scalars
        self.rows[rows, 3] = flags
        self.settled = False

    @torch.no_grad()
    def gradients(self, flat: FlatParameters) -> list[Tensor | None]:
        """Of each segment, as kernels want them."""
        grads = [flat.gradient(i) for i in self.indices]
        for n, (i, grad) in enumerate(zip(self.indices, grads, strict=True)):
            if grad is not None:
                name = flat.layout.entries[i].name
                if grad.layout is not torch.strided:
                    raise TypeError(
                        f"{name}.grad: expected dense gradients, got {grad.layout}; make it dense "
                        "before the step (nn.Embedding: sparse=False)"
                    )
                if grad.dtype != flat.values.dtype:
                    wanted = str(flat.values.dtype).removeprefix("torch.")
                    got = str(grad.dtype).removeprefix("torch.")
                    raise TypeError(f"{name}.grad: expected dtype {wanted}, got {got}")
                grads[n] = grad.contiguous()
        return _segments.check_gradients(grads, self.segments, self.values)


def parts_of(flat: FlatParameters, packing: Packing, counts: Array) -> list[Part]:
    """One call where all parameters are stepped; else none for a part without parameters."""
    values, numel = flat.values, flat.layout.prunable_numel
    own, nnz = packing.own, packing.own.nnz
    if packing.is_whole:
        return [_part(flat, values, own, packing.indices, 0, slice(0, packing.size), counts)]
    entries = flat.layout.entries
    first = [i for i in packing.indices if entries[i].offset < numel]
    rest = [i for i in packing.indices if entries[i].offset >= numel]
    parts = []
    if first:
        parts.append(_part(flat, values[:numel], own, first, 0, slice(0, nnz), counts))
    if rest:
        start, stop = packing.tail
        with torch.inference_mode(False):
            none = Mask.empty(0, values.device)
        slot = slice(nnz, packing.size)
        parts.append(_part(flat, values[start:stop], none, rest, start, slot, counts))
    return parts


def _part(
    flat: FlatParameters,
    values: Tensor,
    mask: Mask,
    indices: Iterable[int],
    start: int,
    slot: slice,
    counts: Array,
) -> Part:
    chosen = list(indices)
    entries = [flat.layout.entries[i] for i in chosen]
    segments = _segments.Segments([e.offset - start for e in entries], [e.numel for e in entries])
    ask = None if len(chosen) == len(flat.parameters) else chosen
    seen = set(counts[chosen].tolist())
    together = int(seen.pop()) if len(seen) == 1 else None
    arrays = segments.rows.numpy(), segments.scalars.numpy()
    return Part(values, mask, chosen, ask, slot, segments, *arrays, together=together)


def read_gradients(
    flat: FlatParameters, parts: Iterable[Part], cpu: bool
) -> tuple[list[int], list[list[Tensor | None] | None]]:
    """Of each part: how many of its parameters have a gradient, and those that C++ cannot read.

    The addresses that it could read stand in the part's table of segments.

    Raises:
        RuntimeError: see `FlatParameters.check_bound`.
        TypeError: a gradient that the kernels do not take.
    """
    counts: list[int] = []
    grads: list[list[Tensor | None] | None] = []
    for part in parts:
        read = flat.read_gradients(part.values, part.segments.rows, part.ask)
        if read < 0:
            flat.check_bound()
        counts.append(read)
        grads.append(None if read >= 0 and cpu else part.gradients(flat))
    return counts, grads


def zero_gradients(flat: FlatParameters) -> None:
    """Write +0.0 to the gradients of pruned weights."""
    for p, e in zip(flat.parameters, flat.layout.prunable_entries, strict=False):
        if p.grad is not None:
            grad = p.grad if p.grad.is_contiguous() else p.grad.contiguous()
            ops.zero_pruned_(grad, flat.layout.slice_mask(flat.mask, e.name))
            p.grad = grad


def stepped(parts: Iterable[Part]) -> list[int]:
    """The parameters that had a gradient, once their addresses are in the tables."""
    return [
        i
        for part in parts
        for i, address in zip(part.indices, part.rows[:, 2].tolist(), strict=True)
        if address
    ]


def at_least(name: str, value: Any, least: float) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number of at least `least`."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except OverflowError:  # an int of 400 digits
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if number == math.inf or (isinstance(value, float | int) and not number >= least):
        raise ValueError(f"{name}: expected at least {least}, and finite, got {number}")
    if not number >= least:
        raise TypeError(f"{name}: expected a number of at least {least}, got {value!r:.60}")
