"""Tensors in memory that worker processes share: nothing is copied when a worker starts."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

import torch
from torch import Tensor


class SharedTensor:
    """A CPU tensor in memory of its own, which a worker process maps instead of copying.

    The memory has no name: it goes when its last process does. Pickled, it is the number of a file
    descriptor, so it means something in a worker alone (`Workers`).

    Attributes:
        tensor: contiguous, zeros at first.
        descriptor: of the memory; a worker has it under the same number.

    >>> shared = SharedTensor((2, 3), torch.float32)
    >>> shared.tensor.shape
    torch.Size([2, 3])
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.descriptor = _memory()
        os.truncate(self.descriptor, _size(shape, dtype))
        self._map(shape, dtype)

    def _map(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._mapped = mmap.mmap(self.descriptor, _size(shape, dtype))
        flat = torch.frombuffer(self._mapped, dtype=dtype)
        self.tensor: Tensor = flat[: torch.Size(shape).numel()].view(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attached, (self.descriptor, tuple(self.tensor.shape), self.tensor.dtype)

    def __del__(self) -> None:
        if "descriptor" in self.__dict__:
            os.close(self.descriptor)


def _attached(descriptor: int, shape: tuple[int, ...], dtype: torch.dtype) -> SharedTensor:
    shared = SharedTensor.__new__(SharedTensor)
    shared.descriptor = descriptor
    shared._map(shape, dtype)
    return shared


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor; one element at least, as no memory can be mapped that has none."""
    return max(torch.Size(shape).numel(), 1) * dtype.itemsize


def _memory() -> int:
    """A file descriptor of memory without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedmap-sparse")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
