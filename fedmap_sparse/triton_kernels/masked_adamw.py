"""Masked AdamW: the rule of one element; `_step` walks the model."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.ops._segments import AMSGRAD, MAXIMIZE
from fedmap_sparse.triton_kernels import _step
from fedmap_sparse.triton_kernels._bits import nonzero

_AMSGRAD, _MAXIMIZE = tl.constexpr(AMSGRAD), tl.constexpr(MAXIMIZE)


@triton.jit
def _uses_largest(flags, scalars):
    return (flags & _AMSGRAD) != 0


@triton.jit
def _setup(flags, scalars):
    """float32 scalars, rounded once from float64 as on the host, and what applies."""
    lr, decay = tl.load(scalars), tl.load(scalars + 4)
    beta2 = tl.load(scalars + 2)
    keep = (1.0 - lr * decay).to(tl.float32)
    towards1 = (1.0 - tl.load(scalars + 1)).to(tl.float32)
    towards2 = (1.0 - beta2).to(tl.float32)
    eps = tl.load(scalars + 3).to(tl.float32)
    size = (lr / (1.0 - tl.load(scalars + 5))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.load(scalars + 6)).to(tl.float32)
    return keep, towards1, beta2.to(tl.float32), towards2, eps, size, root, nonzero(decay), flags


@triton.jit
def _update(p, g, m, v, largest, HAS_LARGEST: tl.constexpr, rule):
    keep, towards1, beta2, towards2, eps, size, root, decays, flags = rule
    g = tl.where((flags & _MAXIMIZE) != 0, -g, g)
    p = tl.where(decays, p * keep, p)
    m = m + (g - m) * towards1
    v = v * beta2 + (towards2 * g) * g
    second = v
    if HAS_LARGEST:
        amsgrad = (flags & _AMSGRAD) != 0
        grown = tl.where((v > largest) | (v != v), v, largest)  # NaN stays, as in torch.maximum
        largest = tl.where(amsgrad, grown, largest)
        second = tl.where(amsgrad, largest, v)
    denominator = tl.div_rn(tl.sqrt_rn(second), root + tl.zeros_like(v)) + eps
    return p - size * tl.div_rn(m, denominator), m, v, largest


def masked_adamw_(
    values: Tensor,
    words: Tensor,
    rank: Tensor,
    numel: int,
    nnz: int,
    grads: list[Tensor | None],
    rows: Tensor,
    scalars: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    master: Tensor | None,
) -> None:
    """One launch for the whole model."""
    _step.walk(
        values,
        words,
        rank,
        numel,
        nnz,
        grads,
        rows,
        scalars,
        (exp_avg, exp_avg_sq, max_exp_avg_sq),
        master,
        (_setup, _update, _uses_largest),
    )
