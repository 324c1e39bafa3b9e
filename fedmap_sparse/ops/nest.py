"""Masks of masks: a child's bits over its parent's survivors, and back.

Since masks only shrink, a child needs one bit per survivor of its parent: `relative` extracts
those bits, `nest` deposits them again (pext and pdep on 64-bit words, prefix counts on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import define, native
from fedmap_sparse.mask import (
    Mask,
    bool_from_words,
    num_ranks,
    num_words,
    rank_index,
    words_from_bool,
)


def _relative_reference(
    child: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    words = words_from_bool(bool_from_words(child, numel)[bool_from_words(parent, numel)])
    return words, rank_index(words, nnz, "reference")


def _nest_reference(
    kept: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    keep = bool_from_words(parent, numel).clone()
    keep[keep.clone()] = bool_from_words(kept, nnz)
    words = words_from_bool(keep)
    return words, rank_index(words, numel, "reference")


def _relative_cpu(
    child: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    return _run(native.relative, child, parent, rank, numel, nnz)


def _nest_cpu(
    kept: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    return _run(native.nest, kept, parent, rank, numel, numel)


def _run(
    kernel: Callable[..., None], source: Tensor, parent: Tensor, rank: Tensor, numel: int, size: int
) -> tuple[Tensor, Tensor]:
    words, ranks = out = _masks(source, size)
    kernel(
        source.data_ptr(),
        parent.data_ptr(),
        rank.data_ptr(),
        numel,
        words.data_ptr(),
        ranks.data_ptr(),
        _backends.threads(),
    )
    return out


def _masks(like: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty(num_words(numel)),
        like.new_empty(num_ranks(numel), dtype=torch.int64),
    )


_relative_op = define(
    "relative(Tensor child, Tensor parent, Tensor rank, SymInt numel, SymInt nnz, str backend)"
    " -> (Tensor, Tensor)",
    lambda child, parent, rank, numel, nnz: _masks(child, nnz),
    reference=_relative_reference,
    cpu=_relative_cpu,
    triton=lambda *a: _backends.kernels("nest").relative(*a),
)
_nest_op = define(
    "nest(Tensor kept, Tensor parent, Tensor rank, SymInt numel, SymInt nnz, str backend)"
    " -> (Tensor, Tensor)",
    lambda kept, parent, rank, numel, nnz: _masks(kept, numel),
    reference=_nest_reference,
    cpu=_nest_cpu,
    triton=lambda *a: _backends.kernels("nest").nest(*a),
)


def relative(child: Mask, parent: Mask, *, backend: str | None = None) -> Mask:
    """The child's bits over the parent's survivors: a Mask of `parent.nnz` elements.

    Its nnz is the child's. `nest(relative(child, parent), parent) == child`. O(numel / 32).

    Raises:
        ValueError: sizes or devices that differ, or a child that is no subset of the parent.
    """
    _checks.check_mask("parent", parent)
    _checks.check_mask("child", child, parent.numel)
    _checks.check_device("child", child.words, parent.device)
    words, rank = _relative_op(
        child.words,
        parent.words,
        parent.rank,
        parent.numel,
        parent.nnz,
        _backends.pick(backend, parent.device),
    )
    # What lies outside the parent is lost on the way, so the counts agree only for a subset.
    if not torch.compiler.is_compiling() and int(rank[-1]) != child.nnz:
        raise ValueError(
            f"child: expected a subset of the parent, got {child.nnz - int(rank[-1])} survivors "
            "outside of it"
        )
    return Mask(words, rank, parent.nnz, child.nnz)


def nest(kept: Mask, parent: Mask, *, backend: str | None = None) -> Mask:
    """The inverse of `relative`: `kept`, over the parent's survivors, as a mask of `parent.numel`.

    O(numel / 32).

    Raises:
        ValueError: `kept.numel != parent.nnz`, or devices that differ.
    """
    _checks.check_mask("parent", parent)
    _checks.check_mask("kept", kept, parent.nnz)
    _checks.check_device("kept", kept.words, parent.device)
    words, rank = _nest_op(
        kept.words,
        parent.words,
        parent.rank,
        parent.numel,
        parent.nnz,
        _backends.pick(backend, parent.device),
    )
    return Mask(words, rank, parent.numel, kept.nnz)
