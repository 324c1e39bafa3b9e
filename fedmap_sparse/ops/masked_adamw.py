"""One fused AdamW step over a flat buffer, with optimizer state for survivors only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops import _segments
from fedmap_sparse.ops._library import Op
from fedmap_sparse.ops._rules import Arguments
from fedmap_sparse.ops._segments import AMSGRAD, MAXIMIZE, ZEROED, Segments


def _update(
    p: Tensor,
    g: Tensor,
    flags: int,
    scalars: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
) -> Tensor:
    """One segment's survivors, all float32: writes the averages, returns the new weights."""
    lr, beta1, beta2, eps, weight_decay, power1, power2 = scalars[:7].tolist()
    f32 = _segments.float32_scalar
    if flags & MAXIMIZE:
        g = -g
    if weight_decay != 0:
        p = p * f32(1 - lr * weight_decay, p)
    exp_avg.copy_(exp_avg + (g - exp_avg) * f32(1 - beta1, p))
    exp_avg_sq.copy_(exp_avg_sq * f32(beta2, p) + (f32(1 - beta2, p) * g) * g)
    second = exp_avg_sq
    if flags & AMSGRAD and max_exp_avg_sq is not None:
        torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
        second = max_exp_avg_sq
    # torch's float32 sqrt is not correctly rounded in 20% of values here; float64's, rounded, is.
    root = second.to(torch.float64).sqrt().to(torch.float32)
    denominator = root / f32(math.sqrt(1 - power2), p) + f32(eps, p)
    return p - f32(lr / (1 - power1), p) * (exp_avg / denominator)


def _reference(*args: Any) -> None:
    values, words, rank, numel, nnz, grads, rows, scalars, first, second, largest, master = args
    states = [first, second, largest]
    _segments.step_reference(
        values, Mask(words, rank, numel, nnz), grads, rows, scalars, master, states, _update
    )


@dataclass(frozen=True)
class _Largest:
    """The third average, where a segment wants it."""

    name: str = "max_exp_avg_sq"

    def check(self, given: Arguments) -> None:
        flags = given["segments"].rows.numpy()[:, 3]
        if given["max_exp_avg_sq"] is None and (flags & AMSGRAD).any():
            raise ValueError(
                "max_exp_avg_sq: expected a tensor for segments with amsgrad, got None"
            )


op = Op(
    "masked_adamw_(Tensor(a!) values, Tensor words, Tensor rank, SymInt numel, SymInt nnz,"
    " Tensor?[] grads, Tensor(b!) rows, Tensor scalars, Tensor(c!) exp_avg,"
    " Tensor(d!) exp_avg_sq, Tensor(e!)? max_exp_avg_sq, Tensor(f!)? master) -> ()",
    lambda *args: None,
    reference=_reference,
    cpu="masked_adamw",
    triton=lambda *a: _backends.kernels("masked_adamw").masked_adamw_(*a),
    rules=(
        _Largest(),
        *_segments.rules(exp_avg=False, exp_avg_sq=False, max_exp_avg_sq=True),
    ),
)


def adamw_flags(*, maximize: bool = False, amsgrad: bool = False, zeroed: bool = False) -> int:
    """The flags of a segment's row; `zeroed` as in `sgd_flags`."""
    return MAXIMIZE * maximize | AMSGRAD * amsgrad | ZEROED * zeroed


def step_segments_(
    values: Tensor,
    mask: Mask,
    grads: Sequence[Tensor | None],
    segments: Segments,
    *,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    master: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """`masked_adamw_` over a table of segments, each with hyper-parameters of its own.

    Args:
        grads: one per segment, or None, which skips the segment and leaves its state as it was.
        segments: offsets, sizes, and per segment the flags (`adamw_flags`) and the scalars lr,
            beta1, beta2, eps, weight_decay, beta1^t, beta2^t, the powers those of this step (t
            counted from 1). Segments with the amsgrad flag need `max_exp_avg_sq`.

    The other arguments, errors and cost as `masked_adamw_`.
    """
    states = {
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "max_exp_avg_sq": max_exp_avg_sq,
        "master": master,
    }
    _segments.step(op, values, mask, grads, segments, states, backend)


def masked_adamw_(
    values: Tensor,
    mask: Mask,
    grads: Tensor | Sequence[Tensor | None],
    *,
    step: int,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    max_exp_avg_sq: Tensor | None = None,
    master: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    backend: str | None = None,
) -> None:
    """One AdamW step, in place, for the survivors of `values[: mask.numel]` and all of the rest.

    In float32, every operation rounded, in this order (as `torch.optim.AdamW`, Loshchilov and
    Hutter, arXiv 1711.05101): `p *= 1 - lr * weight_decay`; `m += (g - m) * (1 - beta1)`;
    `v = v * beta2 + ((1 - beta2) * g) * g`; with amsgrad the largest v so far takes v's place;
    `p -= lr / (1 - beta1^step) * (m / (sqrt(v) / sqrt(1 - beta2^step) + eps))`. Pruned elements
    have to be +0.0 before (`zero_pruned_`), and are +0.0 after, whatever their gradient.

    Args:
        values: flat buffer, 1-D contiguous, float32, float16 or bfloat16.
        mask: over the first `mask.numel` elements; the rest is a dense tail, for which
            `mask.numel` has to be a multiple of 8.
        grads: one contiguous tensor of the values' size and dtype; or a list of them, each for the
            part of `values` that begins at its offset. None in the list skips that part and leaves
            its state as it was.
        step: the number of this step, counted from 1.
        exp_avg, exp_avg_sq: float32, packed: `mask.nnz` survivors, then the tail. Start them with
            zeros.
        lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        max_exp_avg_sq: the largest averages so far, packed likewise. A tensor turns amsgrad on.
        master: float32 master copies, packed likewise; required for 16-bit values, which then
            receive the rounded masters. Where a value is not its master rounded, someone wrote it,
            and the step starts from the value.
        offsets: with a list, where each gradient's part begins: ascending multiples of 128 within
            the mask and of 8 in the tail, as `FlatLayout.entries` has them.
        backend: "reference", "cpu" or "triton"; None: by device.

    Raises:
        TypeError, ValueError: dtypes, sizes, devices or offsets that do not agree, or a step below
            1; nothing was written.

    O(touched lines + nnz): `0.125 + 16 d + 12 (1 - (1 - d)^16)` bytes per element at density d.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> values = torch.tensor([1.0, 0.0, 2.0])
    >>> mask = fs.Mask.from_bool(torch.tensor([True, False, True]))
    >>> m, v = torch.zeros(2), torch.zeros(2)
    >>> fs.ops.masked_adamw_(values, mask, torch.ones(3), step=1, exp_avg=m, exp_avg_sq=v, lr=0.5)
    >>> values
    tensor([0.4950, 0.0000, 1.4900])
    """
    if step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")
    offsets, numels, parts = _segments.place(values, mask, grads, offsets)
    flags = adamw_flags(maximize=maximize, amsgrad=max_exp_avg_sq is not None)
    beta1, beta2 = betas
    scalars = (lr, beta1, beta2, eps, weight_decay, beta1**step, beta2**step)
    table = _segments.uniform(offsets, numels, flags, scalars)
    states = {
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "max_exp_avg_sq": max_exp_avg_sq,
        "master": master,
    }
    _segments.step(op, values, mask, parts, table, states, backend)
