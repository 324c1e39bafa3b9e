"""What a coded payload holds, and what a reader checks first. docs/format.md, 4 and 5."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse.errors import PayloadError
from fedmap_sparse.ops import _rans_reference as rans

STEP_BITS = 4 * rans.LANES
VALUE_CHUNK = 1 << 15
ESCAPE = 15
#: Density code of a run without the rarer bit; with this bit set, ones are the common bit.
CONSTANT, ONES_COMMON = 0x7F, 0x80
_DENSITIES = 120
MIN_CHUNK, MAX_CHUNK = 1 << 10, 1 << 17
#: Bytes a chunk on average, at least, of masks that a CPU encodes, and that a GPU does.
CHUNK_BYTES, GPU_CHUNK_BYTES = 16 << 10, 4 << 10

ENTRY = np.dtype(
    [
        ("words", "<u2"),
        ("escapes", "<u2"),
        ("top", "u1"),
        ("zero", "u1", 3),
        ("frequency", "<u2", 16),
    ]
)
# Bits of the exponent, of the low plane and of the high plane, and the integer type of a value.
SPLIT: dict[torch.dtype, tuple[int, int, int, np.dtype[Any]]] = {
    torch.float32: (8, 16, 8, np.dtype("<u4")),
    torch.float16: (5, 8, 3, np.dtype("<u2")),
    torch.bfloat16: (8, 0, 8, np.dtype("<u2")),
}


@dataclass(frozen=True)
class Runs:
    """Which bits of a bitmap belong to which tensor: run r is [start[r], start[r] + numel[r]).

    Two int64 CPU tensors of one size; runs ascend and do not overlap.
    """

    start: Tensor
    numel: Tensor


def density_codes(numel: Tensor, nnz: Tensor) -> Tensor:
    """The density code of each run: uint8. Integer arithmetic alone, so all writers agree."""
    n, ones = numel.numpy(), nnz.numpy()
    rare = np.minimum(ones, n - ones)
    steps = np.arange(_DENSITIES)
    probability = (16 - steps % 8) << (15 - steps // 8)  # of 2^20
    error = np.abs(probability[None, :] * n[:, None] - (rare << 20)[:, None])
    codes = np.where(rare == 0, CONSTANT, error.argmin(1))
    return torch.from_numpy((codes | np.where(ones > rare, ONES_COMMON, 0)).astype(np.uint8))


@lru_cache(maxsize=256)
def density_table(code: int) -> tuple[int, ...]:
    """The 16 frequencies, which sum to 2^15, of a code that is not constant."""
    step = code & CONSTANT
    rare = (16 - step % 8) << (15 - step // 8)
    common = (1 << 20) - rare
    rr, rc, cc = rare * rare >> 20, rare * common >> 20, common * common >> 20
    by_count = [p >> 20 for p in (cc * cc, cc * rc, rc * rc, rc * rr, rr * rr)]
    flip = 15 if code & ONES_COMMON else 0
    table = [0] * 16
    for s in range(1, 16):
        table[s ^ flip] = max(1, (by_count[s.bit_count()] + 16) >> 5)
    table[flip] = rans.SUM - sum(table)
    return tuple(table)


@lru_cache(maxsize=256)
def _step_cost(code: int) -> int:
    """Expected bits of a step, times 64 * 2^15 / 32, in integers."""
    return sum(f * (15 * 64 - (f**64).bit_length() + 1) for f in density_table(code))


def chunk_steps(numel: Tensor, codes: Tensor, least: int) -> int:
    """Steps a chunk: the least power of two whose chunks take `least` bytes or more on average.

    `CHUNK_BYTES` where a CPU encodes. A GPU takes a chunk a warp, and each step waits for the one
    before: with `GPU_CHUNK_BYTES` it has four times the warps. Of 26 M bits at density 0.1 on an
    H200, in 1024 steps a chunk in place of 4096: encoded in 162 us, not 408, decoded in 201, not
    765, for 1.0% more bytes.
    """
    steps, bits = 0, 0
    for n, code in zip(numel.tolist(), codes.tolist(), strict=True):
        if code & CONSTANT != CONSTANT:
            run = -(-n // STEP_BITS)
            steps += run
            bits += run * _step_cost(code)
    size = MIN_CHUNK
    while size < MAX_CHUNK and bits * size < least * 8 * steps * 64 * 1024:
        size *= 2
    return size


def coded_runs(runs: Runs, codes: Any) -> tuple[list[tuple[int, int, int]], int]:
    """((start, numel, code) of each coded run, steps of all)."""
    coded = [
        (s, n, c)
        for s, n, c in zip(runs.start.tolist(), runs.numel.tolist(), codes, strict=True)
        if c & CONSTANT != CONSTANT
    ]
    return coded, sum(-(-n // STEP_BITS) for _, n, _ in coded)


def mask_head(codes: Tensor, chunk: int, steps: int) -> bytes:
    head = np.array([chunk, -(-steps // chunk)], "<u4").tobytes()
    return head + pad4(codes.numpy().tobytes())


@dataclass(frozen=True)
class Masked:
    """A mask's payload whose sizes were found consistent."""

    chunk: int
    codes: list[int]
    coded: list[tuple[int, int, int]]
    steps: int
    directory: int
    states_at: int
    states: rans.Array
    sizes: rans.Array
    words_at: int

    def broken(self, chunk: int) -> PayloadError:
        return PayloadError("words that do not decode", self.directory + 4 * chunk)


