"""Messages: a model's survivors, tail and buffers in one container. docs/format.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fedmap_sparse import _checks, ops
from fedmap_sparse.codec import container, masks, values
from fedmap_sparse.codec import meta as records
from fedmap_sparse.codec.container import (
    DENSE,
    NO_DIGEST,
    RANS,
    RAW,
    Buffer,
    Header,
    Id,
    Section,
    Wire,
)
from fedmap_sparse.codec.values import Quantized
from fedmap_sparse.errors import FormatError
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask

MaskSection = Literal["none", "full", "delta"]

DTYPES = {_checks.short(dtype): dtype for dtype in _checks.FLOAT_DTYPES}


@dataclass(frozen=True)
class Body:
    """A message but for its mask section, encoded: what all receivers of a broadcast share.

    A server encodes one a round and calls `message` once for each mask that its clients have; that
    costs the mask section and one copy of the bytes. The tensors given to `encode_body` are viewed,
    not copied: they must not change while the body is in use.
    """

    header: Header
    sections: tuple[Section, ...]
    mask: Mask
    layout: FlatLayout
    lossless: bool = True

    def decoded(self) -> Message:
        """What a receiver makes of it: the base that updates may be differences from."""
        sections = {s.id: s for s in self.sections}
        return Message(
            layout=self.layout,
            tail=values.read(sections[Id.TAIL], self.mask.device),
            buffers=values.read_buffers(self.layout, sections),
            meta={},
            body=self,
            mask_section=None,
            base=None,
        )

    @cached_property
    def digest(self) -> bytes:
        """The broadcast digest: what an update to this broadcast gives as `answers`."""
        return container.broadcast_digest(self.header, self.sections)

    def message(self, mask_section: MaskSection = "none", parent: Mask | None = None) -> bytes:
        """The message for a receiver that has this mask ("none"), nothing ("full"), or `parent`.

        The dense mask costs no bits: it never has a section, whatever is asked for.

        Raises:
            ValueError: another name, or a `parent` that is missing, superfluous, or no superset.
        """
        return self.join(self._mask_section(mask_section, parent))

    def join(self, section: Section | None) -> bytes:
        """The message with a mask section that `masks` wrote, or with none."""
        lead = () if section is None or self.header.flags & DENSE else (section,)
        return container.join(self.header, lead + self.sections)

    def _mask_section(self, kind: MaskSection, parent: Mask | None) -> Section | None:
        if kind not in ("none", "full", "delta"):
            raise ValueError(f"mask_section: expected 'none', 'full' or 'delta', got {kind!r}")
        if (parent is None) is (kind == "delta"):
            wanted = "a parent" if kind == "delta" else "no parent"
            raise ValueError(f"parent: expected {wanted} for mask_section={kind!r}, got {parent}")
        if parent is not None:
            return masks.delta_section(self.mask, parent, self.layout, self.lossless)
        if kind == "none" or self.header.flags & DENSE:
            return None
        return masks.full_section(self.mask, self.layout, self.lossless)


def encode_body(
    layout: FlatLayout,
    mask: Mask,
    packed: Tensor | Quantized,
    tail: Tensor,
    buffers: Mapping[str, Any],
    *,
    lossless: bool = True,
    round: int = 0,
    epoch: int = 0,
    num_samples: int = 0,
    answers: bytes = NO_DIGEST,
    base: bytes = NO_DIGEST,
    meta: Mapping[str, records.Value] | None = None,
) -> Body:
    """Encode what is packed already.

    Args:
        layout: of the model.
        mask: over `layout.prunable_numel` elements, none of them padding.
        packed: Tensor[mask.nnz] of float32, float16 or bfloat16, whose dtype is the wire's; or
            `Quantized` for int8.
        tail: Tensor[layout.tail_numel] of one of these dtypes, as `FlatParameters.tail`.
        buffers: name to tensor or array, exactly the layout's.
        lossless: allow entropy coding, of the mask section too, where it is smaller.
        round, epoch, num_samples: at most 2^53.
        answers: digest of the broadcast that this update answers; zero in a broadcast.
        base: digest of the broadcast that `packed` is the difference from; zero if it is none.
        meta: a small record; `loss` and `lr` are the keys that `fedmap` uses.

    Raises:
        TypeError: another dtype, or a value that META cannot hold.
        ValueError: sizes that differ from the layout's or the mask's; integers out of range.

    O(bytes): checksums are computed here, once.
    """
    _checks.check_mask("mask", mask, layout.prunable_numel)
    if isinstance(packed, Quantized):
        _checks.check_numel("packed", packed.codes, mask.nnz, "the mask's nnz")
    else:
        _checks.check_tensor("packed", packed)
        _checks.check_numel("packed", packed, mask.nnz, "the mask's nnz")
    _checks.check_tensor("tail", tail)
    _checks.check_numel("tail", tail, layout.tail_numel, "the layout's tail")
    for name, digest in (("answers", answers), ("base", base)):
        if not isinstance(digest, bytes) or len(digest) != 16:
            raise ValueError(f"{name}: expected a digest of 16 bytes, got {digest!r}")
    for name, value in (("round", round), ("epoch", epoch), ("num_samples", num_samples)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if not 0 <= value <= container.MAX_INTEGER:
            raise ValueError(f"{name}: expected 0 to 2^53, got {value}")
    header = Header(
        layout=layout.digest(),
        mask=mask.digest(),
        eligible=layout.eligible,
        flags=DENSE if mask.nnz == layout.eligible else 0,
        answers=answers,
        base=base,
        round=round,
        epoch=epoch,
        samples=num_samples,
    )
    sections = [
        *values.write_model(packed, tail.detach(), lossless),
        *values.write_buffers(layout, buffers),
    ]
    if meta:
        sections.append(records.write(meta))
    return Body(header, tuple(sections), mask, layout, lossless)


def encode(
    params: FlatParameters,
    mask: Mask,
    *,
    dtype: str = "float32",
    mask_section: MaskSection = "none",
    parent: Mask | None = None,
    base: Message | None = None,
    lossless: bool = True,
    block: int = 256,
    residual: Tensor | None = None,
    stochastic: int | None = None,
    round: int = 0,
    epoch: int = 0,
    num_samples: int = 0,
    answers: bytes = NO_DIGEST,
    meta: Mapping[str, records.Value] | None = None,
) -> bytes:
    """A message with the survivors of `params` under `mask`, its tail and its buffers.

    Args:
        params: a flattened model; its values are not changed.
        mask: which of `params.prunable` survive.
        dtype: of the values on the wire: "float32", "float16", "bfloat16" or "int8" (the tail then
            travels as float32).
        mask_section: what the receiver needs: "none" (it has the mask, and the digest proves it),
            "full" (it has nothing) or "delta" (it has `parent`). The dense mask costs no bits.
        parent: with "delta", a superset of `mask` that the receiver has.
        base: a decoded broadcast of the same mask; values travel as float32 differences from it.
        lossless: allow encodings that store the same bits in fewer bytes, where they are smaller.
        block: values a scale, for int8: a multiple of 64 from 64 to 1024.
        residual: for int8, Tensor[mask.nnz] of float32, updated in place: the error of the last
            message, made good in this one (error feedback). The sender keeps it.
        stochastic: for int8, a seed to round stochastically with; None rounds to nearest.
        round, epoch, num_samples: for the header, at most 2^53.
        answers: digest of the broadcast that this update answers (`Message.broadcast_digest`).
        meta: a small record of bool, int, float and str.

    Returns:
        The message: `len(result)` is what travels.

    Raises:
        TypeError, ValueError: see `encode_body` and `Body.message`.
    """
    return encode_flat(
        params.layout,
        params.prunable,
        params.tail,
        params.buffers,
        mask,
        dtype=dtype,
        mask_section=mask_section,
        parent=parent,
        base=base,
        lossless=lossless,
        block=block,
        residual=residual,
        stochastic=stochastic,
        round=round,
        epoch=epoch,
        num_samples=num_samples,
        answers=answers,
        meta=meta,
    )


def encode_flat(
    layout: FlatLayout,
    prunable: Tensor,
    tail: Tensor,
    buffers: Mapping[str, Any],
    mask: Mask,
    *,
    dtype: str,
    mask_section: MaskSection,
    parent: Mask | None = None,
    base: Message | None = None,
    block: int = 256,
    residual: Tensor | None = None,
    stochastic: int | None = None,
    **options: Any,
) -> bytes:
    """`encode` from the parts of a FlatParameters; `options` as in `encode_body`."""
    _checks.check_mask("mask", mask, layout.prunable_numel)
    packed, tail = pack_parts(prunable, tail, mask, dtype, base, block, residual, stochastic)
    digest = NO_DIGEST if base is None else base.broadcast_digest
    body = encode_body(layout, mask, packed, tail, buffers, base=digest, **options)
    return body.message(mask_section, parent)


def pack_parts(
    prunable: Tensor,
    tail: Tensor,
    mask: Mask,
    dtype: str,
    base: Message | None = None,
    block: int = 256,
    residual: Tensor | None = None,
    stochastic: int | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """(packed survivors, tail) in a wire dtype, as `encode_body` takes them.

    Args:
        prunable: Tensor[mask.numel], as `FlatParameters.prunable`.
        tail: as `FlatParameters.tail`; returned as it is when it has the dtype already.
        mask, dtype, base, block, residual, stochastic: as in `encode`.
    """
    check_dtype(dtype)
    source, tail = prunable.detach(), tail.detach()
    if base is None and dtype != "int8":
        packed = ops.pack(source, mask)
    else:
        packed = ops.pack(source, mask, out=source.new_empty(mask.nnz, dtype=torch.float32))
    if base is not None:
        if base.mask.digest() != mask.digest():
            raise ValueError("base: expected a message of the same mask, got another")
        packed = packed.sub_(base.packed.to(packed))
    return wire_parts(packed, tail, dtype, block, residual, stochastic)


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless values can travel as `dtype`."""
    if dtype not in (*DTYPES, "int8"):
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, int8, got {dtype!r}")


