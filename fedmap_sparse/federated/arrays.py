"""An update as one float32 vector: survivors, tail, float buffers. For secure and robust sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmap_sparse.codec import Message
from fedmap_sparse.codec.buffers import FlatBuffers
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask


@dataclass(frozen=True)
class ArraySection:
    """Elements `start` to `stop` of the vector are `name`: "survivors", "tail", or a buffer."""

    name: str
    kind: str
    start: int
    stop: int


def array_sections(layout: FlatLayout, mask: Mask) -> tuple[ArraySection, ...]:
    """The table of an update's vector under a mask.

    First the `mask.nnz` survivors in index order, then the tail with its gaps (which are 0), then
    each float buffer in the layout's order, row-major. Integer and bool buffers are no part of it.

    Args:
        layout: of the model.
        mask: over `layout.prunable_numel` elements.

    Returns:
        The parts of the vector, in order.

    >>> import torch, fedmap_sparse as fs
    >>> params = fs.flatten(torch.nn.Linear(3, 2))
    >>> [(s.name, s.start, s.stop) for s in array_sections(params.layout, params.mask)]
    [('survivors', 0, 6), ('tail', 6, 14)]
    """
    end = mask.nnz + layout.tail_numel
    found = [
        ArraySection("survivors", "survivors", 0, mask.nnz),
        ArraySection("tail", "tail", mask.nnz, end),
    ]
    for b in layout.buffers:
        if b.kind == "float":
            start, end = end, end + torch.Size(b.shape).numel()
            found.append(ArraySection(b.name, "buffer", start, end))
    return tuple(found)


def of_message(message: Message) -> Tensor:
    """The vector of a message, a copy."""
    return join(message.packed, message.tail, message.flat_buffers)


def join(packed: Tensor, tail: Tensor, flat: FlatBuffers | None = None) -> Tensor:
    """The vector: float32, on the device of `packed`, a copy. Without `flat` it ends with the tail.

    Buffers that are not float are left out.

    An infinite or NaN element of a buffer is a constant of the model (a causal mask of -inf, say)
    and travels as 0: no sum can carry it, and the server keeps its own.
    """
    parts = [packed.detach(), tail.detach()]
    if flat is not None:
        parts.append(flat["float"].to(torch.float32).nan_to_num(0.0, 0.0, 0.0))
    return torch.cat([p.reshape(-1).to(packed.device, torch.float32) for p in parts])


def clear_gaps(tail: Tensor, layout: FlatLayout) -> None:
    """Write 0 where no parameter lies in the tail, as messages and models have it."""
    tail.index_fill_(0, layout.tail_padding.to(tail.device), 0.0)


def split(array: Tensor, layout: FlatLayout, mask: Mask) -> tuple[Tensor, Tensor]:
    """(survivors and tail, the float buffers side by side on the CPU) of a vector."""
    end = mask.nnz + layout.tail_numel
    return array[:end], array[end:].cpu()


def sound(name: str, vector: object, like: Tensor) -> Tensor:
    """What the caller's aggregator or server optimizer gave, contiguous and without autograd.

    Raises:
        ValueError: it is no dense tensor of the shape, dtype and device of `like`.
    """
    wanted = f"{like.dtype} of shape {tuple(like.shape)} on {like.device}"
    if not isinstance(vector, Tensor) or vector.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, {wanted}, got {type(vector).__name__}")
    if (vector.shape, vector.dtype, vector.device) != (like.shape, like.dtype, like.device):
        got = f"{vector.dtype} of shape {tuple(vector.shape)} on {vector.device}"
        raise ValueError(f"{name}: expected {wanted}, got {got}")
    return vector.detach().contiguous()
