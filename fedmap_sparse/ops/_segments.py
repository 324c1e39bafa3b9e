"""What the masked steps share: the table of segments, their rules, the reference's walk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _checks
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops._library import Op, direct
from fedmap_sparse.ops._rules import FLOAT32, Arguments, Bitmap, Dense, Rule
from fedmap_sparse.ops.quantize import cast_reference

NESTEROV, MAXIMIZE, FIRST, AMSGRAD = 1, 2, 4, 8
#: Precondition that the segment's pruned elements are +0.0 already, so that a backend need not
#: visit the memory between survivors (0.125 + 8 d + 12 (1 - (1 - d)^8) bytes per element on a GPU,
#: where writing zeros blindly costs 4 more). Without it they are written.
ZEROED = 16
#: Column of `scalars`: where it is not 0, a segment and its state stay as they are. It may lie on
#: the device, so that whether to step is known there alone.
SKIPPED = 7


class Segments:
    """A table of segments: `rows[s]` = offset, numel, gradient address, flags; `scalars[s]` = 8
    float64: hyper-parameters, and SKIPPED. Kept between steps; the optimizer rewrites what changed.

    Offsets grow; those below the mask's numel are multiples of 128, the rest multiples of 8, as
    `flatten` lays them out.
    """

    def __init__(self, offsets: Sequence[int], numels: Sequence[int]) -> None:
        if len(offsets) != len(numels):
            raise ValueError(f"numels: expected {len(offsets)}, one per offset, got {len(numels)}")
        self.rows = torch.zeros(len(offsets), 4, dtype=torch.int64, device="cpu")
        self.rows[:, 0] = torch.tensor(list(offsets), dtype=torch.int64, device="cpu")
        self.rows[:, 1] = torch.tensor(list(numels), dtype=torch.int64, device="cpu")
        self.numels = tuple(numels)
        self.scalars = torch.zeros(len(offsets), 8, dtype=torch.float64, device="cpu")

    def __len__(self) -> int:
        return len(self.numels)


_own = threading.local()


def uniform(
    offsets: tuple[int, ...], numels: tuple[int, ...], flags: int, scalars: tuple[float, ...]
) -> Segments:
    """A table whose segments share their flags and scalars, the calling thread's own.

    It is rewritten by the thread's next call: making one takes 20 us, rewriting it 1.
    """
    tables: dict[Any, tuple[Segments, Any, Any]] = _own.__dict__.setdefault("tables", {})
    found = tables.get((offsets, numels))
    if found is None:
        made = Segments(offsets, numels)
        if len(tables) >= 16:
            tables.clear()
        found = tables[offsets, numels] = (made, made.rows.numpy(), made.scalars.numpy())
    table, rows, numbers = found
    rows[:, 3] = flags
    numbers[:, : len(scalars)] = scalars
    return table


def place(
    values: Tensor,
    mask: Mask,
    grads: Tensor | Sequence[Tensor | None],
    offsets: Sequence[int] | None,
) -> tuple[tuple[int, ...], tuple[int, ...], Sequence[Tensor | None]]:
    """Offsets, sizes and gradients of the segments that a public step's arguments mean."""
    _checks.check_tensor("values", values)
    if not isinstance(mask, Mask):
        raise TypeError(f"mask: expected a Mask, got {type(mask).__name__}")
    numel, border = values.numel(), mask.numel
    if isinstance(grads, Tensor):
        if offsets is not None:
            raise ValueError("offsets: expected None beside one flat gradient")
        _checks.check_tensor("grads", grads, (values.dtype,))
        _checks.check_numel("grads", grads, numel, "the size of values")
        flat = grads.view(-1)
        if not 0 < border < numel:
            return (0,), (numel,), (flat,)
        if border % 8:
            raise ValueError(f"mask: expected a multiple of 8 elements before a tail, got {border}")
        return (0, border), (border, numel - border), (flat[:border], flat[border:])
    grads = list(grads)
    if offsets is None or len(offsets) != len(grads):
        got = "None" if offsets is None else str(len(offsets))
        raise ValueError(f"offsets: expected {len(grads)}, one per gradient, got {got}")
    numels = tuple(0 if g is None else g.numel() for g in grads)
    end = 0
    for offset, size in zip(offsets, numels, strict=True):
        unit = 128 if offset < border else 8
        if offset < end or offset % unit or offset + size > (border if offset < border else numel):
            raise ValueError(
                f"offsets: expected segments in order, apart, in the mask or in the tail, at "
                f"multiples of {unit}, got one of {size} elements at {offset}"
            )
        end = offset + size
    return tuple(offsets), numels, grads