def wire_parts(
    packed: Tensor,
    tail: Tensor,
    dtype: str,
    block: int = 256,
    residual: Tensor | None = None,
    stochastic: int | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """Packed survivors and tail in a wire dtype; what has it already is returned as it is.

    Args:
        packed: Tensor[nnz]; float32 for int8.
        tail, dtype, block, residual, stochastic: as in `encode`.

    Raises:
        ValueError: a value that the dtype cannot hold.
    """
    if dtype == "int8":
        return Quantized.of(packed, block, residual, stochastic), _cast(tail, torch.float32)
    return _cast(packed, DTYPES[dtype]), _cast(tail, DTYPES[dtype])


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    if values.dtype == dtype:
        return values
    cast, overflowed = ops.cast(values, dtype)
    if overflowed:
        name = _checks.short(dtype)
        raise ValueError(f"values: expected the range of {name}, got {overflowed} beyond it")
    return cast


@dataclass(frozen=True)
class Message:
    """A decoded message. Its tensors may view the bytes it came from: do not write to them.

    Mask, values and tail are on the device that `decode` was asked for; buffers are on the CPU.

    Attributes:
        layout: the layout it was read with.
        tail: Tensor[layout.tail_numel].
        buffers: name to tensor, in the layout's shapes: float32 or float64, int64, bool.
        meta: the record; empty when there was none.
        body: the sections as they came, which can be sent on with another mask section.
        mask_section: the MASK or DELTA section that came with it, if any.
        base: the decoded broadcast that its values are differences from, if they are.
    """

    layout: FlatLayout
    tail: Tensor
    buffers: dict[str, Tensor]
    meta: dict[str, records.Value]
    body: Body = field(repr=False)
    mask_section: Section | None = field(repr=False)
    base: Message | None = field(repr=False)

    @cached_property
    def packed(self) -> Tensor:
        """Tensor[mask.nnz] in the wire's dtype; float32 for int8 and where a base was added."""
        wire = values.read(self._values, self.mask.device)
        if self.base is None:
            return wire
        return self.base.packed.to(wire.device).float() + wire.float()

    @property
    def _values(self) -> Section:
        return self.body.sections[0]

    @property
    def header(self) -> Header:
        return self.body.header

    @property
    def mask(self) -> Mask:
        """The mask whose survivors the values are."""
        return self.body.mask

    @property
    def round(self) -> int:
        return self.header.round

    @property
    def epoch(self) -> int:
        """How many times the mask has been pruned."""
        return self.header.epoch

    @property
    def num_samples(self) -> int:
        return self.header.samples

    @property
    def answers(self) -> bytes:
        """Digest of the broadcast that this update answers; 16 zero bytes in a broadcast."""
        return self.header.answers

    @property
    def broadcast_digest(self) -> bytes:
        """16 bytes, the same for all receivers of a broadcast: `answers` of their updates."""
        return self.body.digest

    def dense(self) -> Tensor:
        """The prunable part with zeros where pruned: Tensor[layout.prunable_numel]."""
        return ops.unpack(self.packed, self.mask)

    def to_state_dict(self) -> dict[str, Tensor]:
        """All parameters (aliases too) and buffers by name, in the model's order, dense; the
        caller's own, except that buffers and the tail may view the message."""
        flat = {True: self.dense(), False: self.tail}
        start = self.layout.prunable_numel
        found = dict(self.buffers)
        for e in self.layout.entries:
            at = e.offset if e.offset < start else e.offset - start
            found[e.name] = flat[e.offset < start][at : at + e.numel].view(e.shape)
        found.update({alias: found[name] for alias, name in self.layout.aliases})
        return {name: found[name] for name in self.layout.names}

    def all_finite(self) -> bool:
        """Whether values, tail and float buffers hold no NaN and no infinity."""
        floats = [t for t in self.buffers.values() if t.is_floating_point()]
        return (
            self._finite
            and ops.all_finite(self.tail)
            and all(bool(torch.isfinite(t).all()) for t in floats)
        )

    @cached_property
    def _finite(self) -> bool:
        if self.base is None and self.mask.device == values.CPU:
            return values.verify(self._values)
        return ops.all_finite(self.packed)

    def add_to(self, values_: ops.Accumulator, weight: float) -> None:
        """Add `weight * packed` to an accumulator of mask.nnz elements: the same bits as
        `values_.add(message.packed, weight)`, but from the message's bytes, tile by tile, with no
        copy of the values where they are coded and on the CPU. The accumulator is on the message's
        device."""
        raw = self._values.encoding == RAW and self.dtype != "int8"
        if raw or self.base is not None or self.mask.device != values.CPU:
            values_.add(self.packed, weight)
            return
        _checks.check_numel("accumulator", values_.sums, self.mask.nnz, "the mask's nnz")
        values.add_to(values_.sums, self._values, weight)
        values_.total += weight

    @property
    def dtype(self) -> str:
        """Of the values on the wire: "float32", "float16", "bfloat16" or "int8"."""
        return Wire(self._values.dtype).name.lower()

    def encode(self) -> bytes:
        """The bytes that this message was decoded from, less sections that this version ignores."""
        return self.body.join(self.mask_section)


def decode(
    data: Buffer,
    layout: FlatLayout,
    *,
    mask: Mask | None = None,
    base: Message | None = None,
    materialize: bool = True,
    device: torch.device | str | None = None,
) -> Message:
    """Read a message, trusting nothing of it; nothing of the receiver is changed.

    Args:
        data: the whole message. The result's tensors may view it.
        layout: what the receiver expects: every size in the message is checked against it before
            anything is allocated.
        mask: the receiver's current mask: the parent of a delta, or the mask of a message that
            carries none.
        base: the decoded broadcast that the values may be differences from.
        materialize: False checks values that are coded tile by tile and keeps only their bytes,
            for `Message.add_to`; `packed` decodes them when it is asked for.
        device: where mask, values and tail are wanted: coded payloads are copied there once and
            decoded there. None: where `mask` is, or the CPU.

    Raises:
        NeedsMask: the message needs a mask other than `mask`; see its `wanted`.
        FormatError: anything that docs/format.md, 7, says to refuse.
        TypeError: `data` is not bytes, bytearray or a contiguous memoryview.
    """
    if mask is not None:
        _checks.check_mask("mask", mask, layout.prunable_numel)
    if device is None:
        device = values.CPU if mask is None else mask.device
    place = torch.empty(0, device=device).device  # "cuda" is one of several: the current one
    header, found = container.parse(data)
    if header.layout != layout.digest():
        wanted, got = layout.digest().hex(), header.layout.hex()
        raise FormatError(f"expected a message of layout {wanted}, got {got}", 16)
    if header.eligible != layout.eligible:
        raise FormatError(f"expected {layout.eligible} eligible, got {header.eligible}", 104)
    sections = {s.id: s for s in found if not s.ignorable}
    for s in sections.values():
        _check_fields(s)
    for id in (Id.VALUES, Id.TAIL):
        if id not in sections:
            raise FormatError(f"expected a section {id.name}, got none", len(data))
    if Id.MASK in sections and Id.DELTA in sections:
        raise FormatError("expected MASK or DELTA, got both", sections[Id.DELTA].offset)
    dense = bool(header.flags & DENSE)
    carried = sections.get(Id.MASK) or sections.get(Id.DELTA)
    own = masks.read(header, carried, dense, layout, mask, place)
    if dense is not (own.nnz == layout.eligible):
        raise FormatError(f"expected DENSE to say {not dense} of {own.nnz} survivors", 12)
    coded, rest = sections[Id.VALUES], sections[Id.TAIL]
    values.check(coded, own.nnz, (*values.FLOATS, Wire.INT8), (RAW, RANS))
    values.check(rest, layout.tail_numel, values.FLOATS, (RAW, RANS))
    tail = values.read(rest, place)
    values.check_tail(tail, rest, layout)
    others = tuple(s for s in sections.values() if s is not carried)
    message = Message(
        layout=layout,
        tail=tail,
        buffers=values.read_buffers(layout, sections),
        meta=records.read(sections[Id.META]) if Id.META in sections else {},
        body=Body(header, others, own, layout),
        mask_section=carried,
        base=_check_base(header, base),
    )
    if materialize:
        message.packed  # noqa: B018  # decoded now, so that what does not decode is refused
    else:
        message.all_finite()
    return message


def _check_fields(section: Section) -> None:
    start = section.offset - container.SECTION_BYTES
    if section.block and section.dtype != Wire.INT8:
        raise FormatError(f"{Id(section.id).name}: expected block to be zero", start + 40)
    if section.id != Id.DELTA and section.parent != NO_DIGEST:
        raise FormatError(f"{Id(section.id).name}: expected parent to be zero", start + 24)


def _check_base(header: Header, base: Message | None) -> Message | None:
    if header.base == NO_DIGEST:
        return None
    if base is None or base.broadcast_digest != header.base:
        got = "none" if base is None else base.broadcast_digest.hex()
        raise FormatError(f"expected the base {header.base.hex()}, got {got}", 64)
    if base.header.mask != header.mask:
        raise FormatError("expected a base of the message's mask, got one of another", 64)
    return base
