"""Survivors side by side, and back. Offsets come from the mask's rank index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _autocast, _backends, _checks
from fedmap_sparse._backends import native
from fedmap_sparse.mask import Mask, bool_from_words
from fedmap_sparse.ops._library import LIBRARY, Op, direct, follows, transformed
from fedmap_sparse.ops._rules import Bitmap, Dense
from fedmap_sparse.ops.quantize import cast_reference


def _pack_reference(values: Tensor, words: Tensor, rank: Tensor, out: Tensor) -> None:
    kept = values.reshape(-1)[bool_from_words(words, values.numel())]
    out.view(-1).copy_(cast_reference(kept, out.dtype))


def _pack_triton(*args: Any) -> None:
    _backends.kernels("pack").pack_out(*args)


def _unpack_reference(packed: Tensor, words: Tensor, rank: Tensor, out: Tensor) -> None:
    out.zero_()
    kept = bool_from_words(words, out.numel())
    out.view(-1)[kept] = cast_reference(packed.reshape(-1), out.dtype)


def _unpack_triton(*args: Any) -> None:
    _backends.kernels("pack").unpack_out(*args)


def _fresh(fill: Any) -> Any:
    """The form that returns a new tensor of `size` elements, over the one that fills `out`."""

    def run(source: Tensor, words: Tensor, rank: Tensor, size: int, *how: Any) -> Tensor:
        out = source.new_empty(size)
        fill(source, words, rank, out, *how)
        return out

    return run


_FRESH = "(Tensor source, Tensor words, Tensor rank, SymInt size) -> Tensor"
_INTO = "(Tensor source, Tensor words, Tensor rank, Tensor(a!) out) -> ()"

_pack = Op(
    "pack" + _FRESH,
    lambda source, words, rank, size: source.new_empty(size),
    reference=_fresh(_pack_reference),
    cpu=_fresh(getattr(native, "pack", None)),
    triton=_fresh(_pack_triton),
)
_unpack = Op(
    "unpack" + _FRESH,
    lambda source, words, rank, size: source.new_empty(size),
    reference=_fresh(_unpack_reference),
    cpu=_fresh(getattr(native, "unpack", None)),
    triton=_fresh(_unpack_triton),
)
_pack_out = Op(
    "pack_out" + _INTO,
    lambda source, words, rank, out: None,
    reference=_pack_reference,
    cpu="pack",
    triton=_pack_triton,
    rules=(
        Dense("values"),
        Bitmap("mask", lambda given: given["values"].numel(), "values"),
        Dense("out", numel=lambda given: given["mask"].nnz, beside="values", optional=True),
    ),
)
_unpack_out = Op(
    "unpack_out" + _INTO,
    lambda source, words, rank, out: None,
    reference=_unpack_reference,
    cpu="unpack",
    triton=_unpack_triton,
    rules=(
        Dense("packed"),
        Bitmap("mask"),
        Dense("packed", numel=lambda given: given["mask"].nnz, why="the mask's nnz"),
        Bitmap("mask", beside="packed"),
        Dense("out", numel=lambda given: given["mask"].numel, beside="packed", optional=True),
    ),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, words, rank, *ctx.rest = inputs
    ctx.save_for_backward(words, rank)
    ctx.shape = source.shape


def _row_by_row(form: Any, dims: Sequence[int | None], source: Tensor, *rest: Any) -> Any:
    """A batch of sources under one mask."""
    if dims[0] is None or any(dim is not None for dim in dims[1:]):
        raise NotImplementedError("vmap: expected a batch of tensors under one mask")
    rows = source.movedim(dims[0], 0).unbind()
    return _autocast.stack([form(row.contiguous(), *rest) for row in rows]), 0


def _register_transforms(op: Op, adjoint: Op) -> None:
    """Autograd and vmap for every form of `op`.

    Each op is the other's adjoint: a pruned element has no gradient, a survivor passes it through.
    """
    for form, back in zip(op.overloads, adjoint.overloads, strict=True):

        def backward(ctx: Any, grad: Tensor, back: Any = back) -> tuple[Tensor | None, ...]:
            words, rank = ctx.saved_tensors
            dense = back(grad.contiguous(), words, rank, ctx.shape.numel())
            return dense.view(ctx.shape), None, None, None

        def batched(info: Any, dims: tuple[int | None, ...], *args: Any, form: Any = form) -> Any:
            return _row_by_row(form, dims, *args)

        torch.library.register_autograd(form, backward, setup_context=_setup, lib=LIBRARY)
        torch.library.register_vmap(form, batched, lib=LIBRARY)


_register_transforms(_pack, _unpack)
_register_transforms(_unpack, _pack)


class _Linear(torch.autograd.Function):
    """The same for torch.func's transforms, which refuse what torch.library registers."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *rest, op, _, backend = args
        return op(*rest, backend=backend)

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        words, rank = ctx.saved_tensors
        _, op, adjoint, backend = ctx.rest
        grad, numel = grads[0].contiguous(), ctx.shape.numel()
        where = (grad, words, rank, numel)
        dense: Any = _Linear.apply(*where, adjoint, op, backend)  # type: ignore[no-untyped-call]
        return (dense.view(ctx.shape), *[None] * 6)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *args: Any) -> Any:
        return _row_by_row(_Linear.apply, dims, *args)


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
        Tensor[nnz] of the values' dtype, or `out`. Without `out`: differentiable in `values`, and
        `torch.func.vmap` maps over them under one mask.

    Raises:
        TypeError: another dtype.
        ValueError: sizes or devices that differ, a tensor not contiguous.

    O(n / 32 + nnz) reads beyond the memory lines that hold a survivor.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> mask = fs.Mask.from_bool(torch.tensor([True, False, True, False]))
    >>> fs.ops.pack(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    tensor([1., 3.])
    """
    if (
        direct(values, backend)
        and isinstance(mask, Mask)
        and mask.numel == values.numel()
        and not (out is None and follows(values))
    ):
        target = values.new_empty(mask.nnz) if out is None else out
        if _pack_out.attempt(values, mask.words, mask.rank, target) is not None:
            return target
    values = _row_major(values)
    _pack_out.check(values=values, mask=mask, out=out)
    return _run(_pack, _pack_out, values, mask, mask.nnz, out, backend)


def unpack(
    packed: Tensor, mask: Mask, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Survivors back in their places: the inverse of `pack`, +0.0 where pruned.

    Args:
        packed: contiguous float32, float16 or bfloat16 tensor of `mask.nnz` elements.
        mask: where they belong, on the same device.
        out: contiguous tensor of `mask.numel` elements to fill and return, of any of these dtypes;
            every element is written.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        Tensor[numel] of the packed values' dtype, or `out`. Differentiable as `pack` is.

    Raises:
        TypeError: another dtype.
        ValueError: sizes or devices that differ, a tensor not contiguous.

    O(n): each element is written once.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> mask = fs.Mask.from_bool(torch.tensor([True, False, True, False]))
    >>> fs.ops.unpack(torch.tensor([1.0, 3.0]), mask)
    tensor([1., 0., 3., 0.])
    """
    if (
        direct(packed, backend)
        and isinstance(mask, Mask)
        and (out is None or (isinstance(out, Tensor) and out.numel() == mask.numel))
        and not (out is None and follows(packed))
    ):
        target = packed.new_empty(mask.numel) if out is None else out
        if _unpack_out.attempt(packed, mask.words, mask.rank, target) is not None:
            return target
    packed = _row_major(packed)
    _unpack_out.check(packed=packed, mask=mask, out=out)
    return _run(_unpack, _unpack_out, packed, mask, mask.numel, out, backend)


def _row_major(source: Tensor) -> Tensor:
    """Under vmap strides are those of the batch, which a user does not see."""
    return source.contiguous() if transformed() and isinstance(source, Tensor) else source


def _run(
    fresh: Op,
    into: Op,
    source: Tensor,
    mask: Mask,
    size: int,
    out: Tensor | None,
    backend: str | None,
) -> Tensor:
    result: Tensor
    if out is None and transformed():
        adjoint = _unpack if fresh is _pack else _pack
        where = (source, mask.words, mask.rank, size)
        result = _Linear.apply(*where, fresh, adjoint, backend)  # type: ignore[no-untyped-call]
        return result
    if out is None and (follows(source) or torch.compiler.is_compiling()):
        result = fresh(source, mask.words, mask.rank, size, backend=backend)
        return result
    if out is None:
        out = source.new_empty(size)  # autograd's part of the other op costs 6 us
    into(_checks.plain(source), mask.words, mask.rank, out, backend=backend)
    return out
