"""Top-k by magnitude: exactly `keep` survivors, ties by the lowest index.

Magnitudes are ordered by the bits of |x| as an unsigned integer: exact, total, the same on every
backend. NaN ranks above infinity, as in `torch.topk`; -0.0 equals 0.0. Among equal magnitudes the
lowest flat index is kept, so server and clients that rank the same weights get the same mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

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
    values: list[Tensor], within: list[Tensor | None], eligible: int, keep: int
) -> list[Tensor]:
    out = _mask_fake(values, within, eligible, keep)
    words, ranks = out[: len(values)], out[len(values) :]
    if keep == 0:
        for t in out:
            t.zero_()
        return out
    _native_select(values, within, eligible, keep, words, ranks)
    return out


def _native_select(
    values: list[Tensor],
    within: list[Tensor | None],
    eligible: int,
    keep: int,
    words: list[Tensor],
    ranks: list[Tensor],
) -> int:
    threads = _backends.threads()
    key: int = native.select(values, within, eligible, keep, words, ranks, threads, False)
    return key


def _mask_fake(
    values: list[Tensor], within: list[Tensor | None], eligible: int, keep: int
) -> list[Tensor]:
    words, ranks = zip(*[unfilled(v, v.numel()) for v in values], strict=True)
    return [*words, *ranks]


def _threshold_reference(
    values: list[Tensor], within: list[Tensor | None], eligible: int, keep: int
) -> Tensor:
    at = _order(values, within)[keep - 1]
    return torch.cat([v.reshape(-1) for v in values])[at].abs()


def _threshold_cpu(
    values: list[Tensor], within: list[Tensor | None], eligible: int, keep: int
) -> Tensor:
    key = _native_select(values, within, eligible, keep, [], [])
    bits = torch.int32 if values[0].dtype == torch.float32 else torch.int16
    return torch.tensor(key, dtype=bits).view(values[0].dtype)


def _zero_reference(values: Tensor, before: Tensor | None, after: Tensor) -> None:
    gone = ~bool_from_words(after, values.numel())
    if before is not None:
        gone &= bool_from_words(before, values.numel())
    values.view(-1)[gone] = 0.0


def _zero_cpu(values: Tensor, before: Tensor | None, after: Tensor) -> None:
    native.zero_pruned(
        values.data_ptr(),
        0 if before is None else before.data_ptr(),
        after.data_ptr(),
        values.numel(),
        _checks.DTYPE_CODES[values.dtype],
        _backends.threads(),
    )


_mask_op = define(
    "magnitude_mask(Tensor[] values, Tensor?[] within, SymInt eligible, SymInt keep, str backend)"
    " -> Tensor[]",
    _mask_fake,
    reference=_mask_reference,
    cpu=_mask_cpu,
    triton=lambda *a: _backends.kernels("select").magnitude_mask(*a),
)
_threshold_op = define(
    "magnitude_threshold(Tensor[] values, Tensor?[] within, SymInt eligible, SymInt keep,"
    " str backend) -> Tensor",
    lambda values, within, eligible, keep: values[0].new_empty(()),
    reference=_threshold_reference,
    cpu=_threshold_cpu,
    triton=lambda *a: _backends.kernels("select").magnitude_threshold(*a),
)
_zero_op = define(
    "zero_pruned_(Tensor(a!) values, Tensor? before, Tensor after, str backend) -> ()",
    lambda values, before, after: None,
    reference=_zero_reference,
    cpu=_zero_cpu,
    triton=lambda *a: _backends.kernels("select").zero_pruned_(*a),
)

Within = Mask | None
Many = Sequence[Tensor]


def _prepare(
    values: Tensor | Many, within: Within | Sequence[Within], keep: int, least: int
) -> tuple[list[Tensor], list[Within], int]:
    tensors = [values] if isinstance(values, Tensor) else list(values)
    masks: list[Within]
    if within is None:
        masks = [None] * len(tensors)
    else:
        masks = [within] if isinstance(within, Mask) else list(within)
    if len(masks) != len(tensors):
        raise ValueError(f"within: expected {len(tensors)} masks, one a tensor, got {len(masks)}")
    eligible = 0
    for t, m in zip(tensors, masks, strict=True):
        _checks.check_tensor("values", t)
        _checks.check_device("values", t, tensors[0].device)
        if t.dtype != tensors[0].dtype:
            wanted, got = _checks.short(tensors[0].dtype), _checks.short(t.dtype)
            raise TypeError(f"values: expected one dtype in the list, {wanted}, got {got}")
        if m is not None:
            _checks.check_mask("within", m, t.numel())
            _checks.check_same_device("within", m, t)
        eligible += t.numel() if m is None else m.nnz
    _checks.check_keep(keep, eligible, least)
    return tensors, masks, eligible


def _direct(values: Tensor, keep: int, within: Within) -> Mask | None:
    """Straight to C++; None where that does not do."""
    numel = eligible = values.numel()
    if within is not None:
        if not isinstance(within, Mask) or within.numel != numel:
            return None
        eligible = within.nnz
    if type(keep) is not int or not 0 < keep <= eligible:
        return None
    words, rank = unfilled_cpu(numel)
    held = None if within is None else within.words
    threads = _backends.threads()
    key = native.select((values,), (held,), eligible, keep, (words,), (rank,), threads, True)
    return None if key is None else Mask(words, rank, numel, keep)


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
        backend: "reference", "cpu" or "triton"; None: by device.

    Returns:
        A Mask over `values.numel()` elements with `nnz == keep`, or a list of them.

    Raises:
        ValueError: `keep` out of range, sizes or devices that differ, a tensor not contiguous.
        TypeError: another dtype, or dtypes mixed in a list.

    O(n): one read of the values on the usual path, four at most; extra memory below 2% of the
    input plus 1 MB on the cpu backend (the reference sorts).
    """
    if _backends.direct(backend, values):
        mask = _direct(values, keep, within)  # type: ignore[arg-type]  # `values` is one tensor
        if mask is not None:
            return mask
    tensors, masks, eligible = _prepare(values, within, keep, 0)
    single = isinstance(values, Tensor)
    if not tensors:
        return []
    words_within = [None if m is None else m.words for m in masks]
    out = _mask_op(
        tensors, words_within, eligible, keep, _backends.pick(backend, tensors[0].device)
    )
    count = len(tensors)
    if single:
        return Mask(out[0], out[1], tensors[0].numel(), keep)
    return [
        Mask(w, r, t.numel(), int(r[-1]))
        for w, r, t in zip(out[:count], out[count:], tensors, strict=True)
    ]


