"""Masked SGD: the rule of one element; `_step` walks the model."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.ops._segments import FIRST, MAXIMIZE, NESTEROV
from fedmap_sparse.triton_kernels import _step
from fedmap_sparse.triton_kernels._bits import nonzero

_FIRST, _MAXIMIZE, _NESTEROV = tl.constexpr(FIRST), tl.constexpr(MAXIMIZE), tl.constexpr(NESTEROV)


@triton.jit
def _uses_momentum(flags, scalars):
    return nonzero(tl.load(scalars + 1))


@triton.jit
def _setup(flags, scalars):
    """float32 scalars, rounded once from float64, and what applies."""
    lr = tl.load(scalars).to(tl.float32)
    momentum = tl.load(scalars + 1)
    rest = (1.0 - tl.load(scalars + 2)).to(tl.float32)
    decay = tl.load(scalars + 3)
    moves, decays = nonzero(momentum), nonzero(decay)
    return lr, momentum.to(tl.float32), rest, decay.to(tl.float32), moves, decays, flags


@triton.jit
def _update(p, g, a, b, buffer, HAS_BUFFER: tl.constexpr, rule):
    lr, momentum, rest, decay, moves, decays, flags = rule
    g = tl.where((flags & _MAXIMIZE) != 0, -g, g)
    g = tl.where(decays, g + decay * p, g)
    if HAS_BUFFER:
        buffer = tl.where((flags & _FIRST) != 0, g, momentum * buffer + rest * g)
        direction = tl.where((flags & _NESTEROV) != 0, g + momentum * buffer, buffer)
        g = tl.where(moves, direction, g)
    return p - lr * g, a, b, buffer


def masked_sgd_(
    values: Tensor,
    words: Tensor,
    rank: Tensor,
    numel: int,
    nnz: int,
    grads: list[Tensor | None],
    rows: Tensor,
    scalars: Tensor,
    momentum: Tensor | None,
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
        (None, None, momentum),
        master,
        (_setup, _update, _uses_momentum),
    )
