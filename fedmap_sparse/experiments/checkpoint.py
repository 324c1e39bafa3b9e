"""Nested states as one safetensors file: tensors as such, the rest as JSON in its metadata.

One file, because two could be of two different moments after a crash. It is written beside its
name, flushed to the disk, and renamed: a reader finds the old one or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse.errors import CheckpointError

VERSION = "1"
_TENSOR = "$tensor"  # {"$tensor": "name in the file"} stands for a tensor


def save(path: Path, state: Any) -> None:
    """Write dicts (of str), lists, numbers, text, None and tensors, atomically.

    Equal tensors are stored once: the masks of clients that stand at the same round are one.

    Raises:
        TypeError: anything else in `state`.
        OSError: the file cannot be written; the one before is untouched.
    """
    from safetensors.torch import save as serialise

    tensors: dict[str, Tensor] = {}
    known: dict[bytes, str] = {}
    tree = json.dumps(_stored(state, "", tensors, known))
    write_atomically(path, serialise(tensors, {"version": VERSION, "state": tree}))


def load(path: Path) -> Any:
    """What `save` wrote; tuples come back as lists, tensors on the CPU.

    Raises:
        CheckpointError: not such a file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("version") != VERSION:
                got = header.get("version", "none")
                raise CheckpointError(f"{path}: expected a checkpoint of version 1, got {got}")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        return _restored(json.loads(header["state"]), tensors)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`, or leave it as it was."""
    with replacing(path) as beside:
        beside.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path`, on the disk, when the block ends well."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        beside.replace(path)
        if os.name == "posix":  # the rename itself is on the disk once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        beside.unlink(missing_ok=True)


def _stored(value: Any, name: str, tensors: dict[str, Tensor], known: dict[bytes, str]) -> Any:
    if isinstance(value, Tensor):
        return {_TENSOR: _store(value, name, tensors, known)}
    if isinstance(value, dict):
        if not all(isinstance(key, str) and key != _TENSOR for key in value):
            raise TypeError(f"{name}: expected keys that are text, got {list(value)}")
        return {k: _stored(v, f"{name}.{k}".strip("."), tensors, known) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_stored(v, f"{name}.{i}", tensors, known) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: expected plain values and tensors, got {type(value).__name__}")


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
        return {k: _restored(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_restored(v, tensors) for v in value]
    return value
