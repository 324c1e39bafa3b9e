"""The state-dict API: for systems that hold tensors or NumPy arrays by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse import _checks
from fedmap_sparse.codec.container import Buffer
from fedmap_sparse.codec.decode import decode
from fedmap_sparse.codec.encode import Stamp, encode
from fedmap_sparse.codec.message import MaskSection, Message
from fedmap_sparse.codec.values import Coding
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask

Masks = Mask | Mapping[str, Any]


@dataclass(frozen=True)
class _Flat:
    """A state dict laid out as a FlatParameters is."""

    layout: FlatLayout
    prunable: Tensor
    tail: Tensor
    buffers: dict[str, Tensor]


def encode_state_dict(
    state: Mapping[str, Any],
    masks: Masks | None = None,
    *,
    layout: FlatLayout | None = None,
    dtype: str = "float32",
    mask_section: MaskSection = "full",
    parent: Masks | None = None,
    base: Message | None = None,
    coding: Coding = "entropy",
    **stamp: Unpack[Stamp],
) -> bytes:
    """A message with the survivors of a state dict.

    Args:
        state: names to tensors or NumPy arrays. Parameters are float32, float16 or bfloat16;
            float64 and foreign byte orders are cast to float32 first. Mixed dtypes travel as
            float32. Integer buffers travel as int64.
        masks: names of prunable parameters to bool tensors or arrays of their shapes, or a Mask
            over `layout`; what is not named is kept whole. None: everything is kept.
        layout: None means `FlatLayout.from_state_dict(state)`, which tells buffers by name and
            dtype; give one where that guesses wrong.
        dtype: of the values on the wire: "float32", "float16", "bfloat16" or "int8".
        mask_section: "full" suits receivers that remember nothing; "none" and "delta" (with
            `parent`, the receiver's masks) are smaller.
        base, coding, stamp: as in `encode`.

    Returns:
        The message: `len(result)` is what travels.

    Raises:
        ValueError: names or shapes that are not the layout's, a float64 beyond float32.
        TypeError: a dtype that the codec does not carry.

    >>> import numpy as np, fedmap_sparse as fs
    >>> weights = {"w": np.eye(64, dtype=np.float32), "b": np.ones(64, np.float32)}
    >>> message = fs.encode_state_dict(weights, {"w": weights["w"] != 0})
    >>> len(message) < 64 * 64 * 4
    True
    """
    layout = layout or FlatLayout.from_state_dict(state)
    values, buffers = _flat(state, layout)
    start = layout.prunable_numel
    return encode(
        _Flat(layout, values[:start], values[start:], buffers),
        as_mask(masks, layout),
        dtype=dtype,
        mask_section=mask_section,
        parent=None if parent is None else as_mask(parent, layout),
        base=base,
        coding=coding,
        **stamp,
    )


def decode_state_dict(
    data: Buffer,
    *,
    like: Mapping[str, Any] | None = None,
    layout: FlatLayout | None = None,
    masks: Masks | None = None,
    base: Message | None = None,
) -> dict[str, Any]:
    """The state dict of a message, dense, pruned weights zero.

    Args:
        data: the message.
        like: a state dict of the names and shapes to expect; the result has its dtypes, and arrays
            where it has arrays.
        layout: instead of `like`, or beside it where its buffers cannot be told by name. A reader
            has to say what it expects: else a few bytes could claim any amount of memory.
        masks: the receiver's masks, for messages that carry none or a delta.
        base: as in `decode`.

    Returns:
        Names to fresh tensors (or arrays).

    Raises:
        ValueError: neither `like` nor `layout` was given.
        FormatError: a message to refuse; see `decode`.

    >>> import numpy as np, fedmap_sparse as fs
    >>> weights = {"w": np.eye(64, dtype=np.float32), "b": np.ones(64, np.float32)}
    >>> message = fs.encode_state_dict(weights, {"w": weights["w"] != 0})
    >>> received = fs.decode_state_dict(message, like=weights)
    >>> bool((received["w"] == weights["w"]).all())
    True
    """
    if layout is None:
        if like is None:
            raise ValueError("decode_state_dict: expected `like` or `layout`, got neither")
        layout = FlatLayout.from_state_dict(like)
    mask = None if masks is None else as_mask(masks, layout)
    state = decode(data, layout, mask=mask, base=base, device="cpu").to_state_dict()
    return {name: _like(t, None if like is None else like[name]) for name, t in state.items()}


def as_mask(masks: Masks | None, layout: FlatLayout) -> Mask:
    """The Mask over `layout` of bool arrays by name; None means everything is kept."""
    if masks is None:
        return layout.initial_mask()
    if isinstance(masks, Mask):
        layout.check_mask(masks)
        return masks
    names = {e.name for e in layout.prunable_entries}
    if unknown := sorted(set(masks) - names):
        raise ValueError(f"masks: expected names of prunable parameters, got {unknown}")
    keep = layout.initial_mask().to_bool()
    for e in layout.prunable_entries:
        if e.name in masks:
            bits = _tensor(e.name, masks[e.name], e.shape, (torch.bool,))
            keep[e.offset : e.offset + e.numel] = bits.reshape(-1)
    return Mask.from_bool(keep)


def _flat(state: Mapping[str, Any], layout: FlatLayout) -> tuple[Tensor, dict[str, Tensor]]:
    if set(state) != set(layout.names):
        odd = sorted(set(state) ^ set(layout.names))
        raise ValueError(f"state: expected the layout's names, got a difference in {odd}")
    found = {
        e.name: _tensor(e.name, state[e.name], e.shape, _checks.FLOAT_DTYPES)
        for e in layout.entries
    }
    dtypes = {t.dtype for t in found.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # the others embed into it
    values = torch.zeros(layout.numel, dtype=dtype, device="cpu")
    for e in layout.entries:
        values[e.offset : e.offset + e.numel] = found[e.name].reshape(-1)
    return values, {b.name: _integers(b.name, state[b.name]) for b in layout.buffers}


def _torch(name: str, value: Any) -> Tensor:
    """A CPU tensor of a tensor, array or NumPy scalar, in this machine's byte order."""
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ValueError(f"{name}: expected elements in memory, got a meta tensor")
        return value.detach().cpu()
    if np.ma.is_masked(value):
        raise TypeError(f"{name}: expected an array without masked elements, got some; fill them")
    array = np.asarray(value)
    if any(stride < 0 for stride in array.strides):  # torch has no such tensors
        array = np.ascontiguousarray(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    with warnings.catch_warnings():  # read-only arrays are only read
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.as_tensor(array, device="cpu")
        except TypeError as error:
            raise TypeError(f"{name}: expected numbers or Booleans, got {array.dtype}") from error


def _tensor(
    name: str, value: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    t = _torch(name, value)
    if t.dtype == torch.float64 and torch.float32 in dtypes:
        narrow = t.to(torch.float32)
        if bool((narrow.isinf() & t.isfinite()).any()):
            raise ValueError(f"{name}: expected the range of float32, got a float64 beyond it")
        t = narrow
    t = t.contiguous()
    _checks.check_tensor(name, t, dtypes)
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
    return t


def _integers(name: str, value: Any) -> Tensor:
    t = _torch(name, value)
    if t.dtype == torch.uint64 and bool((t.view(torch.int64) < 0).any()):
        raise ValueError(f"{name}: expected integers below 2^63, got more")
    return t


def _like(t: Tensor, like: Any) -> Any:
    if like is None:
        return t.clone()
    if isinstance(like, Tensor):
        where = t.device if like.device.type == "meta" else like.device  # shapes alone
        return t.to(where, like.dtype, copy=True)
    wide = t.float() if t.dtype == torch.bfloat16 else t  # NumPy has no bfloat16
    return wide.numpy().astype(np.asarray(like).dtype)
