"""VALUES, TAIL and the buffers: typed arrays. docs/format.md, 3 and 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse.codec.container import (
    RAW,
    TORCH_OF_WIRE,
    WIRE_OF_TORCH,
    Id,
    Section,
    Wire,
)
from fedmap_sparse.codec.errors import FormatError
from fedmap_sparse.layout import TAIL_ALIGN, BufferEntry, FlatLayout

FLOATS = (Wire.FLOAT32, Wire.FLOAT16, Wire.BFLOAT16)

_BUFFERS = {
    "float": (Id.FLOATS, (Wire.FLOAT32, Wire.FLOAT64)),
    "int": (Id.INTS, (Wire.INT64,)),
    "bool": (Id.BOOLS, (Wire.BOOL,)),
}


def write(id: Id, values: Tensor) -> Section:
    """A section of the elements of a CPU tensor, whose memory it views."""
    return Section.make(id, WIRE_OF_TORCH[values.dtype], values.numel(), values)


def read(section: Section, count: int, dtypes: Sequence[Wire]) -> Tensor:
    """The elements as a 1-D tensor that views the message where it can.

    Raises:
        FormatError: another dtype, encoding, count or size than the layout asks for.
    """
    name, at = Id(section.id).name, section.offset
    if section.dtype not in dtypes:
        wanted = ", ".join(w.name.lower() for w in dtypes)
        got = Wire(section.dtype).name.lower()
        raise FormatError(f"{name}: expected {wanted}, got {got}", at)
    if section.encoding != RAW:
        raise FormatError(f"{name}: expected encoding 0, got {section.encoding}", at)
    if section.count != count:
        raise FormatError(f"{name}: expected {count} elements, got {section.count}", at)
    size = count * TORCH_OF_WIRE[Wire(section.dtype)].itemsize
    if len(section.payload) != size:
        raise FormatError(f"{name}: expected {size} bytes, got {len(section.payload)}", at)
    return section.tensor()


def check_tail(section: Section, layout: FlatLayout) -> None:
    """Raise FormatError unless the gaps between the tail's tensors are zero."""
    size = TORCH_OF_WIRE[Wire(section.dtype)].itemsize
    for entry in layout.tail_entries:
        start = entry.offset + entry.numel
        end = -(-start // TAIL_ALIGN) * TAIL_ALIGN
        begin, stop = ((i - layout.prunable_numel) * size for i in (start, end))
        if any(section.payload[begin:stop]):
            at = section.offset + begin
            raise FormatError(f"TAIL: expected zeros after {entry.name}", at)


def write_buffers(layout: FlatLayout, buffers: Mapping[str, Any]) -> list[Section]:
    """FLOATS, INTS and BOOLS, those that have elements. Float buffers travel as float32, or all as
    float64 when one of them is.

    Raises:
        ValueError: names or shapes that differ from the layout's.
    """
    if set(buffers) != {b.name for b in layout.buffers}:
        wanted = [b.name for b in layout.buffers]
        raise ValueError(f"buffers: expected {wanted}, got {list(buffers)}")
    sections = []
    for kind, (id, dtypes) in _BUFFERS.items():
        entries = _of_kind(layout, kind)
        tensors = [torch.as_tensor(buffers[b.name]).detach() for b in entries]
        for b, t in zip(entries, tensors, strict=True):
            if tuple(t.shape) != b.shape:
                raise ValueError(f"{b.name}: expected shape {b.shape}, got {tuple(t.shape)}")
        if not sum(t.numel() for t in tensors):
            continue
        wide = any(t.dtype == torch.float64 for t in tensors)
        dtype = TORCH_OF_WIRE[dtypes[-1] if wide else dtypes[0]]
        flat = torch.cat([t.reshape(-1).to("cpu", dtype) for t in tensors])
        sections.append(write(id, flat))
    return sections


def read_buffers(layout: FlatLayout, sections: Mapping[int, Section]) -> dict[str, Tensor]:
    """Every buffer of the layout, in its shape, as views of the message.

    Raises:
        FormatError: a section that is missing, or that the layout does not ask for.
    """
    flat = {}
    for kind, (id, dtypes) in _BUFFERS.items():
        count = sum(_numel(b) for b in _of_kind(layout, kind))
        section = sections.get(id)
        if (section is None) is (count > 0):
            got = "none" if section is None else "one"
            at = 0 if section is None else section.offset
            raise FormatError(
                f"{count} elements of {kind} buffers, got {got} section {id.name}", at
            )
        if section is None:
            flat[kind] = torch.empty(0, dtype=TORCH_OF_WIRE[dtypes[0]])
            continue
        flat[kind] = read(section, count, dtypes)
        if kind == "bool" and bool((flat[kind].view(torch.uint8) > 1).any()):
            raise FormatError("BOOLS: expected bytes of 0 or 1", section.offset)
    used = dict.fromkeys(flat, 0)
    buffers = {}
    for b in layout.buffers:
        start = used[b.kind]
        used[b.kind] += _numel(b)
        buffers[b.name] = flat[b.kind][start : used[b.kind]].view(b.shape)
    return buffers


def _of_kind(layout: FlatLayout, kind: str) -> list[BufferEntry]:
    return [b for b in layout.buffers if b.kind == kind]


def _numel(b: BufferEntry) -> int:
    return torch.Size(b.shape).numel()
