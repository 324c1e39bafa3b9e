"""One fused SGD step over a flat buffer, with optimizer state for survivors only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedmap_sparse import _backends
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops import _segments
from fedmap_sparse.ops._library import Op
from fedmap_sparse.ops._segments import FIRST, MAXIMIZE, NESTEROV, ZEROED, Segments


def _update(p: Tensor, g: Tensor, flags: int, scalars: Tensor, buffer: Tensor | None) -> Tensor:
    """One segment's survivors, all float32: writes `buffer`, returns the new weights."""
    lr, momentum, dampening, weight_decay = scalars[:4].tolist()
    f32 = _segments.float32_scalar
    if flags & MAXIMIZE:
        g = -g
    if weight_decay != 0:
        g = g + f32(weight_decay, p) * p
    if momentum != 0 and buffer is not None:
        if flags & FIRST:
            buffer.copy_(g)
        else:
            buffer.copy_(f32(momentum, p) * buffer + f32(1 - dampening, p) * g)
        g = g + f32(momentum, p) * buffer if flags & NESTEROV else buffer
    return p - f32(lr, p) * g


def _reference(*args: Any) -> None:
    values, words, rank, numel, nnz, grads, rows, scalars, momentum, master = args
    _segments.step_reference(
        values, Mask(words, rank, numel, nnz), grads, rows, scalars, master, [momentum], _update
    )


op = Op(
    "masked_sgd_(Tensor(a!) values, Tensor words, Tensor rank, SymInt numel, SymInt nnz,"
    " Tensor?[] grads, Tensor(b!) rows, Tensor scalars, Tensor(c!)? momentum,"
    " Tensor(d!)? master) -> ()",
    lambda *args: None,
    reference=_reference,
    cpu="masked_sgd",
    triton=lambda *a: _backends.kernels("masked_sgd").masked_sgd_(*a),
    rules=_segments.rules(momentum_buffer=True),
)


def sgd_flags(
    *,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    zeroed: bool = False,
) -> int:
    """The flags of a segment's row.

    `first`: its momentum starts as the gradient, as in torch. `zeroed`, a precondition: its pruned
    elements are +0.0 already; without it the triton backend writes them at each step.
    """
    return NESTEROV * nesterov | MAXIMIZE * maximize | FIRST * first | ZEROED * zeroed


def step_segments_(
    values: Tensor,
    mask: Mask,
    grads: Sequence[Tensor | None],
    segments: Segments,
    *,
    momentum_buffer: Tensor | None = None,
    master: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """`masked_sgd_` over a table of segments, each with hyper-parameters of its own.

    Args:
        grads: one per segment, or None, which skips the segment and leaves its state as it was.
        segments: offsets, sizes, and per segment the flags (`sgd_flags`) and the scalars
            lr, momentum, dampening, weight_decay.

    The other arguments, errors and cost as `masked_sgd_`.
    """
    states = {"momentum_buffer": momentum_buffer, "master": master}
    _segments.step(op, values, mask, grads, segments, states, backend)


def masked_sgd_(
    values: Tensor,
    mask: Mask,
    grads: Tensor | Sequence[Tensor | None],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    momentum_buffer: Tensor | None = None,
    master: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    backend: str | None = None,
) -> None:
    """One SGD step, in place, for the survivors of `values[: mask.numel]` and all of the rest.

    In float32, every operation rounded, in this order (as `torch.optim.SGD`): `g = grad` (negated
    with maximize); `g += weight_decay * p`; with momentum
    `buf = momentum * buf + (1 - dampening) * g` (`buf = g` with `first`), then
    `g = g + momentum * buf` with nesterov, else `g = buf`; `p -= lr * g`. Pruned elements have to
    be +0.0 before (`zero_pruned_`), and are +0.0 after, whatever their gradient: memory lines
    without a survivor are not touched, nor is what no gradient covers.

    Args:
        values: flat buffer, 1-D contiguous, float32, float16 or bfloat16.
        mask: over the first `mask.numel` elements; the rest is a dense tail, for which
            `mask.numel` has to be a multiple of 8.
        grads: one contiguous tensor of the values' size and dtype; or a list of them, each for the
            part of `values` that begins at its offset. None in the list skips that part and leaves
            its state as it was.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`.
        first: whether this is the first step, at which the momentum starts as the gradient.
        momentum_buffer: float32, packed: `mask.nnz` survivors, then the tail. None: no momentum.
        master: float32 master copies, packed likewise; required for 16-bit values, which then
            receive the rounded masters. Where a value is not its master rounded, someone wrote it,
            and the step starts from the value.
        offsets: with a list, where each gradient's part begins: ascending multiples of 128 within
            the mask and of 8 in the tail, as `FlatLayout.entries` has them.
        backend: "reference", "cpu" or "triton"; None: by device.

    Raises:
        TypeError, ValueError: dtypes, sizes, devices or offsets that do not agree; nothing was
            written.

    O(touched lines + nnz): `0.125 + 8 d + 12 (1 - (1 - d)^16)` bytes per element at density d.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> values = torch.tensor([1.0, 0.0, 2.0])
    >>> mask = fs.Mask.from_bool(torch.tensor([True, False, True]))
    >>> fs.ops.masked_sgd_(values, mask, torch.ones(3), lr=0.5)
    >>> values
    tensor([0.5000, 0.0000, 1.5000])
    """
    offsets, numels, parts = _segments.place(values, mask, grads, offsets)
    flags = sgd_flags(nesterov=nesterov, maximize=maximize, first=first)
    scalars = (lr, momentum, dampening, weight_decay)
    table = _segments.uniform(offsets, numels, flags, scalars)
    states = {"momentum_buffer": momentum_buffer, "master": master}
    _segments.step(op, values, mask, parts, table, states, backend)
