"""Masks of masks: a child's bits over its parent's survivors, and back.

Since masks only shrink, a child needs one bit per survivor of its parent: `extract` extracts
those bits, `deposit` deposits them again (pext and pdep on 64-bit words, prefix counts on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import define, native
from fedmap_sparse.mask import (
    Mask,
    bool_from_words,
    rank_index,
    unfilled,
    unfilled_cpu,
    words_from_bool,
)


def _extract_reference(
    child: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    words = words_from_bool(bool_from_words(child, numel)[bool_from_words(parent, numel)])
    return words, rank_index(words, nnz, "reference")


def _deposit_reference(
    kept: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    keep = bool_from_words(parent, numel).clone()
    keep[keep.clone()] = bool_from_words(kept, nnz)
    words = words_from_bool(keep)
    return words, rank_index(words, numel, "reference")


def _extract_cpu(
    child: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    return _run(native.extract, child, parent, rank, numel, nnz)


def _deposit_cpu(
    kept: Tensor, parent: Tensor, rank: Tensor, numel: int, nnz: int
) -> tuple[Tensor, Tensor]:
    return _run(native.deposit, kept, parent, rank, numel, numel)


def _run(
    kernel: Callable[..., int | None],
    source: Tensor,
    parent: Tensor,
    rank: Tensor,
    numel: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    words, ranks = out = unfilled(source, size)
    kernel(source, parent, rank, numel, words, ranks, _backends.threads(), False)
    return out


_extract_op = define(
    "extract(Tensor child, Tensor parent, Tensor rank, SymInt numel, SymInt nnz, str backend)"
    " -> (Tensor, Tensor)",
    lambda child, parent, rank, numel, nnz: unfilled(child, nnz),
    reference=_extract_reference,
    cpu=_extract_cpu,
    triton=lambda *a: _backends.kernels("extract").extract(*a),
)
_deposit_op = define(
    "deposit(Tensor kept, Tensor parent, Tensor rank, SymInt numel, SymInt nnz, str backend)"
    " -> (Tensor, Tensor)",
    lambda kept, parent, rank, numel, nnz: unfilled(kept, numel),
    reference=_deposit_reference,
    cpu=_deposit_cpu,
    triton=lambda *a: _backends.kernels("extract").deposit(*a),
)


def _direct(
    stem: str, source: object, parent: object, backend: str | None
) -> tuple[Tensor, Tensor, int] | None:
    """Straight to C++: words, rank and survivors; None where that does not do."""
    if not (isinstance(parent, Mask) and isinstance(source, Mask)):
        return None
    wanted, size = parent.numel, parent.nnz
    if stem == "deposit":
        wanted, size = size, wanted
    if source.numel != wanted or not _backends.direct(backend, parent.words):
        return None
    words, rank = unfilled_cpu(size)
    nnz = getattr(native, stem)(
        source.words,
        parent.words,
        parent.rank,
        parent.numel,
        words,
        rank,
        _backends.threads(),
        True,
    )
    return None if nnz is None else (words, rank, nnz)


def _masked(
    stem: str, op: Callable[..., Any], name: str, source: Mask, parent: Mask, backend: str | None
) -> tuple[Tensor, Tensor, int | None]:
    """Words and rank of the op's mask; its survivors too where the way there counts them."""
    done = _direct(stem, source, parent, backend)
    if done is not None:
        return done
    _checks.check_mask("parent", parent)
    _checks.check_mask(name, source, parent.nnz if stem == "deposit" else parent.numel)
    _checks.check_device(name, source.words, parent.device)
    picked = _backends.pick(backend, parent.device)
    words, rank = op(source.words, parent.words, parent.rank, parent.numel, parent.nnz, picked)
    return words, rank, None


def extract(child: Mask, parent: Mask, *, backend: str | None = None) -> Mask:
    """The child's bits over the parent's survivors: a Mask of `parent.nnz` elements.

    Its nnz is the child's. `deposit(extract(child, parent), parent) == child`. O(numel / 32).

    Raises:
        ValueError: sizes or devices that differ, or a child that is no subset of the parent.
    """
    words, rank, nnz = _masked("extract", _extract_op, "child", child, parent, backend)
    if nnz is None:
        nnz = child.nnz if torch.compiler.is_compiling() else int(rank[-1])
    # What lies outside the parent is lost on the way, so the counts agree only for a subset.
    if nnz != child.nnz:
        raise ValueError(
            f"child: expected a subset of the parent, got {child.nnz - nnz} survivors outside of it"
        )
    return Mask(words, rank, parent.nnz, nnz)


def deposit(kept: Mask, parent: Mask, *, backend: str | None = None) -> Mask:
    """The inverse of `extract`: `kept`, over the parent's survivors, as a mask of `parent.numel`.

    O(numel / 32).

    Raises:
        ValueError: `kept.numel != parent.nnz`, or devices that differ.
    """
    words, rank, _ = _masked("deposit", _deposit_op, "kept", kept, parent, backend)
    return Mask(words, rank, parent.numel, kept.nnz)
