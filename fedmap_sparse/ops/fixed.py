"""Fixed-point integers for sums modulo 2^32: what secure aggregation adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import native
from fedmap_sparse.ops._library import Op, direct
from fedmap_sparse.ops._rules import FLOAT32, Dense, Number
from fedmap_sparse.ops.quantize import require_finite

#: Types of clip, scale and weight that C++ may take.
_NUMBERS = {(a, b, int) for a in (int, float) for b in (int, float)}


def _to_reference(values: Tensor, clip: float, scale: float, weight: int, out: Tensor) -> Tensor:
    require_finite(torch.isfinite(values).all())
    x = values.reshape(-1).double()
    cut = x.clamp(-clip, clip)
    out.view(-1).copy_((cut * scale).round().to(torch.int32) * weight)  # halves to even
    return (cut != x).sum()


def _to_cpu(
    values: Tensor,
    clip: float,
    scale: float,
    weight: int,
    out: Tensor,
    threads: int,
    attempt: bool,
) -> Any:
    finite = native.all_finite(values, threads, attempt)
    if finite is None:
        return None
    require_finite(finite)
    count = native.to_fixed(values, clip, scale, weight, out, threads, attempt)
    return count if attempt else torch.tensor(count, device="cpu")


def _to_triton(values: Tensor, *rest: Any) -> Tensor:
    require_finite(bool(_backends.kernels("quantize").all_finite(values)))
    beyond: Tensor = _backends.kernels("fixed").to_fixed_out(values, *rest)
    return beyond


_to = Op(
    "to_fixed_out(Tensor values, float clip, float scale, int weight, Tensor(a!) out) -> Tensor",
    lambda values, clip, scale, weight, out: values.new_empty((), dtype=torch.int64),
    reference=_to_reference,
    cpu=_to_cpu,
    triton=_to_triton,
    rules=(
        Dense("values", FLOAT32),
        Number("clip", above=0),
        Number("scale", above=0),
        Number("weight", least=1, below=2**31, whole=True),
    ),
)


def _from_reference(sums: Tensor, divisor: float) -> Tensor:
    wide = sums.double()
    return (wide / wide.new_tensor(divisor)).float()  # CUDA multiplies by a number's reciprocal


def _from_cpu(sums: Tensor, divisor: float, threads: int, attempt: bool) -> Tensor | None:
    out = torch.empty(sums.shape, dtype=torch.float32, device="cpu")
    done = native.from_fixed(sums, divisor, out, threads, attempt)
    return None if done is None else out


_from = Op(
    "from_fixed(Tensor sums, float divisor) -> Tensor",
    lambda sums, divisor: sums.new_empty(sums.shape, dtype=torch.float32),
    reference=_from_reference,
    cpu=_from_cpu,
    triton=lambda *a: _backends.kernels("fixed").from_fixed(*a),
    rules=(Dense("sums", (torch.int32,)), Number("divisor", above=0)),
)


def to_fixed(
    values: Tensor,
    *,
    clip: float,
    scale: float,
    weight: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """`weight * rint(clamp(value, -clip, clip) * scale)` as int32.

    Sums of these modulo 2^32 (torch adds int32 so) are exact while the sum of all weights times
    `clip * scale` stays below 2^31. Rounding is to the nearest step, halves to even: no random
    bits, an error of at most half a step (1 / scale) for each client, so for their mean.

    Args:
        values: contiguous float32 tensor, finite, any shape.
        clip: largest magnitude that is kept, above 0.
        scale: steps per unit, above 0. A power of two multiplies exactly.
        weight: of this client in a weighted sum, at least 1.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        int32 of the shape of `values`, and how many values were cut. A GPU is waited for.

    Raises:
        TypeError: another dtype.
        ValueError: values not finite, a number out of range, `clip * scale * weight` of 2^31 - 1 or
            more.

    O(n): the values are read twice, once for the check. The form of Bonawitz et al. 2017
    (SecAgg) and Bell et al. 2020 (SecAgg+).

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> fs.ops.to_fixed(torch.tensor([0.5, -3.0, 0.3]), clip=1.0, scale=4.0)
    (tensor([ 2, -4,  1], dtype=torch.int32), 1)
    """
    _to.check(values=values, clip=clip, scale=scale, weight=weight)
    if not clip * scale * weight < 2**31 - 1:
        raise ValueError(
            f"clip * scale * weight: expected below 2^31 - 1, got {clip * scale * weight:g}"
        )
    out = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    count = None
    if direct(values, backend) and (type(clip), type(scale), type(weight)) in _NUMBERS:
        count = _to.attempt(values, clip, scale, weight, out)
    if count is None:
        count = _to(_checks.plain(values), clip, scale, weight, out, backend=backend)
    return out, int(count)


def from_fixed(sums: Tensor, divisor: float, *, backend: str | None = None) -> Tensor:
    """`float32(sum / divisor)`, the quotient in float64.

    Args:
        sums: contiguous int32 tensor: sums of `to_fixed` modulo 2^32.
        divisor: `scale` times the sum of the weights gives the weighted mean; above 0.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        float32 of the shape of `sums`.

    Raises:
        TypeError: another dtype.
        ValueError: a tensor not contiguous, a divisor out of range.

    O(n).

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> fs.ops.from_fixed(torch.tensor([6, -8], dtype=torch.int32), divisor=4.0 * 2)
    tensor([ 0.7500, -1.0000])
    """
    if direct(sums, backend) and type(divisor) in (int, float):
        made = _from.attempt(sums, divisor)
        if made is not None:
            return made  # type: ignore[no-any-return]  # of C++
    _from.check(sums=sums, divisor=divisor)
    out: Tensor = _from(sums, divisor, backend=backend)
    return out
