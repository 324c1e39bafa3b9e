"""Survivors side by side, and back. Offsets come from the mask's rank index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import define, native
from fedmap_sparse.mask import Mask, bool_from_words
from fedmap_sparse.ops.quantize import cast_reference


def _pack_out_reference(values: Tensor, words: Tensor, rank: Tensor, out: Tensor) -> None:
    kept = values.reshape(-1)[bool_from_words(words, values.numel())]
    out.view(-1).copy_(cast_reference(kept, out.dtype))


def _pack_out_cpu(values: Tensor, words: Tensor, rank: Tensor, out: Tensor) -> None:
    native.pack(values, words, rank, values.numel(), out, _backends.threads(), False)


def _unpack_out_reference(packed: Tensor, words: Tensor, rank: Tensor, out: Tensor) -> None:
    out.zero_()
    kept = bool_from_words(words, out.numel())
    out.view(-1)[kept] = cast_reference(packed.reshape(-1), out.dtype)


def _unpack_out_cpu(packed: Tensor, words: Tensor, rank: Tensor, out: Tensor) -> None:
    native.unpack(packed, words, rank, out.numel(), out, _backends.threads(), False)


def _pack_out_triton(*args: Any) -> None:
    _backends.kernels("pack").pack_out(*args)


def _unpack_out_triton(*args: Any) -> None:
    _backends.kernels("pack").unpack_out(*args)


_OUT = {
    "pack": {"reference": _pack_out_reference, "cpu": _pack_out_cpu, "triton": _pack_out_triton},
    "unpack": {
        "reference": _unpack_out_reference,
        "cpu": _unpack_out_cpu,
        "triton": _unpack_out_triton,
    },
}


def _fresh(stem: str, backend: str) -> Any:
    """The form that returns a new tensor of `size` elements, over the one that fills `out`."""
    fill = _OUT[stem][backend]

    def run(source: Tensor, words: Tensor, rank: Tensor, size: int) -> Tensor:
        out = source.new_empty(size)
        fill(source, words, rank, out)
        return out

    return run


def _define(stem: str) -> tuple[Any, Any]:
    fresh = define(
        f"{stem}(Tensor source, Tensor words, Tensor rank, SymInt size, str backend) -> Tensor",
        lambda source, words, rank, size: source.new_empty(size),
        **{name: _fresh(stem, name) for name in _OUT[stem]},
    )
    into = define(
        f"{stem}_out(Tensor source, Tensor words, Tensor rank, Tensor(a!) out, str backend) -> ()",
        lambda source, words, rank, out: None,
        **_OUT[stem],
    )
    return fresh, into


_pack_op, _pack_out_op = _define("pack")
_unpack_op, _unpack_out_op = _define("unpack")


# Each is the other's adjoint: a pruned element has no gradient, a survivor passes it through.
def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, words, rank, _, backend = inputs
    ctx.save_for_backward(words, rank)
    ctx.shape, ctx.backend = source.shape, backend


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, rank = ctx.saved_tensors
    size = ctx.shape.numel()
    back = _unpack_op(grad.contiguous(), words, rank, size, ctx.backend)
    return back.view(ctx.shape), None, None, None, None


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, rank = ctx.saved_tensors
    size = ctx.shape.numel()
    back = _pack_op(grad.contiguous(), words, rank, size, ctx.backend)
    return back.view(ctx.shape), None, None, None, None


_register = torch.library.register_autograd
_register("fedmap_sparse::pack", _pack_backward, setup_context=_setup, lib=_backends._library)
_register("fedmap_sparse::unpack", _unpack_backward, setup_context=_setup, lib=_backends._library)


def _direct(stem: str, source: Tensor, mask: Mask, size: int, out: Tensor | None) -> Tensor | None:
    """Straight to C++; None where that does not do, or autograd has to follow."""
    if out is not None:
        target = out
    elif source.requires_grad and torch.is_grad_enabled():
        return None
    else:
        target = source.new_empty(size)
    kernel, threads = getattr(native, stem), _backends.threads()
    if kernel(source, mask.words, mask.rank, mask.numel, target, threads, True) is None:
        return None
    if out is not None:
        _backends.written(out)
    return target


def pack(
    values: Tensor, mask: Mask, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The survivors of `values`, in index order.

    Args:
        values: contiguous float32, float16 or bfloat16 tensor of `mask.numel` elements, any shape.
        mask: which elements survive, on the same device.
        out: contiguous tensor of `mask.nnz` elements to fill and return. It may have another of
            the float dtypes: values are converted on the way, rounded to nearest even.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        Tensor[nnz] of the values' dtype, or `out`. Differentiable in `values` without `out`.

    Raises:
        TypeError: another dtype.
        ValueError: sizes or devices that differ, a tensor not contiguous.

    O(n / 32 + nnz) reads beyond the memory lines that hold a survivor.
    """
    if _backends.direct(backend, values) and isinstance(mask, Mask):
        done = _direct("pack", values, mask, mask.nnz, out)
        if done is not None:
            return done
    _checks.check_tensor("values", values)
    _checks.check_mask("mask", mask, values.numel())
    _checks.check_same_device("mask", mask, values)
    picked = _backends.pick(backend, values.device)
    if out is None:
        if values.requires_grad and torch.is_grad_enabled():
            packed: Tensor = _pack_op(values, mask.words, mask.rank, mask.nnz, picked)
            return packed
        out = values.new_empty(mask.nnz)  # autograd's part of the other op costs 6 us
    else:
        _checks.check_out("out", out, mask.nnz, _checks.FLOAT_DTYPES, values.device)
    _pack_out_op(_checks.plain(values), mask.words, mask.rank, out, picked)
    return out


def unpack(
    packed: Tensor, mask: Mask, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The inverse of `pack`: a 1-D tensor of `mask.numel` elements, +0.0 where pruned.

    Arguments, conversion into `out`, errors and cost as in `pack`; every element is written.
    """
    if _backends.direct(backend, packed) and isinstance(mask, Mask):
        done = _direct("unpack", packed, mask, mask.numel, out)
        if done is not None:
            return done
    _checks.check_tensor("packed", packed)
    _checks.check_mask("mask", mask)
    _checks.check_numel("packed", packed, mask.nnz, "the mask's nnz")
    _checks.check_same_device("mask", mask, packed)
    picked = _backends.pick(backend, packed.device)
    if out is None:
        if packed.requires_grad and torch.is_grad_enabled():
            dense: Tensor = _unpack_op(packed, mask.words, mask.rank, mask.numel, picked)
            return dense
        out = packed.new_empty(mask.numel)
    else:
        _checks.check_out("out", out, mask.numel, _checks.FLOAT_DTYPES, packed.device)
    _unpack_out_op(_checks.plain(packed), mask.words, mask.rank, out, picked)
    return out
