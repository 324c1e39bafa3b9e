"""What a tensor of a state dict is: its kind, and whose memory it shares."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The kinds of buffers that a message can carry; others stay with the module.
CARRIED = ("float", "int", "bool")
#: The name of the tensor whose memory another one shares, and how it is permuted, if it is.
Tie = tuple[str, tuple[int, ...] | None]

# Buffers of torch's own normalisation layers, told from parameters by name where a state dict is
# all there is.
_BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked")


_KINDS = {torch.float32: "float", torch.int64: "int", torch.bool: "bool"}  # of most buffers


@dataclass(frozen=True)
class Extra:
    """What a state dict holds beside parameters and buffers: a module's `get_extra_state()`."""

    value: Any


class Kind(NamedTuple):
    """The buffers of one kind, which lie side by side where messages carry them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    def at(self, index: int) -> int:
        """The place in `names` of the buffer that one of the elements belongs to."""
        return bisect(list(accumulate(self.sizes)), index)


def kind_of(t: Any) -> str:
    """The kind of a buffer: one of CARRIED, or what makes it none of them."""
    if isinstance(t, Tensor):
        if t.layout is not torch.strided:
            return str(t.layout).removeprefix("torch.")
        if t.dtype in _KINDS:
            return _KINDS[t.dtype]
    # A NumPy dtype has a name without its byte order.
    dtype = getattr(t.dtype, "name", str(t.dtype).removeprefix("torch."))
    if dtype == "bool":
        return "bool"
    if dtype in ("float64", "float32", "float16", "bfloat16"):
        return "float"
    if dtype.startswith(("int", "uint")):
        return "int"
    return dtype


def is_buffer(name: str, state: Mapping[str, Any]) -> bool:
    """Whether a tensor of a state dict is taken for a buffer, by its name or dtype."""
    t = state[name]
    return (
        name.rsplit(".", 1)[-1] in _BUFFER_NAMES or not hasattr(t, "shape") or kind_of(t) != "float"
    )


def ties(tensors: Mapping[str, Any]) -> dict[str, Tie]:
    """Those that share the memory of an earlier one, element for element."""
    first: dict[Any, str] = {}
    tied: dict[str, Tie] = {}
    for name, t in tensors.items():
        shape, strides = tuple(t.shape), _strides(t)
        if not all(shape):
            continue
        key = (_memory(t), tuple(sorted((s, n) for s, n in zip(strides, shape, strict=True))))
        if key not in first:
            first[key] = name
            continue
        of = tensors[first[key]]
        if (tuple(of.shape), _strides(of)) == (shape, strides):
            tied[name] = first[key], None
            continue
        left = list(zip(_strides(of), tuple(of.shape), strict=True))
        dims = []
        for dim in zip(strides, shape, strict=True):
            dims.append(left.index(dim))
            left[dims[-1]] = (-1, -1)
        tied[name] = first[key], tuple(dims)
    return tied


def _strides(t: Any) -> tuple[int, ...]:
    return tuple(t.stride()) if isinstance(t, Tensor) else tuple(t.strides)


def _memory(t: Any) -> Any:
    """Where its elements begin. A tensor without memory (meta, fake) has its storage's identity."""
    if not isinstance(t, Tensor):
        return t.__array_interface__["data"][0]
    if t.device.type == "meta" or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return t.untyped_storage()._cdata, t.storage_offset()
    return t.data_ptr()
