"""Top-k by magnitude: exactly `keep` survivors, ties by the lowest index.

Magnitudes are ordered by the bits of |x| as an unsigned integer: exact, total, the same on every
backend. NaN ranks above infinity, as in `torch.topk`; -0.0 equals 0.0. Among equal magnitudes the
lowest flat index is kept, so server and clients that rank the same weights get the same mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fedmap_sparse import _autocast, _backends, _checks
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
from fedmap_sparse.ops._rules import Alike, Bitmap, Bitmaps, Dense, Keep


def magnitude_key(values: Tensor) -> Tensor:
    """The bits of |x| as an integer tensor: int32 for float32, int16 for the 16-bit types."""
    bits = torch.int32 if values.dtype == torch.float32 else torch.int16
    return values.view(bits) & torch.iinfo(bits).max


def _order(values: list[Tensor], within: list[Tensor | None]) -> Tensor:
    """Every eligible position of the concatenated inputs, largest magnitude first, stable."""
    keys = torch.cat([magnitude_key(v.reshape(-1)).to(torch.int64) for v in values])
    held = torch.cat(
        [
            torch.ones(v.numel(), dtype=torch.bool, device=v.device)
            if w is None
            else bool_from_words(w, v.numel())
            for v, w in zip(values, within, strict=True)
        ]
    )
    order = torch.sort(torch.where(held, keys, -1), descending=True, stable=True).indices
    return order[: int(held.sum())]


def _mask_reference(
    values: list[Tensor], within: list[Tensor | None], eligible: int, keep: int
) -> list[Tensor]:
    kept = torch.zeros(sum(v.numel() for v in values), dtype=torch.bool, device=values[0].device)
    kept[_order(values, within)[:keep]] = True
    words = [words_from_bool(part) for part in kept.split([v.numel() for v in values])]
    ranks = [rank_index(w, v.numel(), "reference") for w, v in zip(words, values, strict=True)]
    return words + ranks


def _mask_cpu(
    values: Sequence[Tensor],
    within: Sequence[Tensor | None],
    eligible: int,
    keep: int,
    threads: int,
    attempt: bool,
) -> list[Tensor] | None:
    if attempt:  # of one tensor, and something to keep
        words, rank = unfilled_cpu(values[0].numel())
        done = native.select(values, within, eligible, keep, (words,), (rank,), threads, True)
        return None if done is None else [words, rank]
    made = [unfilled_cpu(v.numel()) for v in values]
    every, ranks = [m[0] for m in made], [m[1] for m in made]
    if keep == 0:
        for t in (*every, *ranks):
            t.zero_()
    else:
        native.select(values, within, eligible, keep, every, ranks, threads, False)
    return every + ranks


def _mask_fake(
    values: list[Tensor], within: list[Tensor | None], eligible: int, keep: int
) -> list[Tensor]:
    words, ranks = zip(*[unfilled(v, v.numel()) for v in values], strict=True)
    return [*words, *ranks]


def _threshold_reference(
    values: list[Tensor], within: list[Tensor | None], eligible: int, keep: int
) -> Tensor:
    at = _order(values, within)[keep - 1]
    return _autocast.cat([v.reshape(-1) for v in values])[at].abs()


def _threshold_cpu(
    values: list[Tensor],
    within: list[Tensor | None],
    eligible: int,
    keep: int,
    threads: int,
    attempt: bool,
) -> Tensor | None:
    key = native.select(values, within, eligible, keep, [], [], threads, attempt)
    if key is None:
        return None
    bits = torch.int32 if values[0].dtype == torch.float32 else torch.int16
    return torch.tensor(key, dtype=bits, device="cpu").view(values[0].dtype)


def _zero_reference(values: Tensor, before: Tensor | None, after: Tensor) -> None:
    gone = ~bool_from_words(after, values.numel())
    if before is not None:
        gone &= bool_from_words(before, values.numel())
    values.view(-1)[gone] = 0.0


_LISTS = (Alike("values"), Bitmaps("within", of="values"))
_mask = Op(
    "magnitude_mask(Tensor[] values, Tensor?[] within, SymInt eligible, SymInt keep) -> Tensor[]",
    _mask_fake,
    reference=_mask_reference,
    cpu=_mask_cpu,
    triton=lambda *a: _backends.kernels("select").magnitude_mask(*a),
    cuda=lambda *a: _backends.kernels("select", "cuda").magnitude_mask(*a),
    rules=(*_LISTS, Keep()),
)
_threshold = Op(
    "magnitude_threshold(Tensor[] values, Tensor?[] within, SymInt eligible, SymInt keep)"
    " -> Tensor",
    lambda values, within, eligible, keep: values[0].new_empty(()),
    reference=_threshold_reference,
    cpu=_threshold_cpu,
    triton=lambda *a: _backends.kernels("select").magnitude_threshold(*a),
    cuda=lambda *a: _backends.kernels("select", "cuda").magnitude_threshold(*a),
    rules=(*_LISTS, Keep(least=1)),
)
_zero = Op(
    "zero_pruned_(Tensor(a!) values, Tensor? before, Tensor after) -> ()",
    lambda values, before, after: None,
    reference=_zero_reference,
    cpu="zero_pruned",
    triton=lambda *a: _backends.kernels("select").zero_pruned_(*a),
    rules=(
        Dense("values"),
        Bitmap("mask", lambda given: given["values"].numel(), "values"),
        Bitmap("before", lambda given: given["values"].numel(), "values", optional=True),
    ),
)

Within = Mask | None
Many = Sequence[Tensor]


def _attempt(op: Op, values: Tensor, within: object, keep: object) -> Any:
    """The op's result by C++ for one tensor; None where that does not do."""
    eligible = values.numel()
    held = None
    if within is not None:
        if not isinstance(within, Mask) or within.numel != eligible:
            return None
        eligible, held = within.nnz, within.words
    if type(keep) is not int or not 0 < keep <= eligible:
        return None
    return op.attempt((values,), (held,), eligible, keep)


