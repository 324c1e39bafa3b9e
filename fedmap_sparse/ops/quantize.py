"""Fewer bits per value: float32 to float16 or bfloat16 and back, int8 by blocks with scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import native
from fedmap_sparse.ops._library import Op, direct
from fedmap_sparse.ops._rules import FLOAT32, Block, Dense


def cast_reference(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest, ties to even; NaN becomes the positive quiet NaN of a narrower `dtype`.

    torch rounds so as well, but keeps or changes the payload and sign of a NaN by device. Widening
    keeps both, as the hardware does.
    """
    if values.dtype == dtype:
        return values
    if torch.float32 not in (values.dtype, dtype):  # between the 16-bit types: by way of float32
        return cast_reference(values.to(torch.float32), dtype)
    cast = values.to(dtype)
    if values.dtype == torch.float16:
        gone = values.isnan()
        bits = values.view(torch.int16)[gone].to(torch.int32)
        quiet = (bits & 0x8000) << 16 | 0x7FC00000 | (bits & 0x3FF) << 13
        cast.view(torch.int32)[gone] = quiet
    if dtype != torch.float32:
        nan = 0x7E00 if dtype == torch.float16 else 0x7FC0
        cast.view(torch.int16)[values.isnan()] = nan
    return cast


def _cast_reference(values: Tensor, out: Tensor) -> Tensor:
    flat = values.reshape(-1)
    cast = cast_reference(flat, out.dtype)
    out.view(-1).copy_(cast)
    return (cast.isinf() & ~flat.isinf()).sum()


def _cast_cpu(values: Tensor, out: Tensor, threads: int, attempt: bool) -> Any:
    count = native.cast(values, out, threads, attempt)
    return count if attempt else torch.tensor(count, device="cpu")


_cast = Op(
    "cast_out(Tensor values, Tensor(a!) out) -> Tensor",
    lambda values, out: values.new_empty((), dtype=torch.int64),
    reference=_cast_reference,
    cpu=_cast_cpu,
    triton=lambda *a: _backends.kernels("quantize").cast_out(*a),
    rules=(
        Dense("values"),
        Dense("out", numel=lambda given: given["values"].numel(), beside="values", optional=True),
    ),
)