def magnitude_threshold(
    values: Tensor | Many,
    keep: int,
    *,
    within: Within | Sequence[Within] = None,
    backend: str | None = None,
) -> Tensor:
    """The keep-th largest |x|: 0-d, of the values' dtype and device. Arguments as magnitude_mask.

    Raises:
        ValueError: also for keep = 0, which has no threshold.
    """
    tensors, masks, eligible = _prepare(values, within, keep, 1)
    words = [None if m is None else m.words for m in masks]
    picked = _backends.pick(backend, tensors[0].device)
    threshold: Tensor = _threshold_op(tensors, words, eligible, keep, picked)
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
    """`magnitude_mask`, then +0.0 into what was newly pruned: eligible and not kept.

    Nothing is written before the mask is certain, and what `within` excludes is not touched.
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
    """Write +0.0 in place where `before` kept an element (None: everywhere) and `mask` does not.

    Only the memory lines that change are written. Arguments as in `magnitude_mask`.
    """
    _checks.check_tensor("values", values)
    _checks.check_mask("mask", mask, values.numel())
    _checks.check_same_device("mask", mask, values)
    if before is not None:
        _checks.check_mask("before", before, values.numel())
        _checks.check_same_device("before", before, values)
    _zero_op(
        _checks.plain(values),
        None if before is None else before.words,
        mask.words,
        _backends.pick(backend, values.device),
    )
