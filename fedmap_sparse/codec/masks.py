"""MASK and DELTA: which weights survive. docs/format.md, 4."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmap_sparse import _backends, ops
from fedmap_sparse._transfer import to_host
from fedmap_sparse.codec.container import (
    NO_DIGEST,
    RANS,
    RAW,
    Header,
    Id,
    Section,
    Wire,
)
from fedmap_sparse.codec.values import Coding
from fedmap_sparse.errors import FormatError, NeedsMask, PayloadError
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask, num_words, settle
from fedmap_sparse.ops import entropy
from fedmap_sparse.ops.entropy import Runs


def full_section(mask: Mask, layout: FlatLayout, coding: Coding = "entropy") -> Section:
    """The whole bitmap: enough for a receiver that was never seen."""
    runs = _full_runs(layout)
    return _write(Id.MASK, mask, runs, counts(mask, layout), NO_DIGEST, coding)


def delta_section(
    mask: Mask, parent: Mask, layout: FlatLayout, coding: Coding = "entropy"
) -> Section:
    """One bit for each survivor of `parent`, a superset of `mask` that the receiver has."""
    kept = ops.extract(mask, parent)
    runs, nnz = _delta_runs(parent, layout), counts(mask, layout)
    return _write(Id.DELTA, kept, runs, nnz, parent.digest(), coding)


def begin_full(mask: Mask, layout: FlatLayout) -> entropy.Coding | None:
    """Launch what `full_section` does on a device, and do not wait for it."""
    runs, room = _full_runs(layout), 4 * num_words(mask.numel) - 1
    return entropy.begin_mask(mask.words, runs, counts(mask, layout), room)


def _write(kind: Id, bits: Mask, runs: Runs, nnz: Tensor, parent: bytes, coding: Coding) -> Section:
    raw = 4 * num_words(bits.numel)
    if coding == "entropy" and raw:
        coded = entropy.encode_mask(bits.words, runs, nnz, raw - 1)
        if coded is not None:
            (payload,) = to_host([coded])
            return Section.make(kind, Wire.BIT, bits.numel, payload, encoding=RANS, parent=parent)
    (payload,) = to_host([bits.words.view(torch.uint8)])
    return Section.make(kind, Wire.BIT, bits.numel, payload, parent=parent)


def _full_runs(layout: FlatLayout) -> Runs:
    return Runs(*layout.prunable_spans.t().contiguous())


def _delta_runs(parent: Mask, layout: FlatLayout) -> Runs:
    """Where each tensor's survivors lie among all of the parent's."""
    kept = counts(parent, layout)
    return Runs(kept.cumsum(0) - kept, kept)


def counts(mask: Mask, layout: FlatLayout) -> Tensor:
    """Survivors of each prunable tensor."""
    ends = layout.prunable_spans.cumsum(1).view(-1)
    before, through = entropy.ranks_at(mask, ends).view(-1, 2).unbind(1)
    return through - before


def read(
    header: Header,
    section: Section | None,
    dense: bool,
    layout: FlatLayout,
    have: Mask | None,
    device: torch.device,
    meanwhile: Callable[[], None],
) -> Mask:
    """The message's mask, on `device`, where it is decoded.

    Args:
        section: the message's MASK or DELTA, if any.
        dense: whether the header says that every eligible element survives.
        have: the receiver's mask.
        meanwhile: called while a device decodes the bits, before they are waited for.

    Raises:
        NeedsMask: the message refers to a mask other than `have`.
        FormatError: bits that the layout does not allow, or that contradict the digest.
    """
    if section is None and dense:
        mask = layout.initial_mask(device)
    elif section is None:
        mask = _require(have, header.mask, 32, device)
    elif dense:
        raise FormatError("expected no mask section beside DENSE", section.offset)
    elif section.id == Id.MASK:
        allowed = layout.initial_mask(device)
        mask = _bits(section, layout.prunable_numel, _full_runs(layout), device, meanwhile, allowed)
    else:
        parent = _require(have, section.parent, section.offset - 40, device)
        runs = _delta_runs(parent, layout)
        mask = ops.deposit(_bits(section, parent.nnz, runs, device, meanwhile), parent)
    if mask.digest() != header.mask:
        wanted, got = header.mask.hex(), mask.digest().hex()
        raise FormatError(f"expected a mask of digest {wanted}, got {got}", 32)
    return mask


def _require(have: Mask | None, wanted: bytes, offset: int, device: torch.device) -> Mask:
    if have is None or have.digest() != wanted:
        raise NeedsMask(wanted, None if have is None else have.digest(), offset)
    return have.to(device)


def _bits(
    section: Section,
    numel: int,
    runs: Runs,
    device: torch.device,
    meanwhile: Callable[[], None],
    allowed: Mask | None = None,
) -> Mask:
    """A mask of the section's bits, none outside of `allowed`."""
    name = Id(section.id).name
    if section.dtype != Wire.BIT or section.encoding not in (RAW, RANS):
        got = f"dtype {section.dtype}, encoding {section.encoding}"
        raise FormatError(f"{name}: expected bits in encoding 0 or 1, got {got}", section.offset)
    if section.count != numel:
        raise FormatError(f"{name}: expected {numel} bits, got {section.count}", section.offset)
    if section.encoding == RANS:
        try:
            if _backends.pick(None, device) == "triton":
                return _on_device(section, numel, runs, device, meanwhile, allowed)
            words = entropy.decode_mask(section.coded(), runs, numel, device=device)
            return _inside(Mask.from_words(words, numel), allowed, section)
        except PayloadError as error:
            at = section.offset + error.offset
            raise FormatError(f"{name}: {error.reason}", at) from None
    size = 4 * num_words(numel)
    if len(section.payload) != size:
        got = f"{len(section.payload)}"
        raise FormatError(f"{name}: expected {size} bytes, got {got}", section.offset)
    # A copy: the mask outlives the message, which may be much larger.
    words = torch.frombuffer(bytearray(section.payload) or bytearray(4), dtype=torch.int32)
    try:
        mask = Mask.from_words(words[: num_words(numel)].to(device), numel)
    except ValueError as error:
        raise FormatError(f"{name}: {error}", section.offset) from None
    return _inside(mask, allowed, section)


def _on_device(
    section: Section,
    numel: int,
    runs: Runs,
    device: torch.device,
    meanwhile: Callable[[], None],
    allowed: Mask | None,
) -> Mask:
    """`_bits` that are coded. All that is asked of them is launched before any of it is waited for:
    a wait costs 45 us beyond what the device needs."""
    begun = entropy.begin_mask_back(section.coded(), runs, numel, device)
    words, broken = begun.out, begun.broken.any()
    outside = broken if allowed is None else (words & ~allowed.words).any()
    meanwhile()
    mask, (any_broken, any_outside) = settle(words, numel, broken, outside)
    begun.checked(bool(any_broken))
    if any_outside:
        raise _padded(section)
    return mask


def _inside(mask: Mask, allowed: Mask | None, section: Section) -> Mask:
    if allowed is not None and not mask <= allowed:
        raise _padded(section)
    return mask


def _padded(section: Section) -> FormatError:
    return FormatError("a bit is set for an element of padding", section.offset)
