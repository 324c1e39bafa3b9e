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
from fedmap_sparse._backends import define, native
from fedmap_sparse.ops.quantize import cast_reference

_CODES = _checks.DTYPE_CODES


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


def _mean_cpu(payloads: list[Tensor], weights: list[float], out: Tensor) -> int:
    count: int = native.weighted_mean(payloads, weights, out, _backends.threads(), False)
    return count


def _add_reference(sums: Tensor, payload: Tensor, weight: float) -> None:
    sums += payload.reshape(-1).to(torch.float64) * weight


def _add_cpu(sums: Tensor, payload: Tensor, weight: float) -> None:
    native.accumulate_add(
        sums.data_ptr(),
        payload.data_ptr(),
        _CODES[payload.dtype],
        weight,
        sums.numel(),
        _backends.threads(),
    )


def _round_cpu(sums: Tensor, total: float, out: Tensor) -> int:
    count: int = native.accumulate_mean(
        sums.data_ptr(),
        total,
        sums.numel(),
        out.data_ptr(),
        _CODES[out.dtype],
        _backends.threads(),
    )
    return count


def _finite(fill: Callable[..., Tensor | int]) -> Callable[..., None]:
    """Raises if `fill`, which fills `out`, counts elements that are not finite.

    Inside of the op: to return the count as a tensor and read it took 3 us of 14.
    """

    def run(*args: Any) -> None:
        _check_finite(int(fill(*args)))

    return run


def _check_finite(bad: int) -> None:
    if bad:
        message = f"payloads: expected a finite mean, got {bad} NaN or infinite elements"
        raise ValueError(message)


_mean_op = define(
    "weighted_mean_out(Tensor[] payloads, float[] weights, Tensor(a!) out, str backend) -> ()",
    lambda payloads, weights, out: None,
    reference=_finite(_mean_reference),
    cpu=_finite(_mean_cpu),
    triton=_finite(lambda *a: _backends.kernels("accumulate").weighted_mean_out(*a)),
)
_add_op = define(
    "accumulate_add_(Tensor(a!) sums, Tensor payload, float weight, str backend) -> ()",
    lambda sums, payload, weight: None,
    reference=_add_reference,
    cpu=_add_cpu,
    triton=lambda *a: _backends.kernels("accumulate").accumulate_add_(*a),
)
_round_op = define(
    "accumulate_mean_out(Tensor sums, float total, Tensor(a!) out, str backend) -> ()",
    lambda sums, total, out: None,
    reference=_finite(_round_reference),
    cpu=_finite(_round_cpu),
    triton=_finite(lambda *a: _backends.kernels("accumulate").accumulate_mean_out(*a)),
)


def _check_weight(weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"weight: expected a number, got {type(weight).__name__}")
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"weight: expected a finite number above 0, got {weight}")
    return float(weight)


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
        weights: one finite number above 0 each, e.g. sample counts.
        out: contiguous tensor of that size, device and any of the three dtypes, to fill.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        A new 1-D tensor of the payloads' dtype, or `out`.

    Raises:
        ValueError: no payloads, sizes or devices that differ, a weight out of range, or a mean
            that is not finite (`out` is then undefined).
        TypeError: another dtype, or dtypes mixed.

    O(clients * n): each payload is read once, the result written once.
    """
    if not payloads:
        raise ValueError("payloads: expected at least one, got none")
    if len(weights) != len(payloads):
        raise ValueError(f"weights: expected {len(payloads)}, one a payload, got {len(weights)}")
    first = payloads[0]
    if _backends.direct(backend, first):
        target = first.new_empty(first.numel()) if out is None else out
        checked = [_check_weight(w) for w in weights]
        # A tuple, so that nobody takes a payload away meanwhile.
        bad = native.weighted_mean(tuple(payloads), checked, target, _backends.threads(), True)
        if bad is not None:
            if out is not None:
                _backends.written(out)
            _check_finite(bad)
            return target
    for p in payloads:
        _checks.check_tensor("payloads", p)
        _check_like("payloads", p, first)
    checked = [_check_weight(w) for w in weights]
    if out is None:
        out = torch.empty(first.numel(), dtype=first.dtype, device=first.device)
    else:
        _checks.check_out("out", out, first.numel(), _checks.FLOAT_DTYPES, first.device)
    picked = _backends.pick(backend, first.device)
    _mean_op([_checks.plain(p) for p in payloads], checked, out, picked)
    return out


def _check_like(name: str, p: Tensor, first: Tensor) -> None:
    if p.dtype != first.dtype:
        wanted, got = _checks.short(first.dtype), _checks.short(p.dtype)
        raise TypeError(f"{name}: expected one dtype, {wanted}, got {got}")
    _checks.check_numel(name, p, first.numel(), "the size of the first")
    _checks.check_device(name, p, first.device)


class Accumulator:
    """The streaming form of `weighted_mean`: the same bits for the same order.

    Holds one float64 a survivor, whatever the number of clients.

    >>> import torch
    >>> a = Accumulator(3)
    >>> a.add(torch.tensor([1.0, 2.0, 3.0]), 1)
    >>> a.add(torch.tensor([3.0, 2.0, 1.0]), 3)
    >>> a.mean()
    tensor([2.5000, 2.0000, 1.5000])
    """

    def __init__(
        self, numel: int, *, device: torch.device | str = "cpu", backend: str | None = None
    ) -> None:
        self.sums = torch.zeros(numel, dtype=torch.float64, device=device)
        self.total = 0.0
        self._backend = _backends.pick(backend, self.sums.device)

    def add(self, payload: Tensor, weight: float) -> None:
        """Add `weight * payload`. Arguments and errors as in `weighted_mean`; O(n)."""
        _checks.check_tensor("payload", payload)
        _checks.check_numel("payload", payload, self.sums.numel(), "the accumulator's size")
        _checks.check_device("payload", payload, self.sums.device)
        checked = _check_weight(weight)
        _add_op(self.sums, _checks.plain(payload), checked, self._backend)
        self.total += checked

    def mean(self, *, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The mean so far, rounded once to `dtype`; ValueError if empty or not finite."""
        if self.total == 0.0:
            raise ValueError("mean: expected at least one payload, got none")
        if out is None:
            out = torch.empty(self.sums.numel(), dtype=dtype, device=self.sums.device)
        _checks.check_out("out", out, self.sums.numel(), _checks.FLOAT_DTYPES, self.sums.device)
        _round_op(self.sums, self.total, out, self._backend)
        return out
