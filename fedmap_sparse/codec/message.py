"""A message: a model's survivors, tail and buffers. Written by `encode`, read by `decode`.

docs/format.md is the specification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fedmap_sparse import _checks, ops
from fedmap_sparse._module_tree import own_storage
from fedmap_sparse.codec import buffers as side_by_side
from fedmap_sparse.codec import container, masks, meta, values
from fedmap_sparse.codec.buffers import FlatBuffers
from fedmap_sparse.codec.container import DENSE, RAW, Header, Id, Wire
from fedmap_sparse.codec.container import Section as Section
from fedmap_sparse.codec.values import Coding, Quantized
from fedmap_sparse.errors import FormatError, NeedsMask
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops import entropy

MaskSection = Literal["none", "full", "delta"]


@dataclass(frozen=True, eq=False, repr=False)
class Message:
    """A message in memory. Its tensors may view the bytes it came from: do not write to them.

    Mask, values and tail are on the device that `decode` was asked for; buffers are on the CPU.

    Attributes:
        layout: the layout it was written or read with.
        header: the fixed part: digests, round, epoch, samples.
        mask: the mask whose survivors the values are.
        sections: by id, without the mask section and those that this version ignores.
        tail: Tensor[layout.tail_numel].
        flat_buffers: all buffers of a kind as one vector, see `codec.buffers`.
        meta: the record; empty when there was none.
        mask_section: the MASK or DELTA section that came with it, if any.
        base: the broadcast that its values are differences from, if they are.
        coding: of mask sections that `encode` writes.
    """

    layout: FlatLayout
    header: Header
    mask: Mask
    sections: Mapping[int, Section] = field(repr=False)
    tail: Tensor
    flat_buffers: FlatBuffers
    meta: dict[str, meta.Value]
    mask_section: Section | None = field(default=None, repr=False)
    base: Message | None = field(default=None, repr=False)
    coding: Coding = "entropy"

    @cached_property
    def packed(self) -> Tensor:
        """Tensor[mask.nnz] in the wire's dtype; float32 for int8 and where a base was added.

        Decoded when it is first asked for.
        """
        return self._of_wire(values.read(self._values, self.mask.device))

    @cached_property
    def buffers(self) -> dict[str, Tensor]:
        """Name to tensor, in the layout's shapes: float32 or float64, int64, bool."""
        return side_by_side.split(self.layout, self.flat_buffers)

    def _of_wire(self, wire: Tensor) -> Tensor:
        if self.base is None:
            return wire
        return self.base.packed.to(wire.device).float() + wire.float()

    @property
    def _values(self) -> Section:
        return self.sections[Id.VALUES]

    @property
    def round(self) -> int:
        """Number of the round, from 0."""
        return self.header.round

    @property
    def epoch(self) -> int:
        """How many times the mask has been pruned."""
        return self.header.epoch

    @property
    def num_samples(self) -> int:
        """The update's weight in the mean; 0 in a broadcast."""
        return self.header.samples

    @property
    def answers(self) -> bytes:
        """Digest of the broadcast that this update answers; 16 zero bytes in a broadcast."""
        return self.header.answers

    @property
    def dtype(self) -> str:
        """Of the values on the wire: "float32", "float16", "bfloat16" or "int8"."""
        return Wire(self._values.dtype).name.lower()

    @cached_property
    def broadcast_digest(self) -> bytes:
        """16 bytes, the same for all receivers of a broadcast: `answers` of their updates."""
        return container.broadcast_digest(self.header, tuple(self.sections.values()))

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
            part = flat[e.offset < start][at : at + e.numel]
            found[e.name] = own_storage(part).view(e.shape)  # so that it is saved by itself
        return self.layout.spread(found)

    @cached_property
    def _bound(self) -> float:
        decoded = "packed" in self.__dict__
        if decoded or self.base is not None or self.mask.device != values.CPU:
            return values.peak(self.packed)
        return values.bound(self._values)

    def within(self, limit: float) -> bool:
        """Whether all values and the tail are finite and of magnitude `limit` at most.

        Values that are coded are decoded tile by tile and not stored, unless some come near
        `limit`.
        """
        near = self._bound > limit and values.peak(self.packed) > limit
        return not near and values.peak(self.tail) <= limit

    def all_finite(self) -> bool:
        """Whether values, tail and float buffers hold no NaN and no infinity."""
        floats = self.flat_buffers["float"]
        return self.within(torch.finfo(torch.float32).max) and values.peak(floats) < math.inf

    def beyond(self, limit: float) -> str:
        """The name of the first tensor with a value that `within` does not allow."""
        for part, start in ((self.packed, 0), (self.tail, self.mask.nnz)):
            # NaN compares false, so the allowed ones are asked for.
            for index in (~(part.detach().abs() <= limit)).nonzero()[:1].flatten().tolist():
                return self.tensor_at(start + index)
        raise ValueError(f"limit: expected a value beyond {limit}, got none")

    def tensor_at(self, index: int) -> str:
        """The name of the tensor that element `index` of survivors and tail belongs to."""
        if index < self.mask.nnz:
            through = masks.counts(self.mask, self.layout).cumsum(0)
            return self.layout.prunable_entries[int((through <= index).sum())].name
        at = index - self.mask.nnz + self.layout.prunable_numel
        return next(e.name for e in reversed(self.layout.tail_entries) if e.offset <= at)

    def add_to(self, accumulator: ops.Accumulator, weight: float) -> None:
        """Add `weight * packed` to an accumulator of mask.nnz elements: the same bits as
        `accumulator.add(message.packed, weight)`, but from the message's bytes, tile by tile, with
        no copy of the values where they are coded and on the CPU. The accumulator is on the
        message's device."""
        raw = self._values.encoding == RAW and self.dtype != "int8"
        decoded = raw or "packed" in self.__dict__
        if decoded or self.base is not None or self.mask.device != values.CPU:
            accumulator.add(self.packed, weight)
            return
        _checks.check_numel("accumulator", accumulator.sums, self.mask.nnz, "the mask's nnz")
        values.add_to(accumulator.sums, self._values, weight)
        accumulator.total += weight

    def check_receiver(self, layout: FlatLayout, mask: Mask | None, device: torch.device) -> None:
        """Whether one more receiver could have decoded it: raises what its `decode` would.

        Args:
            layout, mask, device: the receiver's.

        Raises:
            NeedsMask: it builds on a mask other than `mask`.
            FormatError: it is of another layout.
            ValueError: its tensors are on another device.
        """
        if self.header.layout != layout.digest():
            wanted, got = layout.digest().hex(), self.header.layout.hex()
            raise FormatError(f"expected a message of layout {wanted}, got {got}", 16)
        if self.mask.device != device:
            raise ValueError(f"message: expected tensors on {device}, got {self.mask.device}")
        if self.header.flags & DENSE:
            return
        carried = self.mask_section
        if carried is None or carried.id == Id.DELTA:
            needed = self.header.mask if carried is None else carried.parent
            held = None if mask is None else mask.digest()
            if held != needed:
                raise NeedsMask(needed, held)

    def __repr__(self) -> str:
        kind = "update" if any(self.answers) else "broadcast"
        return (
            f"Message({kind}, round {self.round}, epoch {self.epoch}, {self.mask.nnz} of "
            f"{self.layout.eligible} weights, {self.dtype}, {self.num_samples} samples)"
        )

    def encode(self, mask_section: MaskSection | None = None, parent: Mask | None = None) -> bytes:
        """The message's bytes. Costs the mask section and one copy.

        Args:
            mask_section: what the receiver needs: "none" (it has the mask, and the digest proves
                it), "full" (it has nothing), "delta" (it has `parent`); None: the section that this
                message came with. The dense mask costs no bits and never has a section.
            parent: with "delta", a superset of the mask.

        Raises:
            ValueError: another name, or a `parent` that is missing, superfluous, or no superset.
        """
        lead = self.mask_section if mask_section is None else self._lead(mask_section, parent)
        first = () if lead is None or self.header.flags & DENSE else (lead,)
        return container.join(self.header, (*first, *self.sections.values()))

    def _lead(self, kind: MaskSection, parent: Mask | None) -> Section | None:
        if kind not in ("none", "full", "delta"):
            raise ValueError(f"mask_section: expected 'none', 'full' or 'delta', got {kind!r}")
        if (parent is None) is (kind == "delta"):
            wanted = "a parent" if kind == "delta" else "no parent"
            raise ValueError(f"parent: expected {wanted} for mask_section={kind!r}, got {parent}")
        if parent is not None:
            return masks.delta_section(self.mask, parent, self.layout, self.coding)
        if kind == "none" or self.header.flags & DENSE:
            return None
        return masks.full_section(self.mask, self.layout, self.coding)


def assemble(
    layout: FlatLayout,
    mask: Mask,
    packed: Tensor | Quantized,
    tail: Tensor,
    buffers: Mapping[str, object],
    header: Header,
    record: Mapping[str, meta.Value] | None,
    coding: Coding,
    base: Message | None,
    lead: entropy.Coding | None = None,
) -> Message:
    """A message of what is packed and in the wire's dtypes already; see `compose`. It has a mask
    section where one is given that a device is coding."""
    leading = None if lead is None else (mask, lead)
    model = values.write_model(packed, tail, coding, leading)
    flat = side_by_side.gather(layout, buffers)
    written = [*model, *side_by_side.write(flat)]
    if record:
        written.append(meta.write(record))
    sections = {s.id: s for s in written}
    carried = sections.pop(Id.MASK, None)
    message = Message(
        layout=layout,
        header=header,
        mask=mask,
        sections=sections,
        tail=tail,
        flat_buffers=flat,
        meta=dict(record or {}),
        mask_section=carried,
        base=base,
        coding=coding,
    )
    if isinstance(packed, Tensor) and base is None:
        message.__dict__["packed"] = packed  # as decoded; it need not be read back
    return message
