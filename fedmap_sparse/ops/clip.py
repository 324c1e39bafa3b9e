"""Cut the difference of two vectors to a norm, in one order of additions on every backend."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import native
from fedmap_sparse.ops._library import Op, direct
from fedmap_sparse.ops._rules import FLOAT32, Dense, Number

#: Squares are added in float64: those of a block in `LANES` sums, row after row; the sums by halves
#: (the first to the one after the middle); then the blocks' sums in the same way, as one block.
LANES = 256
BLOCK = 4096


def _ordered_sum(rows: Tensor) -> Tensor:
    """float64[..., rows, LANES] to [...], in the order above."""
    total = torch.zeros_like(rows[..., 0, :])
    for row in rows.unbind(-2):
        total = total + row
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def _padded(x: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % multiple))


def _clip_reference(values: Tensor, start: Tensor, max_norm: float) -> Tensor:
    at = start.reshape(-1).double()
    difference = values.reshape(-1).double() - at
    norm = 0.0
    if values.numel():
        squares = _padded(difference.square(), BLOCK).view(-1, BLOCK // LANES, LANES)
        sums = _padded(_ordered_sum(squares), LANES).view(-1, LANES)
        norm = math.sqrt(float(_ordered_sum(sums)))
    _require_finite(norm)
    if max_norm < norm:
        factor = difference.new_tensor(max_norm / norm)
        values.copy_((at + difference * factor).float().view(values.shape))
    return torch.tensor(norm, dtype=torch.float64, device=values.device)


def _clip_cpu(values: Tensor, start: Tensor, max_norm: float, threads: int, attempt: bool) -> Any:
    norm = native.clip_difference(values, start, max_norm, threads, attempt)
    if norm is None:
        return None
    _require_finite(norm)
    return norm if attempt else torch.tensor(norm, dtype=torch.float64, device="cpu")


def _clip_triton(values: Tensor, start: Tensor, max_norm: float) -> Tensor:
    norm: Tensor = _backends.kernels("clip").clip_difference_(values, start, max_norm)
    _require_finite(float(norm))
    return norm


def _require_finite(norm: float) -> None:
    if not math.isfinite(norm):
        raise ValueError("values, start: expected finite values, got NaN or infinity")


_clip = Op(
    "clip_difference_(Tensor(a!) values, Tensor start, float max_norm) -> Tensor",
    lambda values, start, max_norm: values.new_empty((), dtype=torch.float64),
    reference=_clip_reference,
    cpu=_clip_cpu,
    triton=_clip_triton,
    rules=(
        Dense("values", FLOAT32),
        Dense("start", FLOAT32, lambda given: given["values"].numel(), "one each", "values"),
        Number("max_norm", above=0),
    ),
)


def clip_difference_(
    values: Tensor, start: Tensor, max_norm: float, *, backend: str | None = None
) -> float:
    """Bring `values - start` to an L2 norm of at most `max_norm`, in place.

    `values = start + (values - start) * (max_norm / norm)` where the norm is larger, in float64,
    rounded once to float32; else nothing is written. The rounding can leave the norm of the result
    above `max_norm`, by sqrt(n) × half a unit in the last place of the largest weight at most
    (1e-5 for 13 M weights of 0.1).

    Args:
        values: contiguous float32 tensor, any shape.
        start: as many float32 values, on the same device.
        max_norm: finite, above 0.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        The norm before, of float64 sums in one fixed order: the same bits on every backend. A GPU
        is waited for.

    Raises:
        TypeError: another dtype.
        ValueError: sizes or devices that differ, a tensor not contiguous, `max_norm` out of range,
            values that are not finite; nothing is changed.

    O(n): both are read once, and once more where something has to be cut. The clip of Abadi et al.
    2016 (arXiv 1607.00133) and McMahan et al. 2018 (arXiv 1710.06963).

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> values = torch.tensor([4.0, 5.0])
    >>> fs.ops.clip_difference_(values, torch.tensor([1.0, 1.0]), max_norm=1.0), values
    (5.0, tensor([1.6000, 1.8000]))
    """
    norm = None
    if direct(values, backend) and type(max_norm) in (int, float):
        norm = _clip.attempt(values, start, max_norm)
    if norm is None:
        _clip.check(values=values, start=start, max_norm=max_norm)
        norm = _clip(_checks.plain(values), _checks.plain(start), max_norm, backend=backend)
    return float(norm)
