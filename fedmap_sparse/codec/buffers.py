"""FLOATS, INTS and BOOLS: a model's buffers, those of a kind side by side. docs/format.md, 3.

A model has dozens of small ones (resnet20: 57), and a call of torch for each takes far longer than
their bytes. So a message has a vector of each kind, and gives a buffer of its own only where
someone asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse._backends import native
from fedmap_sparse._tensor_kinds import Kind
from fedmap_sparse.codec import values
from fedmap_sparse.codec.container import RAW, TORCH_OF_WIRE, Id, Section, Wire
from fedmap_sparse.errors import FormatError
from fedmap_sparse.layout import FlatLayout

#: "float", "int" and "bool", each to the buffers of that kind as `layout.buffer_kinds` lists them:
#: 1-D, on the CPU, of float32 or float64, int64, and bool; without elements where there are none.
FlatBuffers = dict[str, Tensor]

_SECTIONS = {
    "float": (Id.FLOATS, (Wire.FLOAT32, Wire.FLOAT64)),
    "int": (Id.INTS, (Wire.INT64,)),
    "bool": (Id.BOOLS, (Wire.BOOL,)),
}


def gather(layout: FlatLayout, buffers: Mapping[str, Any]) -> FlatBuffers:
    """Copies of buffers side by side. Those of floats are float32, or all float64 when one is.

    Raises:
        ValueError: names or shapes that differ from the layout's.
        TypeError: a buffer of a kind that messages do not carry.
    """
    layout.check_carried()
    if buffers.keys() != {b.name for b in layout.buffers}:
        wanted = [b.name for b in layout.buffers]
        raise ValueError(f"buffers: expected {wanted}, got {list(buffers)}")
    return {
        kind: _side_by_side(of, [buffers[name] for name in of.names], _SECTIONS[kind][1])
        for kind, of in layout.buffer_kinds.items()
    }


def _side_by_side(of: Kind, buffers: list[Any], wires: Sequence[Wire]) -> Tensor:
    flat = torch.empty(sum(of.sizes), dtype=TORCH_OF_WIRE[wires[0]], device="cpu")
    if not buffers or (native is not None and native.gather(buffers, of.shapes, flat)):
        return flat
    tensors = [_tensor(b) for b in buffers]
    for name, shape, t in zip(of.names, of.shapes, tensors, strict=True):
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
    wide = any(t.dtype == torch.float64 for t in tensors)
    dtype, device = TORCH_OF_WIRE[wires[-1] if wide else wires[0]], tensors[0].device
    return torch.cat([t.reshape(-1).to(device, dtype) for t in tensors]).cpu()


def _tensor(value: Any) -> Tensor:
    """As it is, or on the CPU, whatever torch's default device is."""
    return (value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")).detach()


def write(flat: FlatBuffers) -> list[Section]:
    """Sections of those kinds that have elements; they view the vectors."""
    return [values.write(_SECTIONS[kind][0], t) for kind, t in flat.items() if t.numel()]


def read(layout: FlatLayout, sections: Mapping[int, Section]) -> FlatBuffers:
    """Every buffer of the layout, as views of the message.

    Raises:
        FormatError: a section that is missing, or that the layout does not ask for.
    """
    flat = {}
    for kind, (number, dtypes) in _SECTIONS.items():
        count = sum(layout.buffer_kinds[kind].sizes)
        section = sections.get(number)
        if (section is None) is (count > 0):
            got = "none" if section is None else "one"
            at = 0 if section is None else section.offset
            raise FormatError(
                f"{count} elements of {kind} buffers, got {got} section {number.name}", at
            )
        if section is None:
            flat[kind] = torch.empty(0, dtype=TORCH_OF_WIRE[dtypes[0]], device="cpu")
            continue
        values.check(section, count, dtypes, (RAW,))
        flat[kind] = values.read(section)
        if kind == "bool" and bool((flat[kind].view(torch.uint8) > 1).any()):
            raise FormatError("BOOLS: expected bytes of 0 or 1", section.offset)
    return flat


def split(layout: FlatLayout, flat: FlatBuffers) -> dict[str, Tensor]:
    """Each buffer by name, in its shape and in the layout's order: views of the vectors."""
    found = {
        name: part.view(shape)
        for kind, of in layout.buffer_kinds.items()
        for name, shape, part in zip(of.names, of.shapes, flat[kind].split(of.sizes), strict=True)
    }
    return {b.name: found[b.name] for b in layout.buffers}
