"""The least time that memory allows: plain streams of as many bytes, with the same threads.

Each returns a function to time. A case adds up the streams that its bytes make: what is only read,
what is copied, what is updated in place, what is touched line by line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fedmap_sparse import _backends
from fedmap_sparse._backends import native
from fedmap_sparse.mask import Mask

LINE, SECTOR = 64, 32  # bytes

Stream = Callable[[], None]


def _lines(buffer: Tensor, nbytes: int | None = None) -> Tensor:
    """The first `nbytes` as bytes: whole lines, at most the buffer."""
    size = buffer.nbytes if nbytes is None else min(int(nbytes), buffer.nbytes)
    return buffer.reshape(-1).view(torch.uint8)[: size // LINE * LINE]


def read(buffer: Tensor, nbytes: int | None = None) -> Stream:
    data = _lines(buffer, nbytes)

    def run() -> None:
        native.stream_read(data, _backends.threads())

    return run


def copy(source: Tensor, target: Tensor, nbytes: int | None = None) -> Stream:
    """Reads `nbytes` and writes as many."""
    written = _lines(target, nbytes)
    data = _lines(source, written.numel())
    written = written[: data.numel()]
    return lambda: native.stream_copy(data, written, _backends.threads())


def inplace(buffer: Tensor, nbytes: int | None = None) -> Stream:
    """Reads and writes `nbytes`, adding integers to whatever the buffer holds."""
    data = _lines(buffer, nbytes)
    return lambda: native.stream_inplace(data, _backends.threads())


def touched(buffer: Tensor, mask: Mask) -> Stream:
    """Reads the bitmap; reads and writes the lines of `buffer` that hold a survivor."""
    if buffer.element_size() != 4:  # that stream knows lines of 16 elements
        return inplace(buffer, touched_bytes(mask, buffer.element_size()))
    return lambda: native.stream_touched(buffer, mask.words, mask.numel, _backends.threads())


def together(*streams: Stream) -> Stream:
    def run() -> None:
        for stream in streams:
            stream()

    return run


def device_copy(nbytes: int, device: torch.device) -> Stream:
    """On a GPU: a copy that moves `nbytes` in all, half of them read."""
    source = torch.empty(max(nbytes // 2, 1), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return run


def touched_bytes(mask: Mask, element_size: int) -> int:
    """Of the lines that hold a survivor: 64 bytes in a CPU's cache, sectors of 32 on a GPU."""
    line = LINE if mask.device.type == "cpu" else SECTOR
    per_line = line // element_size
    kept = mask.to_bool()
    padded = torch.nn.functional.pad(kept, (0, -kept.numel() % per_line))
    return line * int(padded.view(-1, per_line).any(1).sum())


def last_level_cache(device: torch.device) -> int:
    """Bytes of a GPU's L2, or of CPU 0's largest cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=32 << 20)
