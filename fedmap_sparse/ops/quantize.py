"""Fewer bits per value: float32 to float16 or bfloat16 and back, int8 by blocks with scales."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import define, native

_CODES = _checks.DTYPE_CODES


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


def _cast_cpu(values: Tensor, out: Tensor) -> Tensor:
    return torch.tensor(
        native.cast(
            values.data_ptr(),
            _CODES[values.dtype],
            out.data_ptr(),
            _CODES[out.dtype],
            values.numel(),
            _backends.threads(),
        )
    )


_cast_op = define(
    "cast_out(Tensor values, Tensor(a!) out, str backend) -> Tensor",
    lambda values, out: values.new_empty((), dtype=torch.int64),
    reference=_cast_reference,
    cpu=_cast_cpu,
    triton=lambda *a: _backends.kernels("quantize").cast_out(*a),
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
        to infinity.

    Raises:
        TypeError: another dtype.
        ValueError: sizes or devices that differ, a tensor not contiguous.

    O(n). NaN becomes 0x7e00 in float16, 0x7fc0 in bfloat16.
    """
    _checks.check_tensor("values", values)
    if dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    if out is None:
        out = torch.empty(values.shape, dtype=dtype, device=values.device)
    else:
        _checks.check_out("out", out, values.numel(), (dtype,), values.device)
    overflowed = _cast_op(_checks.plain(values), out, _backends.pick(backend, values.device))
    return out, int(overflowed)


def all_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite. O(n), without a temporary of that size."""
    _checks.check_tensor("values", values)
    backend = _backends.pick(None, values.device)
    if backend == "cpu":
        return bool(
            native.all_finite(
                values.data_ptr(), _CODES[values.dtype], values.numel(), _backends.threads()
            )
        )
    if backend == "triton":
        return bool(_backends.on_device(_backends.kernels("quantize").all_finite, (values,)))
    return bool(torch.isfinite(values).all())


def _quantize_reference(
    values: Tensor, block: int, q: Tensor, scales: Tensor, residual: Tensor | None
) -> None:
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
    values: Tensor, block: int, q: Tensor, scales: Tensor, residual: Tensor | None
) -> None:
    native.quantize_int8(
        values.data_ptr(),
        values.numel(),
        block,
        q.data_ptr(),
        scales.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        _backends.threads(),
    )


def _dequantize_reference(q: Tensor, scales: Tensor, block: int) -> Tensor:
    rows = torch.nn.functional.pad(q.to(torch.float32), (0, -q.numel() % block)).view(-1, block)
    return (rows * scales[:, None]).reshape(-1)[: q.numel()]


def _dequantize_cpu(q: Tensor, scales: Tensor, block: int) -> Tensor:
    out = torch.empty(q.numel(), dtype=torch.float32)
    native.dequantize_int8(
        q.data_ptr(), scales.data_ptr(), block, q.numel(), out.data_ptr(), _backends.threads()
    )
    return out


_quantize_op = define(
    "quantize_int8_out(Tensor values, SymInt block, Tensor(a!) q, Tensor(b!) scales,"
    " Tensor(c!)? residual, str backend) -> ()",
    lambda values, block, q, scales, residual: None,
    reference=_quantize_reference,
    cpu=_quantize_cpu,
    triton=lambda *a: _backends.kernels("quantize").quantize_int8_out(*a),
)
_dequantize_op = define(
    "dequantize_int8(Tensor q, Tensor scales, SymInt block, str backend) -> Tensor",
    lambda q, scales, block: q.new_empty(q.shape, dtype=torch.float32),
    reference=_dequantize_reference,
    cpu=_dequantize_cpu,
    triton=lambda *a: _backends.kernels("quantize").dequantize_int8(*a),
)


def num_blocks(numel: int, block: int) -> int:
    """Scales of `numel` values."""
    return -(-numel // block)


def _check_block(block: int) -> None:
    if isinstance(block, bool) or not isinstance(block, int):
        raise TypeError(f"block: expected an int, got {type(block).__name__}")
    if not 64 <= block <= 1024 or block % 64:
        raise ValueError(f"block: expected a multiple of 64 from 64 to 1024, got {block}")


def quantize_int8(
    values: Tensor,
    *,
    block: int = 256,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Eight bits a value, a float32 scale a block: `scale = max|x| / 127`, `q = rint(x / scale)`.

    Args:
        values: contiguous float32 tensor, finite, any shape.
        block: values a scale, a multiple of 64 from 64 to 1024; the last block may be short.
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

    O(n).
    """
    _checks.check_tensor("values", values, (torch.float32,))
    _check_block(block)
    if residual is not None:
        _checks.check_out("residual", residual, values.numel(), (torch.float32,), values.device)
    if not all_finite(values):
        raise ValueError("values: expected finite values, got NaN or infinity")
    q = torch.empty(values.numel(), dtype=torch.int8, device=values.device)
    scales = torch.empty(num_blocks(values.numel(), block), device=values.device)
    _quantize_op(
        _checks.plain(values), block, q, scales, residual, _backends.pick(backend, values.device)
    )
    return q, scales


def dequantize_int8(
    q: Tensor, scales: Tensor, *, block: int = 256, backend: str | None = None
) -> Tensor:
    """`float32(q) * scale`: a 1-D float32 tensor. The inverse of `quantize_int8`, within scale / 2.

    Raises:
        TypeError: `q` is not int8 or `scales` not float32.
        ValueError: sizes or devices that differ, a tensor not contiguous.
    """
    _checks.check_tensor("q", q, (torch.int8,))
    _check_block(block)
    _checks.check_out("scales", scales, num_blocks(q.numel(), block), (torch.float32,), q.device)
    out: Tensor = _dequantize_op(q.view(-1), scales, block, _backends.pick(backend, q.device))
    return out
