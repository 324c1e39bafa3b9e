"""Weighted mean of packed payloads, never densified.

Products and sums are float64, in the order given, divided by the total weight and rounded once to
the payload's dtype: the same bits on every backend and at any thread count, and the mean of equal
payloads is that payload. (In float32, reversing ten clients changed 66% of the sums.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import native
from fedmap_sparse.ops._library import Op, direct
from fedmap_sparse.ops._rules import Alike, Dense, Weight
from fedmap_sparse.ops.quantize import cast_reference, num_blocks


def _is_weight(weight: object) -> bool:
    """Whether C++ may take it; what is no such number is for `Op.check` to judge."""
    return type(weight) in (int, float) and 0 < weight < math.inf  # type: ignore[operator]


def _round_reference(sums: Tensor, total: float, out: Tensor) -> Tensor:
    # By a tensor: CUDA multiplies by a number's reciprocal. Narrowed at once: by way of float32 it
    # would be rounded twice.
    out.view(-1).copy_(narrow(sums / sums.new_tensor(total), out.dtype))
    return (~torch.isfinite(out)).sum()


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to `dtype`, rounded once. Round-to-odd in float32 first makes the second step exact.

    Boldo and Melquiond 2008: an intermediate of two more bits, rounded to odd, rounds as if there
    had been none; float32 has 13 more than float16 and 16 more than bfloat16.
    """
    single = values.to(torch.float32)
    if dtype == torch.float32:
        return single
    wide = single.to(torch.float64)
    bits = single.view(torch.int32)
    inexact = (wide != values) & torch.isfinite(values)
    away = inexact & (wide.abs() > values.abs())
    odd = (bits - away.to(torch.int32)) | inexact.to(torch.int32)
    return cast_reference(odd.view(torch.float32), dtype)


def _mean_reference(payloads: list[Tensor], weights: list[float], out: Tensor) -> Tensor:
    sums = torch.zeros(out.numel(), dtype=torch.float64, device=out.device)
    for payload, weight in zip(payloads, weights, strict=True):
        sums += payload.reshape(-1).to(torch.float64) * weight
    return _round_reference(sums, _total(weights), out)


def _total(weights: Sequence[float]) -> float:
    total = 0.0
    for weight in weights:
        total += weight
    return total


def _add_reference(sums: Tensor, payload: Tensor, weight: float) -> None:
    sums += payload.reshape(-1).to(torch.float64) * weight


def finite_mean(fill: Any, of: str = "payloads") -> Callable[..., int | None]:
    """Raises if `fill`, which fills `out`, counts elements that are not finite.

    Inside of the op: to return the count as a tensor and read it took 3 us of 14.
    """

    def run(*args: Any) -> int | None:
        counted = fill(*args)
        if counted is None:
            return None
        if bad := int(counted):
            raise ValueError(f"{of}: expected a finite mean, got {bad} NaN or infinite elements")
        return 0

    return run


_mean = Op(
    "weighted_mean_out(Tensor[] payloads, float[] weights, Tensor(a!) out) -> ()",
    lambda payloads, weights, out: None,
    reference=finite_mean(_mean_reference),
    cpu=finite_mean(getattr(native, "weighted_mean", None)),
    triton=finite_mean(lambda *a: _backends.kernels("accumulate").weighted_mean_out(*a)),
    rules=(
        Alike("payloads", sized=True),
        Weight("weights", many=True),
        Dense(
            "out",
            numel=lambda given: given["payloads"][0].numel(),
            beside="first",
            optional=True,
        ),
    ),
)
_add = Op(
    "accumulate_add_(Tensor(a!) sums, Tensor payload, float weight) -> ()",
    lambda sums, payload, weight: None,
    reference=_add_reference,
    cpu="accumulate_add",
    triton=lambda *a: _backends.kernels("accumulate").accumulate_add_(*a),
    rules=(
        Dense(
            "payload",
            numel=lambda given: given["sums"].numel(),
            why="the accumulator's size",
            beside="sums",
        ),
        Weight("weight"),
    ),
)
_round = Op(
    "accumulate_mean_out(Tensor sums, float total, Tensor(a!) out) -> ()",
    lambda sums, total, out: None,
    reference=finite_mean(_round_reference),
    cpu=finite_mean(getattr(native, "accumulate_mean", None)),
    triton=finite_mean(lambda *a: _backends.kernels("accumulate").accumulate_mean_out(*a)),
    rules=(Dense("out", numel=lambda given: given["sums"].numel(), beside="sums", optional=True),),
)


def add_int8_(sums: Tensor, q: Tensor, scales: Tensor, block: int, weight: float) -> None:
    """`sums += weight * dequantize_int8(q, scales)` in float64, tile by tile.

    Args:
        sums: float64 tensor on the CPU, as are the others.
        q: int8 codes, as many.
        scales: float32, one per `block` codes.
        block: a multiple of 64.
        weight: factor of every value.

    Raises:
        ValueError: sizes or dtypes that disagree.

    O(n).
    """
    if native is not None:
        native.accumulate_add_int8(sums, q, scales, block, weight, _backends.threads(), False)
        return
    if q.numel() != sums.numel() or scales.numel() != num_blocks(q.numel(), block):
        raise ValueError("expected contiguous CPU tensors whose dtypes and sizes agree")
    each = scales.repeat_interleave(block)[: q.numel()]
    sums += (q.to(torch.float32) * each).to(torch.float64) * weight


