"""Reference of the entropy coder in NumPy: all chunks of a payload side by side, step by step.

Interleaved rANS over 16 symbols: 32 lanes of states in [2^15, 2^31), 16-bit words, frequencies of
15 bits. docs/format.md, 5, defines the streams.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LANES = 32
SUM = 1 << 15
LOW = 1 << 15

Array = np.ndarray[Any, np.dtype[Any]]


def encode(symbols: Array, active: Array, frequency: Array) -> tuple[Array, list[Array]]:
    """(states [chunks, 32], words of each chunk).

    Args:
        symbols: uint8 [chunks, steps, 32].
        active: bool of this shape: which lanes take part.
        frequency: int64 [chunks, steps, 16], the table of each step.
    """
    chunks, steps, _ = symbols.shape
    start = np.cumsum(frequency, 2) - frequency
    x = np.full((chunks, LANES), LOW, np.int64)
    emitted = np.zeros(symbols.shape, np.uint16)
    full = np.zeros(symbols.shape, bool)
    for i in range(steps - 1, -1, -1):
        on = active[:, i]
        s = symbols[:, i].astype(np.int64)
        f = np.where(on, np.take_along_axis(frequency[:, i], s, 1), 1)
        b = np.take_along_axis(start[:, i], s, 1)
        full[:, i] = on & (x >= f << 16)
        emitted[:, i] = x & 0xFFFF
        x = np.where(full[:, i], x >> 16, x)
        x = np.where(on, x // f * SUM + x % f + b, x)
    return x.astype(np.uint32), [emitted[c][full[c]] for c in range(chunks)]


def decode(states: Array, words: list[Array], active: Array, frequency: Array) -> Array | int:
    """The symbols [chunks, steps, 32], zero where inactive; or the number of a broken chunk."""
    chunks, steps, _ = active.shape
    start = np.cumsum(frequency, 2) - frequency
    sizes = np.array([w.size for w in words], np.int64)
    room = np.zeros((chunks, int(sizes.max(initial=0)) + LANES), np.int64)
    for c, w in enumerate(words):
        room[c, : w.size] = w
    x = states.astype(np.int64)
    at = np.zeros((chunks, 1), np.int64)
    symbols = np.zeros(active.shape, np.uint8)
    for i in range(steps):
        on = active[:, i]
        slot = x & (SUM - 1)
        s = (slot[:, :, None] >= start[:, i, None, :]).sum(2) - 1
        f = np.take_along_axis(frequency[:, i], s, 1)
        new = f * (x >> 15) + slot - np.take_along_axis(start[:, i], s, 1)
        empty = on & (new < LOW)
        place = np.minimum(at + np.cumsum(empty, 1) - empty, room.shape[1] - 1)
        new = np.where(empty, new << 16 | np.take_along_axis(room, place, 1), new)
        x = np.where(on, new, x)
        at = np.minimum(at + empty.sum(1, keepdims=True), sizes[:, None] + 1)
        symbols[:, i] = np.where(on, s, 0)
    broken = (x != LOW).any(1) | (at[:, 0] != sizes)
    return int(np.flatnonzero(broken)[0]) if broken.any() else symbols
