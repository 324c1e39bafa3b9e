"""Top-k by magnitude in one cooperative launch; see csrc/cuda/select.cu."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse.cuda_kernels import _driver
from fedmap_sparse.mask import num_ranks, num_words

#: Tensors of one launch, and elements in all, at most: positions of the sample are 32-bit numbers
#: of octets, bins count in 32 bits.
MOST_PARTS, MOST_ELEMENTS = 48, (1 << 32) - (1 << 20)
# As in select.cu; tests/native/cuda compares them.
_THREADS, _SHARE, _STATE = 1024, 128, 4 + 4 * 2048
_PART, _REST = struct.Struct("QQQQqq"), struct.Struct("qqQQ10Q")
_JOB = MOST_PARTS * _PART.size + _REST.size


def serves(values: list[Tensor]) -> bool:
    """Whether one launch takes these tensors."""
    return len(values) <= MOST_PARTS and sum(v.numel() for v in values) <= MOST_ELEMENTS


def _run(
    values: list[Tensor],
    within: list[Tensor | None],
    eligible: int,
    keep: int,
    words: list[Tensor],
    ranks: list[Tensor],
) -> Tensor:
    """Launch; returns the kernel's scratch, whose last 8 bytes begin with the key."""
    first = values[0]
    device = first.device
    job = ctypes.create_string_buffer(_JOB)
    parts = blocks = 0
    for i, (v, w) in enumerate(zip(values, within, strict=True)):
        n = v.numel()
        if not n:
            continue
        _PART.pack_into(
            job, parts * _PART.size, v.data_ptr(), 0 if w is None else w.data_ptr(),
            words[i].data_ptr() if words else 0, ranks[i].data_ptr() if ranks else 0, n, blocks,
        )  # fmt: skip
        parts += 1
        blocks += num_ranks(n) - 1
    entry = "select_32" if first.element_size() == 4 else "select_16"
    kernel = _driver.kernel("select", entry, device.index)
    grid = min(kernel.resident, blocks)
    # The kernel's arrays, in the order of its struct; counts are null where only the key is wanted.
    sizes = (
        4 * _STATE, _SHARE * first.element_size() * blocks, 4 * _SHARE * blocks, 256 * blocks,
        24 * blocks, 8 * blocks, 8 * blocks, 8 * grid, 8 * MOST_PARTS, 4,
    )  # fmt: skip
    at, places = 0, []
    for size in sizes:
        places.append(at)
        at += size + -size % 8
    scratch = torch.empty(at, dtype=torch.uint8, device=device)
    base = scratch.data_ptr()
    arrays = [base + place for place in places]
    if not words:
        arrays[5] = 0
    _REST.pack_into(job, MOST_PARTS * _PART.size, parts, blocks, keep, eligible, *arrays)
    stream = torch.cuda.current_stream(device).cuda_stream
    _driver.zero(base, _STATE, stream)
    kernel.launch(grid, _THREADS, stream, job)
    return scratch


def magnitude_mask(
    values: list[Tensor], within: list[Tensor | None], eligible: int, keep: int
) -> list[Tensor] | Any:
    """Words of each tensor's mask, then their rank indices; no synchronisation with the host.

    NotImplemented for more tensors or elements than a launch takes.
    """
    if not serves(values):
        return NotImplemented
    make = torch.zeros if keep == 0 else torch.empty
    device = values[0].device
    words = [make(num_words(v.numel()), dtype=torch.int32, device=device) for v in values]
    ranks = [make(num_ranks(v.numel()), dtype=torch.int64, device=device) for v in values]
    if keep:
        for v, rank in zip(values, ranks, strict=True):
            if not v.numel():
                rank.zero_()
        _run(values, within, eligible, keep, words, ranks)
    return words + ranks


def magnitude_threshold(
    values: list[Tensor], within: list[Tensor | None], eligible: int, keep: int
) -> Tensor | Any:
    """The keep-th largest |x|, 0-d; NotImplemented as above."""
    if not serves(values):
        return NotImplemented
    key = _run(values, within, eligible, keep, [], [])[-8:]
    return key.view(values[0].dtype)[0]  # of 16 bits it is the low half