def weighted_mean(
    payloads: Sequence[Tensor],
    weights: Sequence[float],
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`sum(w * p) / sum(w)` over clients, in float64, in the order given, rounded once.

    Args:
        payloads: at least one; contiguous tensors of one size, dtype (float32, float16, bfloat16)
            and device. Not written; they may be views of message bytes.
        weights: one finite number above 0 per payload, e.g. sample counts.
        out: contiguous tensor of that size, on that device, of any of the three dtypes, to fill.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        A new 1-D tensor of the payloads' dtype, or `out`.

    Raises:
        ValueError: no payloads, sizes or devices that differ, a weight out of range, or a mean
            that is not finite (`out` is then undefined).
        TypeError: another dtype, or dtypes mixed.

    O(clients * n): each payload is read once, the result written once.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> fs.ops.weighted_mean([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])], [1, 3])
    tensor([2.5000, 2.0000])
    """
    if not payloads:
        raise ValueError("payloads: expected at least one, got none")
    if len(weights) != len(payloads):
        raise ValueError(f"weights: expected {len(payloads)}, one per payload, got {len(weights)}")
    first = payloads[0]
    if direct(first, backend) and all(map(_is_weight, weights)):
        target = first.new_empty(first.numel()) if out is None else out
        # A tuple keeps the payloads alive while the GIL is released.
        if _mean.attempt(tuple(payloads), weights, target) is not None:
            return target
    weights = [_checks.number(w) for w in weights]
    _mean.check(payloads=payloads, weights=weights, out=out, first=first)
    if out is None:
        out = torch.empty(first.numel(), dtype=first.dtype, device=first.device)
    numbers = [float(w) for w in weights]
    _mean([_checks.plain(p) for p in payloads], numbers, out, backend=backend)
    return out


class Accumulator:
    """The streaming form of `weighted_mean`: the same bits for the same order.

    Holds one float64 per element, whatever the number of clients.

    Args:
        numel: size of each payload.
        device: where payloads are added.
        backend: "reference", "cpu" or "triton"; None: by device.

    Attributes:
        sums: float64 tensor [numel], the weighted sums so far.
        total: the weights added so far.

    Raises:
        ValueError, RuntimeError: a backend that cannot serve the device or is not available.

    >>> import torch
    >>> a = Accumulator(3)
    >>> a.add(torch.tensor([1.0, 2.0, 3.0]), 1)
    >>> a.add(torch.tensor([3.0, 2.0, 1.0]), 3)
    >>> a
    Accumulator(numel=3, total=4.0, device=cpu)
    >>> a.mean()
    tensor([2.5000, 2.0000, 1.5000])
    """

    def __init__(
        self, numel: int, *, device: torch.device | str = "cpu", backend: str | None = None
    ) -> None:
        self.sums = torch.zeros(numel, dtype=torch.float64, device=device)
        self.total = 0.0
        self._backend = _backends.forced(backend, self.sums.device)

    def __repr__(self) -> str:
        numel, device = self.sums.numel(), self.sums.device
        return f"Accumulator(numel={numel}, total={self.total}, device={device})"

    def add(self, payload: Tensor, weight: float) -> None:
        """Add `weight * payload`.

        Args:
            payload: contiguous float32, float16 or bfloat16 tensor of `numel` elements.
            weight: a finite number above 0.

        Raises:
            TypeError: another dtype, or a weight that is no number.
            ValueError: sizes or devices that differ, a weight out of range; nothing was added.

        O(n).
        """
        done = None
        if direct(payload, self._backend) and _is_weight(weight):
            done = _add.attempt(self.sums, payload, weight)
        if done is None:
            weight = _checks.number(weight)
            _add.check(sums=self.sums, payload=payload, weight=weight)
            _add(self.sums, _checks.plain(payload), float(weight), backend=self._backend)
        self.total += weight

    def mean(self, *, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The mean so far, rounded once.

        Args:
            dtype: of the result, without `out`.
            out: contiguous tensor of `numel` elements to fill.

        Raises:
            TypeError: another dtype.
            ValueError: nothing was added, a mean that is not finite (`out` is then undefined), or
                sizes or devices that differ.

        O(n).
        """
        if self.total == 0.0:
            raise ValueError("mean: expected at least one payload, got none")
        if out is None:
            out = torch.empty(self.sums.numel(), dtype=dtype, device=self.sums.device)
        done = None
        if direct(out, self._backend):
            done = _round.attempt(self.sums, self.total, out)
        if done is None:
            _round.check(sums=self.sums, out=out)
            _round(self.sums, self.total, out, backend=self._backend)
        return out
