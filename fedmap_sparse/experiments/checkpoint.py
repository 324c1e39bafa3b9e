"""Nested states as one safetensors file: tensors as such, the rest as JSON in its metadata.

One file, because two could be of two different moments after a crash. Every byte of it is under
one SHA-256, which stands in the metadata; it is computed with zeros in its own place.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _files
from fedmap_sparse.errors import CheckpointError

VERSION = "2"
_TENSOR = "$tensor"  # {"$tensor": "name in the file"} stands for a tensor
_ITEMS = "$items"  # {"$items": [[key, value], ...]} stands for a dict with numbers as keys
_PLAIN, _TEXT = {bool, int, float, str, type(None)}, {str}
_MARK = b'"sha256":"'
_BLANK = b"0" * 64


def save(path: Path, state: Any, keep: Path | None = None) -> None:
    """Write dicts (of str), lists, numbers, text, None and tensors, atomically.

    Equal tensors are stored once: the masks of clients that stand at the same round are one.
    With `keep` the file before goes there.

    Raises:
        TypeError: anything else in `state`.
        OSError: the file cannot be written; the one before is untouched.
    """
    from safetensors.torch import save as serialise

    tensors: dict[str, Tensor] = {}
    known: dict[bytes, str] = {}
    tree = json.dumps(_stored(state, "", tensors, known))
    header = {"version": VERSION, "state": tree, "sha256": _BLANK.decode()}
    data = bytearray(serialise(tensors, header))
    start = _place(data)
    data[start : start + len(_BLANK)] = hashlib.sha256(data).hexdigest().encode()
    _files.write_atomically(path, data, keep)


def load(path: Path) -> Any:
    """What `save` wrote; tuples come back as lists, tensors on the CPU.

    Raises:
        CheckpointError: not such a file, or damaged: a single bit that differs is noticed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    try:
        data = _checked(path)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        return _restored(json.loads(header["state"]), deserialise(data))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {error}") from error


def _checked(path: Path) -> bytes:
    """The bytes of a checkpoint whose checksum is right."""
    descriptor, size = _files.open_regular(path)
    with os.fdopen(descriptor, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:  # before anything is read: the file may be of any size
            raise ValueError("it does not start with a header of its size")
        stream.seek(0)
        data = bytearray(stream.read())
    start = _place(data[: 8 + length])
    wanted = bytes(data[start : start + len(_BLANK)])
    data[start : start + len(_BLANK)] = _BLANK
    if hashlib.sha256(data).hexdigest().encode() != wanted:
        raise ValueError("its checksum is wrong")
    if f'"version":"{VERSION}"'.encode() not in data[: 8 + length]:
        raise ValueError(f"expected version {VERSION}")
    return bytes(data)


def _place(data: bytearray) -> int:
    """Where the checksum stands in a file's header."""
    at = data.find(_MARK)
    if at < 0:
        raise ValueError("it has no checksum")
    return at + len(_MARK)


def _stored(value: Any, name: str, tensors: dict[str, Tensor], known: dict[bytes, str]) -> Any:
    if isinstance(value, Tensor):
        return {_TENSOR: _store(value, name, tensors, known)}
    if _is_plain(value):
        return value
    if isinstance(value, dict):
        if not all(isinstance(key, str | int) and key not in (_TENSOR, _ITEMS) for key in value):
            raise TypeError(f"{name}: expected keys that are text or numbers, got {list(value)}")
        if not all(isinstance(key, str) for key in value):  # JSON would make text of a number
            items = [[k, _stored(v, f"{name}.{k}", tensors, known)] for k, v in value.items()]
            return {_ITEMS: items}
        return {k: _stored(v, f"{name}.{k}".strip("."), tensors, known) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_stored(v, f"{name}.{i}", tensors, known) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: expected plain values and tensors, got {type(value).__name__}")


def _is_plain(value: Any) -> bool:
    """Whether it is a dict of text to plain values, or a list of these: most of a run's records."""
    if type(value) is list:
        return _PLAIN.issuperset(map(type, value))
    return (
        type(value) is dict
        and _PLAIN.issuperset(map(type, value.values()))
        and _TEXT.issuperset(map(type, value))
        and value.keys().isdisjoint((_TENSOR, _ITEMS))
    )


def _store(t: Tensor, name: str, tensors: dict[str, Tensor], known: dict[bytes, str]) -> str:
    t = t.detach().cpu().clone(memory_format=torch.contiguous_format)  # views share no memory then
    state = hashlib.blake2b(f"{t.dtype} {list(t.shape)}".encode())
    state.update(t.reshape(-1).view(torch.uint8).numpy().data)
    digest = state.digest()
    if digest not in known:
        known[digest] = name
        tensors[name] = t
    return known[digest]


def _restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_ITEMS}:
            return {k: _restored(v, tensors) for k, v in value[_ITEMS]}
        return {k: _restored(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_restored(v, tensors) for v in value]
    return value