def _prepare(
    op: Op, values: Tensor | Many, within: Within | Sequence[Within], keep: int
) -> tuple[list[Tensor], list[Tensor | None], int]:
    """The tensors, the words of `within` and the eligible elements, all checked."""
    single = values is None or hasattr(values, "dtype")  # an array is refused by its type
    tensors: list[Any] = [values] if single else list(values)
    masks: list[Within]
    if within is None:
        masks = [None] * len(tensors)
    else:
        masks = [within] if isinstance(within, Mask) else list(within)
    op.check(values=tensors, within=masks, keep=keep)
    eligible = sum(t.numel() if m is None else m.nnz for t, m in zip(tensors, masks, strict=True))
    return tensors, [None if m is None else m.words for m in masks], eligible


def _kept(ranks: Sequence[Tensor]) -> list[int]:
    """The survivors of each mask of a list; a device is asked for all of them at once."""
    if ranks[0].is_cpu:
        return [int(rank[-1]) for rank in ranks]
    kept: list[int] = torch.stack([rank[-1] for rank in ranks]).tolist()
    return kept


@overload
def magnitude_mask(
    values: Tensor, keep: int, *, within: Mask | None = None, backend: str | None = None
) -> Mask: ...
@overload
def magnitude_mask(
    values: Many,
    keep: int,
    *,
    within: Sequence[Within] | None = None,
    backend: str | None = None,
) -> list[Mask]: ...
def magnitude_mask(
    values: Tensor | Many,
    keep: int,
    *,
    within: Within | Sequence[Within] = None,
    backend: str | None = None,
) -> Mask | list[Mask]:
    """The `keep` elements of largest magnitude, as a mask; ties keep the lowest flat index.

    Args:
        values: contiguous float32, float16 or bfloat16 tensor of any shape, read row-major, not
            written. A list of tensors is ranked globally, ties by (position in the list, index),
            and gives a list of masks.
        keep: number of survivors, exact, 0 <= keep <= the survivors of `within`.
        within: only survivors of this mask are eligible; the result is a subset of it. None: every
            element. Over a FlatParameters' `.prunable` pass `layout.initial_mask()` or the current
            mask, since padding is not eligible. With a list: a list, whose members may be None.
        backend: "reference", "cpu", "triton" or "cuda"; None: by device.

    Returns:
        A Mask over `values.numel()` elements with `nnz == keep`, or a list of them.

    Raises:
        ValueError: `keep` out of range, sizes or devices that differ, a tensor not contiguous.
        TypeError: another dtype, or dtypes mixed in a list.

    O(n): one read of the values on the usual path, four at most; extra memory below 2% of the
    input plus 1 MB on the cpu backend (the reference sorts). On a GPU a list waits for the device
    once, as how many survivors each tensor has is known there alone, so that a CUDA graph cannot
    capture it; one tensor waits for nothing.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> fs.ops.magnitude_mask(torch.tensor([0.5, -2.0, 1.0]), 2).to_bool()
    tensor([False,  True,  True])
    """
    if type(keep) is not int:
        keep = _checks.number(keep)
    made = None
    if direct(values, backend):
        made = _attempt(_mask, values, within, keep)  # type: ignore[arg-type]  # one tensor
    if made is not None:
        return Mask(made[0], made[1], values.numel(), keep)  # type: ignore[union-attr]  # likewise
    tensors, held, eligible = _prepare(_mask, values, within, keep)
    if not tensors:
        return []
    out = _mask([_checks.plain(t) for t in tensors], held, eligible, keep, backend=backend)
    count = len(tensors)
    if isinstance(values, Tensor):
        return Mask(out[0], out[1], values.numel(), keep)
    return [
        Mask(w, r, t.numel(), nnz)
        for w, r, t, nnz in zip(out[:count], out[count:], tensors, _kept(out[count:]), strict=True)
    ]


