"""The state of a server or a client as bytes, without pickle. docs/format.md, 10.

A tree of dicts, lists, tuples, numbers, text, None and tensors: JSON for the tree, raw memory for
the tensors, one BLAKE2b over everything.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse.codec.container import MAX_INTEGER, Buffer, as_bytes, tensor_bytes
from fedmap_sparse.errors import StateError

MAGIC = b"\x89FEDSTA\n"
VERSION = 1
_HEAD = struct.Struct("<8sHHIQQ")  # magic, version, length of the kind, zero, JSON bytes, length
_DIGEST = 32
_ALIGN = 64
_TENSOR, _TUPLE, _MAP, _NUMBER = "$tensor", "$tuple", "$map", "$float"
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool,
        torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    )
}  # fmt: skip


class BytesState(ABC):
    """The bytes form of an object that has `state_dict` and `load_state_dict`."""

    _kind: ClassVar[str]

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def to_bytes(self) -> bytes:
        """`state_dict` as bytes with a checksum, without pickle; docs/format.md, 10."""
        return dump(self._kind, self.state_dict())

    def from_bytes(self, data: Buffer) -> None:
        """Continue from `to_bytes`. Raises as `load_state_dict`, for damaged bytes too."""
        self.load_state_dict(load(self._kind, data))


def dump(kind: str, tree: Any) -> bytes:
    """The bytes of a state.

    Args:
        kind: what it is a state of: "server" or "client".
        tree: dicts, lists, tuples, bool, int, float, str, None and tensors.

    Raises:
        TypeError: anything else.
    """
    tensors: list[Tensor] = []
    text = json.dumps(_plain(tree, tensors, kind), separators=(",", ":"), allow_nan=False).encode()
    name = kind.encode()
    parts: list[Buffer] = []
    at = _HEAD.size + _DIGEST + len(name) + len(text)
    parts += [name, text]
    for t in tensors:
        memory = tensor_bytes(t)
        parts += [bytes(-at % _ALIGN), memory]
        at += -at % _ALIGN + len(memory)
    head = _HEAD.pack(MAGIC, VERSION, len(name), 0, len(text), at)
    return b"".join([head, _digest(head, parts), *parts])


def load(kind: str, data: Buffer) -> Any:
    """What `dump` was given, tensors on the CPU.

    Raises:
        StateError: bytes that are damaged, of another kind or version.
        TypeError: `data` is not bytes, bytearray or a contiguous memoryview.
    """
    view = as_bytes(data)
    if len(view) < _HEAD.size + _DIGEST:
        raise StateError(f"state: expected at least {_HEAD.size + _DIGEST} bytes, got {len(view)}")
    magic, version, kind_size, zero, text_size, length = _HEAD.unpack_from(view)
    if magic != MAGIC or version != VERSION or zero:
        raise StateError(f"state: expected {MAGIC!r} of version {VERSION}, got another file")
    if length != len(view):
        raise StateError(f"state: expected {length} bytes, got {len(view)}")
    start = _HEAD.size + _DIGEST
    found = _digest(view[: _HEAD.size], [view[start:]])
    if found != bytes(view[_HEAD.size : start]):
        raise StateError("state: expected another checksum; the bytes are damaged")
    text_at = start + kind_size
    if text_at + text_size > len(view):
        raise StateError("state: expected a description within the bytes")
    if bytes(view[start:text_at]) != kind.encode():
        got = bytes(view[start:text_at]).decode(errors="replace")
        raise StateError(f"state: expected one of a {kind}, got one of a {got!r}")
    try:
        text = bytes(view[text_at : text_at + text_size])
        tree = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        read = _Reader(view, text_at + text_size)
        restored = _restored(tree, read)
        read.check_end()
        return restored
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise StateError(f"state: expected a sound description, got {error}") from error


def _digest(head: Buffer, parts: list[Buffer]) -> bytes:
    h = hashlib.blake2b(head, digest_size=_DIGEST)
    for part in parts:
        h.update(part)
    return h.digest()


def _plain(value: Any, tensors: list[Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        t = value.detach().cpu().contiguous()
        dtype = str(t.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise TypeError(f"{where}: expected a tensor of a plain dtype, got {dtype}")
        tensors.append(t)
        return {_TENSOR: [dtype, list(t.shape)]}
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: _plain(v, tensors, f"{where}.{k}") for k, v in value.items()}
        pairs = value.items()
        return {
            _MAP: [
                [_plain(k, tensors, where), _plain(v, tensors, f"{where}.{k}")] for k, v in pairs
            ]
        }
    if isinstance(value, list | tuple):
        items = [_plain(v, tensors, f"{where}.{i}") for i, v in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return _plain(value.item(), tensors, where)
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where}: expected plain values and tensors, got {type(value).__name__}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that stands twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text}, which is no JSON")


class _Reader:
    """Takes tensors off the bytes, in the order of the tree."""

    def __init__(self, view: memoryview, start: int) -> None:
        self._view, self._at = view, start

    def __call__(self, name: str, shape: list[int]) -> Tensor:
        view, at = self._view, self._at
        dtype = _DTYPES[name]
        numel = 1
        for size in shape:
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MAX_INTEGER:
                raise ValueError(f"a shape of {shape}")
            numel *= size
        at += -at % _ALIGN
        if numel > MAX_INTEGER or at + numel * dtype.itemsize > len(view):
            raise ValueError(f"a tensor of shape {shape} beyond the end")
        part = bytearray(view[at : at + numel * dtype.itemsize])
        self._at = at + len(part)
        if dtype == torch.bool and part and max(part) > 1:
            raise ValueError("a Boolean that is not 0 or 1")
        flat = (
            torch.frombuffer(part, dtype=dtype)
            if part
            else torch.empty(0, dtype=dtype, device="cpu")
        )
        return flat.view(shape)

    def check_end(self) -> None:
        """Raise ValueError unless the last tensor ends with the bytes."""
        if self._at != len(self._view):
            raise ValueError(f"{len(self._view) - self._at} bytes after the last tensor")


def _restored(value: Any, read: _Reader) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return read(*value[_TENSOR])
        if _TUPLE in value:
            return tuple(_restored(v, read) for v in value[_TUPLE])
        if _MAP in value:
            return {_restored(k, read): _restored(v, read) for k, v in value[_MAP]}
        if _NUMBER in value:
            return _SPECIAL[value[_NUMBER]]
        return {k: _restored(v, read) for k, v in value.items()}
    if isinstance(value, list):
        return [_restored(v, read) for v in value]
    return value


def field(state: Any, name: str, kinds: type | tuple[type, ...]) -> Any:
    """A field of a state from outside.

    Raises:
        StateError: it is missing or of another type; the message names it.
    """
    if not isinstance(state, dict):
        raise StateError(f"state: expected a dict, got {type(state).__name__}")
    if name not in state:
        raise StateError(f"{name}: expected it in the state, got none")
    value = state[name]
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in allowed)
        raise StateError(f"{name}: expected {wanted}, got {type(value).__name__}")
    return value


def count(state: Any, name: str) -> int:
    """A field that is an integer of 0 to 2^53."""
    value: int = field(state, name, int)
    if not 0 <= value <= MAX_INTEGER:
        raise StateError(f"{name}: expected 0 to 2^53, got {value}")
    return value


def dense(name: str, value: Tensor, dtypes: Collection[torch.dtype] | None = None) -> None:
    """Raise StateError unless a tensor has elements in memory, of one of the dtypes.

    None: of those that a state may hold as bytes.
    """
    allowed = _DTYPES.values() if dtypes is None else dtypes
    if value.dtype not in allowed or value.layout is not torch.strided or value.is_meta:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        kind = "" if value.layout is torch.strided else f" ({value.layout})"
        raise StateError(
            f"{name}: expected a dense tensor of {wanted}, got {value.dtype}{kind} on "
            f"{value.device}"
        )


def tensor(
    name: str, value: Any, dtypes: tuple[torch.dtype, ...], numel: int, limit: float | None = None
) -> Tensor:
    """A 1-D tensor from outside, checked; with `limit`, finite and of magnitude `limit` at most."""
    if not isinstance(value, Tensor):
        raise StateError(f"{name}: expected a tensor, got {type(value).__name__}")
    dense(name, value, dtypes)
    if value.dim() != 1 or value.numel() != numel:
        raise StateError(f"{name}: expected shape ({numel},), got {tuple(value.shape)}")
    if limit is not None and not bool((value.abs() <= limit).all()):
        raise StateError(f"{name}: expected finite elements within {limit:.5g}, got others")
    return value