@dataclass(frozen=True)
class Gradients:
    """One gradient or None per segment: contiguous, of its size, of the values' dtype, device."""

    name: str = "grads"

    def check(self, given: Arguments) -> None:
        grads, segments, values = given["grads"], given["segments"], given["values"]
        if len(grads) != len(segments):
            raise ValueError(f"grads: expected {len(segments)}, one per segment, got {len(grads)}")
        for grad, numel in zip(grads, segments.numels, strict=True):
            if grad is not None:
                _checks.check_tensor("grads", grad, (values.dtype,))
                _checks.check_numel("grads", grad, numel, "the segment's size")
                _checks.check_device("grads", grad, values.device)


@dataclass(frozen=True)
class Within:
    """A mask over no more elements than `values` has."""

    name: str = "mask"

    def check(self, given: Arguments) -> None:
        mask, numel = given["mask"], given["values"].numel()
        if mask.numel > numel:
            raise ValueError(f"mask: expected at most {numel} elements, got {mask.numel}")


@dataclass(frozen=True)
class Masters:
    """Master copies for 16-bit values."""

    name: str = "master"

    def check(self, given: Arguments) -> None:
        if given["values"].dtype != torch.float32 and given["master"] is None:
            dtype = _checks.short(given["values"].dtype)
            raise ValueError(f"master: expected float32 master copies for {dtype} values")


def _packed_numel(given: Arguments) -> int:
    mask = given["mask"]
    return int(mask.nnz + given["values"].numel() - mask.numel)


def rules(**optional: bool) -> tuple[Rule, ...]:
    """A step's rules; `optional` has its packed states by name, and whether they may be None."""
    states = [
        Dense(name, FLOAT32, _packed_numel, beside="values", optional=may_be_none)
        for name, may_be_none in (optional | {"master": True}).items()
    ]
    return (Dense("values"), Bitmap("mask", beside="values"), Within(), Gradients(), *states,
            Masters())  # fmt: skip


def check_gradients(
    grads: Sequence[Tensor | None], segments: Segments, values: Tensor
) -> list[Tensor | None]:
    """The gradients without autograd; raises unless each is as kernels want it."""
    Gradients().check({"grads": grads, "segments": segments, "values": values})
    # The dispatcher resolves lazy negation in other arguments, but not in lists of optional ones.
    return [None if g is None else _checks.plain(g).resolve_neg() for g in grads]


def step(
    op: Op,
    values: Tensor,
    mask: Mask,
    grads: Sequence[Tensor | None],
    segments: Segments,
    states: Mapping[str, Tensor | None],
    backend: str | None,
) -> None:
    """One step by `op`, straight or through the dispatcher; `states` in its order, master last.

    As an op, a step with its dozen tensors costs 14 to 20 us beside its work, straight 2.
    """
    rows, scalars = segments.rows, segments.scalars
    if direct(values, backend) and isinstance(mask, Mask):
        # A tuple keeps the gradients alive while the GIL is released.
        where = (values, mask.words, mask.rank, mask.numel, mask.nnz)
        if op.attempt(*where, tuple(grads), rows, scalars, *states.values()) is not None:
            return
    op.check(values=values, mask=mask, grads=grads, segments=segments, **states)
    plain = check_gradients(grads, segments, values)
    where = (_checks.plain(values), mask.words, mask.rank, mask.numel, mask.nnz)
    op(*where, plain, rows, scalars, *states.values(), backend=backend)


def float32_scalar(value: float, like: Tensor) -> Tensor:
    """Reference: a hyper-parameter rounded to float32 once, before it meets a float32 tensor.

    torch would compute `float * tensor` with the float64 scalar rounded inside the kernel, by
    device and op; a 0-d tensor leaves no choice.
    """
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def step_reference(
    values: Tensor,
    mask: Mask,
    grads: Sequence[Tensor | None],
    rows: Tensor,
    scalars: Tensor,
    master: Tensor | None,
    states: Sequence[Tensor | None],
    update: Callable[..., Tensor],
) -> None:
    """Reference: `update(p, g, flags, scalars, *states)` for each segment that has a gradient."""
    survivors = mask.to_bool()
    held = torch.cat([survivors, survivors.new_ones(values.numel() - mask.numel)])
    before = torch.cumsum(held, 0) - held.to(torch.int64)  # packed index of each flat position
    for (offset, size, _, flags), row, grad in zip(rows.tolist(), scalars, grads, strict=True):
        if grad is None or row[SKIPPED] != 0:
            continue
        inside = slice(offset, offset + size)
        kept = held[inside]
        state = before[inside][kept]
        p = values[inside][kept]
        if master is not None:  # a value that is not its master rounded was written by someone
            copies = master[state]
            same = cast_reference(copies, values.dtype).view(torch.int16) == p.view(torch.int16)
            p = torch.where(same, copies, p.to(torch.float32))
        g = grad.reshape(-1)[kept].to(torch.float32)
        parts = [None if s is None else s[state] for s in states]
        p = update(p, g, flags, row, *parts)
        for whole, part in zip(states, parts, strict=True):
            if whole is not None and part is not None:
                whole[state] = part
        if master is not None:
            master[state] = p
        values[inside] = 0.0
        values[inside][kept] = cast_reference(p, values.dtype)
