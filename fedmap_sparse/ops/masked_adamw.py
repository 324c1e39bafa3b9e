"""One fused AdamW step over a flat buffer, with optimizer state for survivors only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends
from fedmap_sparse._backends import define
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops import _segments
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


op = define(
    "masked_adamw_(Tensor(a!) values, Tensor words, Tensor rank, SymInt numel, SymInt nnz,"
    " Tensor?[] grads, Tensor(b!) rows, Tensor scalars, Tensor(c!) exp_avg,"
    " Tensor(d!) exp_avg_sq, Tensor(e!)? max_exp_avg_sq, Tensor(f!)? master, str backend) -> ()",
    lambda *args: None,
    reference=_reference,
    cpu=_segments.step_cpu("masked_adamw"),
    triton=lambda *a: _backends.kernels("masked_adamw").masked_adamw_(*a),
)


def adamw_flags(*, maximize: bool = False, amsgrad: bool = False, zeroed: bool = False) -> int:
    """The flags of a segment's row; `zeroed` as in `sgd_flags`."""
    return MAXIMIZE * maximize | AMSGRAD * amsgrad | ZEROED * zeroed


def masked_adamw_(
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
    """One AdamW step, in place, for the survivors of `values[: mask.numel]` and all of the rest.

    Per segment, in float32, every operation rounded, in this order (as `torch.optim.AdamW`,
    Loshchilov and Hutter, arXiv 1711.05101): `p *= 1 - lr * weight_decay`;
    `m += (g - m) * (1 - beta1)`; `v = v * beta2 + ((1 - beta2) * g) * g`; with amsgrad the largest
    v so far takes v's place; `p -= lr / (1 - beta1^t) * (m / (sqrt(v) / sqrt(1 - beta2^t) + eps))`.

    Args, errors and cost as `masked_sgd_`, but for:
        segments: the scalars are lr, beta1, beta2, eps, weight_decay, beta1^t, beta2^t, the powers
            those of this step (t counted from 1); the flags come from `adamw_flags`.
        exp_avg, exp_avg_sq, max_exp_avg_sq: float32, packed: `mask.nnz` survivors, then the tail.
            Segments with the amsgrad flag want the third.

    `0.125 + 16 d + 12 (1 - (1 - d)^16)` bytes an element at density d.
    """
    states = {
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "max_exp_avg_sq": max_exp_avg_sq,
        "master": master,
    }
    if _segments.direct("masked_adamw", values, mask, grads, segments, states, backend):
        return
    if max_exp_avg_sq is None and (segments.rows.numpy()[:, 3] & AMSGRAD).any():
        raise ValueError("max_exp_avg_sq: expected a tensor for segments with amsgrad, got None")
    _segments.step(op, values, mask, grads, segments, states, backend)