def cast(
    values: Tensor,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """Convert between float32, float16 and bfloat16: IEEE round to nearest, ties to even.

    Args:
        values: contiguous tensor of one of the three dtypes, any shape.
        dtype: the wanted dtype.
        out: contiguous tensor of `dtype` and of the same number of elements to fill.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        The converted tensor (shape of `values`, or `out`), and how many finite values overflowed
        to infinity. The count makes the host wait for a GPU.

    Raises:
        TypeError: another dtype.
        ValueError: sizes or devices that differ, a tensor not contiguous.

    O(n). NaN becomes 0x7e00 in float16, 0x7fc0 in bfloat16.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> fs.ops.cast(torch.tensor([1.5, 70000.0]), torch.float16)
    (tensor([1.5000,    inf], dtype=torch.float16), 1)
    """
    if dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    _checks.check_tensor("values", values)
    if out is None:
        out = torch.empty(values.shape, dtype=dtype, device=values.device)
    else:
        _checks.check_tensor("out", out, (dtype,))
    if direct(values, backend):
        count = _cast.attempt(values, out)
        if count is not None:
            return out, int(count)
    _cast.check(values=values, out=out)
    return out, int(_cast(_checks.plain(values), out, backend=backend))


def _finite_cpu(values: Tensor, threads: int, attempt: bool) -> Any:
    answer = native.all_finite(values, threads, attempt)
    return answer if attempt else torch.tensor(bool(answer), device="cpu")


_finite = Op(
    "all_finite(Tensor values) -> Tensor",
    lambda values: values.new_empty((), dtype=torch.bool),
    reference=lambda values: torch.isfinite(values).all(),
    cpu=_finite_cpu,
    triton=lambda *a: _backends.kernels("quantize").all_finite(*a),
    rules=(Dense("values"),),
)


def all_finite(values: Tensor, *, backend: str | None = None) -> bool:
    """Whether no element is NaN or infinite.

    Args:
        values: contiguous float32, float16 or bfloat16 tensor, any shape.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        True if every element is finite, and for no elements.

    Raises:
        TypeError: another dtype.
        ValueError: a tensor not contiguous.

    O(n), without a temporary of that size.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> fs.ops.all_finite(torch.tensor([1.0, float("nan")]))
    False
    """
    answer = _finite.attempt(values) if direct(values, backend) else None
    if answer is None:
        _finite.check(values=values)
        answer = _finite(_checks.plain(values), backend=backend)
    return bool(answer)


def _quantize_reference(
    values: Tensor, block: int, q: Tensor, scales: Tensor, residual: Tensor | None
) -> None:
    require_finite(torch.isfinite(values).all())
    x = values.reshape(-1)
    if residual is not None:
        x = x + residual
    rows = torch.nn.functional.pad(x, (0, -x.numel() % block)).view(-1, block)
    scale = rows.abs().amax(1) / rows.new_tensor(127.0)  # CUDA multiplies by a number's reciprocal
    steps = torch.where(scale[:, None] > 0, rows / scale[:, None], 0.0)
    codes = steps.round().clamp(-127, 127)  # torch rounds halves to even
    q.copy_(codes.reshape(-1)[: x.numel()].to(torch.int8))
    scales.copy_(scale)
    if residual is not None:
        residual.copy_((rows - codes * scale[:, None]).reshape(-1)[: x.numel()])


def _quantize_cpu(
    values: Tensor,
    block: int,
    q: Tensor,
    scales: Tensor,
    residual: Tensor | None,
    threads: int,
    attempt: bool,
) -> Any:
    finite = native.all_finite(values, threads, attempt)
    if finite is None:
        return None
    require_finite(finite)
    return native.quantize_int8(values, block, q, scales, residual, threads, attempt)


def _quantize_triton(*args: Any) -> None:
    kernels = _backends.kernels("quantize")
    require_finite(bool(kernels.all_finite(args[0])))
    kernels.quantize_int8_out(*args)


def require_finite(finite: object) -> None:
    """Raise ValueError unless an op's values were found finite."""
    if not finite:
        raise ValueError("values: expected finite values, got NaN or infinity")


def _dequantize_reference(q: Tensor, scales: Tensor, block: int) -> Tensor:
    rows = torch.nn.functional.pad(q.to(torch.float32), (0, -q.numel() % block)).view(-1, block)
    return (rows * scales[:, None]).reshape(-1)[: q.numel()]


def _dequantize_cpu(
    q: Tensor, scales: Tensor, block: int, threads: int, attempt: bool
) -> Tensor | None:
    out = torch.empty(q.numel(), dtype=torch.float32, device="cpu")
    done = native.dequantize_int8(q, scales, block, out, threads, attempt)
    return None if done is None else out


_quantize = Op(
    "quantize_int8_out(Tensor values, SymInt block, Tensor(a!) q, Tensor(b!) scales,"
    " Tensor(c!)? residual) -> ()",
    lambda values, block, q, scales, residual: None,
    reference=_quantize_reference,
    cpu=_quantize_cpu,
    triton=_quantize_triton,
    rules=(
        Dense("values", FLOAT32),
        Block(),
        Dense(
            "residual",
            FLOAT32,
            lambda given: given["values"].numel(),
            beside="values",
            optional=True,
        ),
    ),
)
_dequantize = Op(
    "dequantize_int8(Tensor q, Tensor scales, SymInt block) -> Tensor",
    lambda q, scales, block: q.new_empty(q.shape, dtype=torch.float32),
    reference=_dequantize_reference,
    cpu=_dequantize_cpu,
    triton=lambda *a: _backends.kernels("quantize").dequantize_int8(*a),
    rules=(
        Dense("q", (torch.int8,)),
        Block(),
        Dense(
            "scales",
            FLOAT32,
            lambda given: num_blocks(given["q"].numel(), given["block"]),
            beside="q",
        ),
    ),
)


def num_blocks(numel: int, block: int) -> int:
    """How many scales `numel` values have."""
    return -(-numel // block)


def quantize_int8(
    values: Tensor,
    *,
    block: int = 256,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Eight bits per value and a float32 scale per block.

    Per block, `scale = max|x| / 127` and `q = rint(x / scale)`, in IEEE float32.

    Args:
        values: contiguous float32 tensor, finite, any shape.
        block: values per scale, a multiple of 64 from 64 to 1024; the last block may be short.
        residual: float32 tensor of as many elements, updated in place: the error of the last
            call, added to the values first, then replaced by this call's (error feedback, Seide
            et al. 2014). Start it with zeros.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        q: int8 tensor, 1-D, codes from -127 to 127; scales: float32 tensor [ceil(n / block)]. A
        block of zeros, or one whose scale underflows to 0, has scale 0 and codes 0.

    Raises:
        TypeError: another dtype.
        ValueError: sizes or devices that differ, a tensor not contiguous, values not finite.

    O(n): the values are read twice (once for the check), the codes written once.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> q, scales = fs.ops.quantize_int8(torch.tensor([127.0, -64.0, 1.4]))
    >>> q, scales
    (tensor([127, -64,   1], dtype=torch.int8), tensor([1.]))
    """
    _quantize.check(values=values, block=block, residual=residual)
    numel, device = values.numel(), values.device
    q = torch.empty(numel, dtype=torch.int8, device=device)
    scales = torch.empty(num_blocks(numel, block), dtype=torch.float32, device=device)
    done = None
    if direct(values, backend):
        done = _quantize.attempt(values, block, q, scales, residual)
    if done is not None:
        return q, scales
    _quantize(_checks.plain(values), block, q, scales, residual, backend=backend)
    return q, scales


def dequantize_int8(
    q: Tensor, scales: Tensor, *, block: int = 256, backend: str | None = None
) -> Tensor:
    """The inverse of `quantize_int8`, within scale / 2: `float32(q) * scale`.

    Args:
        q: contiguous int8 tensor.
        scales: float32 tensor [ceil(n / block)], on the same device.
        block: values per scale, as given to `quantize_int8`.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        A 1-D float32 tensor of as many elements as `q`.

    Raises:
        TypeError: `q` is not int8 or `scales` not float32.
        ValueError: sizes or devices that differ, a tensor not contiguous.

    O(n).

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> q = torch.tensor([127, -64], dtype=torch.int8)
    >>> fs.ops.dequantize_int8(q, torch.tensor([0.5]))
    tensor([ 63.5000, -32.0000])
    """
    if direct(q, backend):
        made = _dequantize.attempt(q, scales, block) if type(block) is int else None
        if made is not None:
            return made  # type: ignore[no-any-return]  # of C++
    _dequantize.check(q=q, scales=scales, block=block)
    out: Tensor = _dequantize(q.view(-1), scales, block, backend=backend)
    return out
