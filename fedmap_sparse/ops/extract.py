"""Masks of masks: a child's bits over its parent's survivors, and back.

Since masks only shrink, a child needs one bit per survivor of its parent: `extract` takes those
bits out, `deposit` puts them back (pext and pdep on 64-bit words, prefix counts on a GPU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends
from fedmap_sparse._backends import native
from fedmap_sparse.mask import (
    Mask,
    bool_from_words,
    rank_index,
    unfilled,
    unfilled_cpu,
    words_from_bool,
)
from fedmap_sparse.ops._library import Op, direct
from fedmap_sparse.ops._rules import Bitmap


def _extract_reference(
    mask: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    words = words_from_bool(bool_from_words(mask, numel)[bool_from_words(parent, numel)])
    return words, rank_index(words, nnz, "reference")


def _deposit_reference(
    bits: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    keep = bool_from_words(parent, numel).clone()
    keep[keep.clone()] = bool_from_words(bits, nnz)
    words = words_from_bool(keep)
    return words, rank_index(words, numel, "reference")


def _extract_cpu(
    mask: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int, threads: int, attempt: bool
) -> tuple[Any, ...] | None:
    words, ranks = unfilled_cpu(nnz)
    count = native.extract(mask, parent, rank, numel, words, ranks, threads, attempt)
    if count is None:
        return None
    return (words, ranks, count) if attempt else (words, ranks)


def _deposit_cpu(
    bits: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int, threads: int, attempt: bool
) -> tuple[Tensor, Tensor] | None:
    words, ranks = out = unfilled_cpu(numel)
    count = native.deposit(bits, parent, rank, numel, words, ranks, threads, attempt)
    return None if count is None else out


_extract = Op(
    "extract(Tensor mask, Tensor parent, Tensor rank, SymInt numel, SymInt nnz)"
    " -> (Tensor, Tensor)",
    lambda mask, parent, rank, numel, nnz: unfilled(mask, nnz),
    reference=_extract_reference,
    cpu=_extract_cpu,
    triton=lambda *a: _backends.kernels("extract").extract(*a),
    rules=(
        Bitmap("parent"),
        Bitmap("mask", lambda given: given["parent"].numel, "parent"),
    ),
)
_deposit = Op(
    "deposit(Tensor bits, Tensor parent, Tensor rank, SymInt numel, SymInt nnz)"
    " -> (Tensor, Tensor)",
    lambda bits, parent, rank, numel, nnz: unfilled(bits, numel),
    reference=_deposit_reference,
    cpu=_deposit_cpu,
    triton=lambda *a: _backends.kernels("extract").deposit(*a),
    rules=(
        Bitmap("parent"),
        Bitmap("bits", lambda given: given["parent"].nnz, "parent"),
    ),
)


def _count(mask: Mask, rank: Tensor) -> int:
    return mask.nnz if torch.compiler.is_compiling() else int(rank[-1])


def _attempt(op: Op, source: Any, parent: Any, wanted: str, backend: str | None) -> Any:
    """Words and rank by C++; None where that does not do. `wanted`: the parent's attribute."""
    if (
        isinstance(parent, Mask)
        and isinstance(source, Mask)
        and source.numel == getattr(parent, wanted)
        and direct(parent.words, backend)
    ):
        return op.attempt(source.words, parent.words, parent.rank, parent.numel, parent.nnz)
    return None


def extract(mask: Mask, parent: Mask, *, backend: str | None = None) -> Mask:
    """The bits of `mask` over its parent's survivors: a mask of `parent.nnz` elements.

    Args:
        mask: a subset of `parent`, over as many elements and on the same device.
        parent: the mask whose survivors are the new index space.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        A Mask with the nnz of `mask`: bit i tells whether the parent's i-th survivor is in it.
        `deposit(extract(mask, parent), parent) == mask`.

    Raises:
        TypeError: an argument that is no Mask.
        ValueError: sizes or devices that differ, or a mask that is no subset of the parent.

    O(numel / 32).

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> parent = fs.Mask.from_bool(torch.tensor([True, False, True, True]))
    >>> mask = fs.Mask.from_bool(torch.tensor([True, False, False, True]))
    >>> fs.ops.extract(mask, parent).to_bool()
    tensor([ True, False,  True])
    """
    made = _attempt(_extract, mask, parent, "numel", backend)
    if made is None:
        _extract.check(mask=mask, parent=parent)
        where = (parent.words, parent.rank, parent.numel, parent.nnz)
        made = _extract(mask.words, *where, backend=backend)
    words, rank, *counted = made  # straight from C++ with the count: to read it here takes 1.3 us
    # What lies outside the parent is lost on the way, so the counts agree only for a subset.
    nnz = counted[0] if counted else _count(mask, rank)
    if nnz != mask.nnz:
        raise ValueError(
            f"mask: expected a subset of the parent, got {mask.nnz - nnz} survivors outside of it"
        )
    return Mask(words, rank, parent.nnz, nnz)


def deposit(bits: Mask, parent: Mask, *, backend: str | None = None) -> Mask:
    """The inverse of `extract`: bits over the parent's survivors, as a mask of `parent.numel`.

    Args:
        bits: a mask over `parent.nnz` elements, on the same device.
        parent: the mask among whose survivors they choose.
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        A Mask with the nnz of `bits`, a subset of the parent.

    Raises:
        TypeError: an argument that is no Mask.
        ValueError: `bits.numel != parent.nnz`, or devices that differ.

    O(numel / 32).

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> parent = fs.Mask.from_bool(torch.tensor([True, False, True, True]))
    >>> bits = fs.Mask.from_bool(torch.tensor([True, False, True]))
    >>> fs.ops.deposit(bits, parent).to_bool()
    tensor([ True, False, False,  True])
    """
    made = _attempt(_deposit, bits, parent, "nnz", backend)
    if made is None:
        _deposit.check(bits=bits, parent=parent)
        where = (parent.words, parent.rank, parent.numel, parent.nnz)
        made = _deposit(bits.words, *where, backend=backend)
    words, rank = made
    return Mask(words, rank, parent.numel, bits.nnz)
