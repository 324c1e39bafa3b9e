"""Bytes from the host to a device and back: many threads, pinned memory, as few waits as can be.

torch keeps pinned memory that was freed and hands it out again once the copies from it are done, on
any thread: only the first message of a size pays for making it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse import _backends
from fedmap_sparse._backends import native

#: Bytes on their way to a device while the next are put into pinned memory: a thread takes 1 MiB,
#: so that fewer would leave threads idle.
_PIECE = 16 << 20
#: One thread copies less than this in the time that others take to wake.
MANY = 512 << 10
#: `unwritten(None, n)`: n bytes for the one who asks to write; `bytes(n)` would write zeros first.
unwritten = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)


def copy(source: Tensor, to: Tensor) -> None:
    """Bytes of one uint8 tensor on the host to another, by many threads where they are many.

    A message of 9.5 MB was copied by one thread in about 1.5 ms, longer than a GPU took for it.
    """
    whole = source.numel() // 8 * 8 if native is not None and source.numel() >= MANY else 0
    if whole:
        native.stream_copy(source[:whole], to[:whole], _backends.threads())
    # Not by torch, whose threads (libgomp's) hang in a child of a process that has used them.
    np.copyto(to.numpy()[whole:], source.numpy()[whole:])


def to_device(payload: Tensor, device: torch.device) -> Tensor:
    """A payload on a device, in a multiple of 4 bytes; the device is not waited for.

    From memory that is not pinned the driver took 596 us for 9.5 MB, and its caller waited.
    """
    size = payload.numel()
    room = torch.empty(-(-size // 4) * 4, dtype=torch.uint8, device=device)
    if device.type != "cuda" or payload.device.type != "cpu":
        room[:size].copy_(payload)
        return room
    pinned = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    for at in range(0, size, _PIECE):
        piece = pinned[at : at + _PIECE]
        copy(payload[at : at + _PIECE], piece)
        room[at : at + piece.numel()].copy_(piece, non_blocking=True)
    return room


def to_host(payloads: Sequence[Tensor]) -> list[Tensor]:
    """Bytes of tensors of one device, on the host: each is copied once, into pinned memory of one
    block, and the device is waited for once. What is on the host stays where it is."""
    if not payloads or payloads[0].device.type == "cpu":
        return list(payloads)
    starts = [0]
    for payload in payloads:
        starts.append(starts[-1] + -(-payload.numel() // 64) * 64)
    block = torch.empty(starts[-1], dtype=torch.uint8, device="cpu", pin_memory=True)
    parts = [block[at : at + p.numel()] for at, p in zip(starts, payloads, strict=False)]
    for part, payload in zip(parts, payloads, strict=True):
        part.copy_(payload, non_blocking=True)
    torch.cuda.current_stream(payloads[0].device).synchronize()
    return parts


def fetch(numbers: Tensor) -> list[Any]:
    """A few numbers of one dimension; the device is waited for once."""
    if numbers.is_cuda:
        pinned = torch.empty_like(numbers, device="cpu", pin_memory=True)
        pinned.copy_(numbers, non_blocking=True)
        torch.cuda.current_stream(numbers.device).synchronize()
        numbers = pinned
    found: list[Any] = numbers.tolist()
    return found