def open_mask(payload: Tensor, runs: Runs) -> Masked:
    """Of a payload on any device; only what is before the words comes to the host."""
    size, count = payload.numel(), runs.start.numel()
    directory = 8 + -(-count // 4) * 4
    if size < directory:
        raise PayloadError("expected a density for each tensor, got the end of the payload", size)
    data = _bytes(payload, directory)
    chunk, chunks = (int(v) for v in np.frombuffer(data, "<u4", 2))
    if not MIN_CHUNK <= chunk <= MAX_CHUNK or chunk & (chunk - 1):
        raise PayloadError("expected steps a chunk to be a power of two from 2^10 to 2^17", 0)
    codes = list(data[8 : 8 + count])
    for r, (code, n) in enumerate(zip(codes, runs.numel.tolist(), strict=True)):
        if _DENSITIES <= code & CONSTANT < CONSTANT:
            raise PayloadError("unknown density code", 8 + r)
        if not n and code != CONSTANT:
            raise PayloadError("expected the code of zeros for a tensor without bits", 8 + r)
    _check_zeros(data, 8 + count, directory)
    coded, steps = coded_runs(runs, codes)
    if chunks != -(-steps // chunk):
        raise PayloadError("the number of chunks disagrees with the densities", 4)
    states_at = directory + 4 * chunks
    words_at = states_at + 4 * rans.LANES * chunks
    if size < words_at:
        raise PayloadError("expected directory and states, got the end of the payload", size)
    data = _bytes(payload, words_at)
    sizes = np.frombuffer(data, "<u4", chunks, directory).astype(np.int64)
    if words_at + 2 * int(sizes.sum()) != size:
        reason = "the directory's words disagree with the size of the payload"
        raise PayloadError(reason, directory)
    states = _states(data, states_at, chunks)
    return Masked(chunk, codes, coded, steps, directory, states_at, states, sizes, words_at)


def all_ones(runs: Runs, codes: list[int]) -> list[tuple[int, int]]:
    """(first bit, the bit after the last) of each run of ones alone."""
    every = zip(runs.start.tolist(), runs.numel.tolist(), codes, strict=True)
    return [(start, start + n) for start, n, code in every if code == CONSTANT | ONES_COMMON]


def value_parts(n: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Where states, low plane, high plane and words begin."""
    _, low_bits, high_bits, _ = SPLIT[dtype]
    chunks = -(-n // VALUE_CHUNK)
    states_at = ENTRY.itemsize * chunks
    low_at = states_at + 4 * rans.LANES * chunks
    high_at = low_at + -(-n * low_bits // 32) * 4
    return states_at, low_at, high_at, high_at + -(-n * high_bits // 32) * 4


@dataclass(frozen=True)
class Valued:
    """A payload of values whose sizes were found consistent."""

    parts: tuple[int, int, int, int]
    entries: rans.Array
    states: rans.Array
    sizes: rans.Array
    escapes_at: int


def open_values(payload: Tensor, n: int, dtype: torch.dtype) -> Valued:
    """As `open_mask`: of 10^8 values 0.5 MB of 113 MB, where all of it took 76 ms to come from an
    H200."""
    e_bits, low_bits, high_bits, _ = SPLIT[dtype]
    size, chunks = payload.numel(), -(-n // VALUE_CHUNK)
    parts = states_at, low_at, high_at, words_at = value_parts(n, dtype)
    low_end, high_end = low_at + n * low_bits // 8, high_at + -(-n * high_bits // 8)
    if size < words_at:
        reason = "expected directory, states and planes, got the end of the payload"
        raise PayloadError(reason, size)
    data = _bytes(payload, low_at)
    entries = np.frombuffer(data, ENTRY, chunks)
    uneven = entries["frequency"].sum(1, dtype=np.int64) != rans.SUM
    beyond, reserved = entries["top"] >= 1 << e_bits, entries["zero"].any(1)
    for c in np.flatnonzero(uneven | beyond | reserved)[:1].tolist():
        if uneven[c]:
            raise PayloadError("expected frequencies that sum to 2^15", 40 * c + 8)
        if beyond[c]:
            raise PayloadError("an exponent beyond the dtype's", 40 * c + 4)
        raise PayloadError("expected reserved bytes to be zero", 40 * c + 5)
    sizes = entries["words"].astype(np.int64)
    words_end = words_at + 2 * int(sizes.sum())
    escapes_at = -(-words_end // 4) * 4
    escapes_end = escapes_at + int(entries["escapes"].sum(dtype=np.int64))
    if -(-escapes_end // 4) * 4 != size:
        raise PayloadError("the directory disagrees with the size of the payload", 0)
    states = _states(data, states_at, chunks)
    gaps = ((high_end - 1, high_end), (low_end, high_at), (high_end, words_at),
            (words_end, escapes_at), (escapes_end, size))  # fmt: skip
    rest = torch.cat([payload[begin:end] for begin, end in gaps]).tolist()
    if n * high_bits % 8 and rest[0] >> n * high_bits % 8:
        raise PayloadError("expected padding to be zero", high_end - 1)
    padding = [at for begin, end in gaps[1:] for at in range(begin, end)]
    for at, value in zip(padding, rest[1:], strict=True):
        if value:
            raise PayloadError("expected padding to be zero", at)
    return Valued(parts, entries, states, sizes, escapes_at)


def _bytes(payload: Tensor, end: int) -> memoryview:
    """The first bytes, on the host."""
    return memoryview(payload[:end].cpu().numpy())  # type: ignore[arg-type]  # a buffer


def _states(data: memoryview, at: int, chunks: int) -> rans.Array:
    states = np.frombuffer(data, "<u4", rans.LANES * chunks, at)
    wrong = np.flatnonzero((states < rans.LOW) | (states >= 1 << 31))
    if wrong.size:
        raise PayloadError("a state that rANS cannot have", at + 4 * int(wrong[0]))
    return states.reshape(chunks, rans.LANES)


def _check_zeros(data: memoryview, begin: int, end: int) -> None:
    for at in range(begin, end):
        if data[at]:
            raise PayloadError("expected padding to be zero", at)


def pad4(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