def magnitude_threshold(
    values: Tensor | Many,
    keep: int,
    *,
    within: Within | Sequence[Within] = None,
    backend: str | None = None,
) -> Tensor:
    """The keep-th largest |x|.

    Args:
        values: contiguous float32, float16 or bfloat16 tensor, or a list of them, ranked globally.
        keep: 1 for the largest, at most the number of eligible elements.
        within: only survivors of this mask are eligible; None: every element. With a list: a list.
        backend: "reference", "cpu", "triton" or "cuda"; None: by device.

    Returns:
        A 0-d tensor of the values' dtype, on their device.

    Raises:
        TypeError: another dtype, or dtypes mixed in a list.
        ValueError: `keep` out of range, no tensors, sizes or devices that differ, a tensor not
            contiguous.

    Cost as `magnitude_mask`.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> fs.ops.magnitude_threshold(torch.tensor([0.5, -2.0, 1.0]), 2)
    tensor(1.)
    """
    if type(keep) is not int:
        keep = _checks.number(keep)
    made = None
    if direct(values, backend):
        made = _attempt(_threshold, values, within, keep)  # type: ignore[arg-type]  # one tensor
    if made is None:
        tensors, held, eligible = _prepare(_threshold, values, within, keep)
        plain = [_checks.plain(t) for t in tensors]
        made = _threshold(plain, held, eligible, keep, backend=backend)
    threshold: Tensor = made
    return threshold


@overload
def prune_(
    values: Tensor, keep: int, *, within: Mask | None = None, backend: str | None = None
) -> Mask: ...
@overload
def prune_(
    values: Many,
    keep: int,
    *,
    within: Sequence[Within] | None = None,
    backend: str | None = None,
) -> list[Mask]: ...
def prune_(
    values: Tensor | Many,
    keep: int,
    *,
    within: Within | Sequence[Within] = None,
    backend: str | None = None,
) -> Mask | list[Mask]:
    """`magnitude_mask`, then +0.0 in place into what was newly pruned: eligible and not kept.

    Args:
        values: as in `magnitude_mask`; written.
        keep: number of survivors, exact.
        within: as in `magnitude_mask`. What it excludes is not touched.
        backend: "reference", "cpu", "triton" or "cuda"; None: by device.

    Returns:
        The Mask of the survivors, or a list of masks for a list of tensors.

    Raises:
        TypeError, ValueError: as in `magnitude_mask`; then nothing was written.

    The cost of `magnitude_mask`, and the memory lines that change.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> values = torch.tensor([0.5, -2.0, 1.0])
    >>> fs.ops.prune_(values, 1)
    Mask(numel=3, nnz=1, density=0.3333)
    >>> values
    tensor([ 0., -2.,  0.])
    """
    if isinstance(values, Tensor):
        mask = magnitude_mask(values, keep, within=within, backend=backend)  # type: ignore[arg-type]  # a pair of overloads
        zero_pruned_(values, mask, before=within, backend=backend)  # type: ignore[arg-type]  # likewise
        return mask
    masks = magnitude_mask(values, keep, within=within, backend=backend)  # type: ignore[arg-type]  # likewise
    before = [None] * len(masks) if within is None else list(within)  # type: ignore[arg-type]  # likewise
    for v, m, b in zip(values, masks, before, strict=True):
        zero_pruned_(v, m, before=b, backend=backend)
    return masks


def zero_pruned_(
    values: Tensor, mask: Mask, *, before: Mask | None = None, backend: str | None = None
) -> None:
    """Write +0.0 in place where `before` kept an element and `mask` does not.

    Args:
        values: contiguous float32, float16 or bfloat16 tensor, any shape.
        mask: over `values.numel()` elements, on the same device.
        before: likewise; None: every element was kept.
        backend: "reference", "cpu", "triton" or "cuda"; None: by device.

    Raises:
        TypeError: another dtype.
        ValueError: sizes or devices that differ, a tensor not contiguous.

    O(n / 32), and the memory lines that change.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> values = torch.tensor([1.0, 2.0])
    >>> fs.ops.zero_pruned_(values, fs.Mask.from_bool(torch.tensor([False, True])))
    >>> values
    tensor([0., 2.])
    """
    if (
        direct(values, backend)
        and isinstance(mask, Mask)
        and mask.numel == values.numel()
        and (before is None or (isinstance(before, Mask) and before.numel == mask.numel))
    ):
        held = None if before is None else before.words
        if _zero.attempt(values, held, mask.words) is not None:
            return
    _zero.check(values=values, mask=mask, before=before)
    held = None if before is None else before.words
    _zero(_checks.plain(values), held, mask.words, backend=backend)
