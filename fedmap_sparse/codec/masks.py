"""MASK and DELTA: which weights survive. docs/format.md, 4."""

from __future__ import annotations

import torch

from fedmap_sparse import ops
from fedmap_sparse.codec.container import NO_DIGEST, RAW, Header, Id, Section, Wire
from fedmap_sparse.codec.errors import FormatError, MaskNeeded
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask, num_words


def full_section(mask: Mask) -> Section:
    """The whole bitmap: enough for a receiver that was never seen."""
    return _write(Id.MASK, mask)


def delta_section(mask: Mask, parent: Mask) -> Section:
    """One bit for each survivor of `parent`, a superset of `mask` that the receiver has."""
    return _write(Id.DELTA, ops.relative(mask, parent), parent.digest())


def _write(id: Id, bits: Mask, parent: bytes = NO_DIGEST) -> Section:
    return Section.make(id, Wire.BIT, bits.numel, bits.words.cpu(), parent=parent)


def read(
    header: Header,
    section: Section | None,
    dense: bool,
    layout: FlatLayout,
    have: Mask | None,
) -> Mask:
    """The message's mask, on the CPU.

    Args:
        section: the message's MASK or DELTA, if any.
        dense: whether the header says that every eligible element survives.
        have: the receiver's mask.

    Raises:
        MaskNeeded: the message refers to a mask other than `have`.
        FormatError: bits that the layout does not allow, or that contradict the digest.
    """
    if section is None and dense:
        mask = layout.initial_mask()
    elif section is None:
        mask = _require(have, header.mask, 32)
    elif dense:
        raise FormatError("expected no mask section beside DENSE", section.offset)
    elif section.id == Id.MASK:
        mask = _bits(section, layout.prunable_numel)
        if not mask <= layout.initial_mask():
            raise FormatError("a bit is set for an element of padding", section.offset)
    else:
        parent = _require(have, section.parent, section.offset - 40)
        mask = ops.nest(_bits(section, parent.nnz), parent)
    if mask.digest() != header.mask:
        wanted, got = header.mask.hex(), mask.digest().hex()
        raise FormatError(f"expected a mask of digest {wanted}, got {got}", 32)
    return mask


def _require(have: Mask | None, wanted: bytes, offset: int) -> Mask:
    if have is None or have.digest() != wanted:
        got = "no mask" if have is None else have.digest().hex()
        reason = f"expected the receiver to have the mask {wanted.hex()}, got {got}"
        raise MaskNeeded(reason, offset, wanted)
    return have.to("cpu")


def _bits(section: Section, numel: int) -> Mask:
    name = Id(section.id).name
    if section.dtype != Wire.BIT or section.encoding != RAW:
        got = f"dtype {section.dtype}, encoding {section.encoding}"
        raise FormatError(f"{name}: expected bits in encoding 0, got {got}", section.offset)
    if section.count != numel:
        raise FormatError(f"{name}: expected {numel} bits, got {section.count}", section.offset)
    if len(section.payload) != 4 * num_words(numel):
        got = f"{len(section.payload)}"
        wanted = 4 * num_words(numel)
        raise FormatError(f"{name}: expected {wanted} bytes, got {got}", section.offset)
    # A copy: the mask outlives the message, which may be much larger.
    words = torch.frombuffer(bytearray(section.payload) or bytearray(4), dtype=torch.int32)
    try:
        return Mask.from_words(words[: num_words(numel)], numel)
    except ValueError as error:
        raise FormatError(f"{name}: {error}", section.offset) from None
