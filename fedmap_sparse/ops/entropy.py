"""Fewer bytes for the same bits: mask bits and exponents under rANS. docs/format.md, 4 to 6.

Masks: nibbles of the bitmap, with one quantised density a tensor. Values: a survivor's exponent
says little (1-2.5 bits of 8), so exponents are coded and signs and mantissas stored as they are.
Both are cut into chunks that decode independently; every implementation writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import native
from fedmap_sparse.mask import Mask, bool_from_words, num_words, words_from_bool
from fedmap_sparse.ops import _rans_reference as rans

STEP_BITS = 4 * rans.LANES
VALUE_CHUNK = 1 << 15
ESCAPE = 15
#: Density code of a run without the rarer bit; with this bit set, ones are the common bit.
CONSTANT, ONES_COMMON = 0x7F, 0x80
_DENSITIES = 120
_MIN_CHUNK, _MAX_CHUNK = 1 << 10, 1 << 17
_CHUNK_BYTES = 16 << 10

_CODES = _checks.DTYPE_CODES
_ENTRY = np.dtype(
    [
        ("words", "<u2"),
        ("escapes", "<u2"),
        ("top", "u1"),
        ("zero", "u1", 3),
        ("frequency", "<u2", 16),
    ]
)
# Bits of the exponent, of the low plane and of the high plane, and the integer type of a value.
_SPLIT: dict[torch.dtype, tuple[int, int, int, np.dtype[Any]]] = {
    torch.float32: (8, 16, 8, np.dtype("<u4")),
    torch.float16: (5, 8, 3, np.dtype("<u2")),
    torch.bfloat16: (8, 0, 8, np.dtype("<u2")),
}


class PayloadError(ValueError):
    """Bytes that no encoder writes. `offset` is in the payload."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"{reason} (at byte {offset})")
        self.reason = reason
        self.offset = offset


@dataclass(frozen=True)
class Runs:
    """Which bits of a bitmap belong to which tensor: run r is [start[r], start[r] + numel[r]).

    Two int64 CPU tensors of one size; runs ascend and do not overlap.
    """

    start: Tensor
    numel: Tensor


def ranks_at(mask: Mask, positions: Tensor) -> Tensor:
    """Survivors before each of ascending `positions` (int64, CPU). O(positions)."""
    out = torch.empty_like(positions)
    backend = _backends.pick(None, mask.device)
    if backend == "triton":
        out.copy_(_run("ranks_at", mask.words, mask.rank, positions.to(mask.device)))
        return out
    if backend == "cpu":
        native.ranks_at(
            mask.words.data_ptr(),
            mask.rank.data_ptr(),
            positions.data_ptr(),
            positions.numel(),
            out.data_ptr(),
        )
        return out
    before = torch.nn.functional.pad(bool_from_words(mask.words, mask.numel).cumsum(0), (1, 0))
    return before.cpu()[positions]


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


def chunk_steps(numel: Tensor, codes: Tensor) -> int:
    """Steps a chunk: the least power of two whose chunks take 16 KiB or more on average."""
    steps, bits = 0, 0
    for n, code in zip(numel.tolist(), codes.tolist(), strict=True):
        if code & CONSTANT != CONSTANT:
            run = -(-n // STEP_BITS)
            steps += run
            bits += run * _step_cost(code)
    size = _MIN_CHUNK
    while size < _MAX_CHUNK and bits * size < _CHUNK_BYTES * 8 * steps * 64 * 1024:
        size *= 2
    return size


def encode_mask(
    words: Tensor, runs: Runs, nnz: Tensor, capacity: int, *, backend: str | None = None
) -> Tensor | None:
    """The bits of all runs, entropy-coded.

    Args:
        words: bitmap, int32.
        runs: the bits that travel; those outside are not stored.
        nnz: ones in each run (int64, CPU).
        capacity: give up beyond this many bytes.

    Returns:
        uint8 tensor, or None when it would not fit. O(bits).
    """
    codes = density_codes(runs.numel, nnz)
    chunk = chunk_steps(runs.numel, codes)
    backend = _backends.pick(backend, words.device)
    if backend == "triton":
        return _encode_mask_triton(words, runs, codes, chunk, capacity)
    if backend == "reference":
        payload = _encode_mask_reference(words.cpu(), runs, codes, chunk)
        return payload.to(words.device) if payload.numel() <= capacity else None
    out = torch.empty(max(capacity, 0), dtype=torch.uint8)
    size = native.encode_mask(
        words.data_ptr(),
        runs.start.data_ptr(),
        runs.numel.data_ptr(),
        runs.start.numel(),
        codes.data_ptr(),
        chunk,
        out.data_ptr(),
        capacity,
        _backends.threads(),
    )
    return None if size < 0 else out[:size]


def decode_mask(
    payload: Tensor,
    runs: Runs,
    numel: int,
    *,
    device: torch.device | None = None,
    backend: str | None = None,
) -> Tensor:
    """The bitmap of `numel` bits (int32 words), zero outside of the runs.

    Args:
        payload: uint8.
        device: where the bitmap is wanted, and decoded; None means the payload's.

    Raises:
        PayloadError: bytes that no encoder writes.
    """
    device = device or payload.device
    backend = _backends.pick(backend, device)
    if backend == "triton":
        return _decode_mask_triton(payload, runs, numel, device)
    if backend == "reference":
        return _decode_mask_reference(payload.cpu(), runs, numel).to(device)
    words = torch.empty(num_words(numel), dtype=torch.int32)
    fault = native.decode_mask(
        payload.data_ptr(),
        payload.numel(),
        runs.start.data_ptr(),
        runs.numel.data_ptr(),
        runs.start.numel(),
        numel,
        words.data_ptr(),
        _backends.threads(),
    )
    _raise(fault)
    return words


@dataclass(frozen=True)
class Coding:
    """A payload that a device may still be working on.

    Attributes:
        room: uint8, which it begins.
        size: int64[1] on the device: its bytes.
    """

    room: Tensor
    size: Tensor

    @staticmethod
    def sizes(codings: Sequence[Coding | None]) -> list[int]:
        """Their sizes in bytes, 0 for None; the device is waited for once."""
        under_way = [coding.size for coding in codings if coding is not None]
        known = iter(torch.cat(under_way).tolist() if under_way else ())
        return [0 if coding is None else next(known) for coding in codings]


def begin_values(values: Tensor, capacity: int) -> Coding | None:
    """Launch what `encode_values` does on a device, and do not wait for it.

    Returns:
        A coding whose size is above `capacity` where the payload does not fit; None where it is
        known not to fit.
    """
    parts = _value_parts(values.numel(), values.dtype)
    if parts[-1] > capacity:
        return None
    return Coding(*_run("encode_values", values.detach(), parts, capacity))


def encode_values(values: Tensor, capacity: int, *, backend: str | None = None) -> Tensor | None:
    """float32, float16 or bfloat16 values (1-D, not empty), exponents entropy-coded.

    Returns:
        uint8 tensor, or None when it would not fit into `capacity` bytes. O(n).
    """
    backend = _backends.pick(backend, values.device)
    if backend == "triton":
        return _finished(begin_values(values, capacity), capacity)
    if backend == "reference":
        payload = _encode_values_reference(values.cpu())
        return payload.to(values.device) if payload.numel() <= capacity else None
    out = torch.empty(max(capacity, 0), dtype=torch.uint8)
    size = native.encode_values(
        values.data_ptr(),
        _CODES[values.dtype],
        values.numel(),
        out.data_ptr(),
        capacity,
        _backends.threads(),
    )
    return None if size < 0 else out[:size]


def decode_values(
    payload: Tensor,
    numel: int,
    dtype: torch.dtype,
    *,
    device: torch.device | None = None,
    backend: str | None = None,
) -> Tensor:
    """The inverse: a 1-D tensor of the same bits.

    Args:
        payload: uint8.
        device: where the values are wanted, and decoded; None means the payload's.

    Raises:
        PayloadError: bytes that no encoder writes.
    """
    device = device or payload.device
    backend = _backends.pick(backend, device)
    if backend == "triton":
        return _decode_values_triton(payload, numel, dtype, device)
    if backend == "reference":
        return _decode_values_reference(payload.cpu(), numel, dtype).to(device)
    out = torch.empty(numel, dtype=dtype)
    size = payload.numel()
    fault = native.decode_values(
        payload.data_ptr(), size, _CODES[dtype], numel, out.data_ptr(), _backends.threads()
    )
    _raise(fault)
    return out


def check_values(
    payload: Tensor, numel: int, dtype: torch.dtype, *, backend: str | None = None
) -> bool:
    """Decode tile by tile without storing: PayloadError, or whether all values are finite."""
    if _backends.pick(backend, payload.device) != "cpu":
        return bool(torch.isfinite(decode_values(payload, numel, dtype, backend=backend)).all())
    fault, finite = native.check_values(
        payload.data_ptr(), payload.numel(), _CODES[dtype], numel, _backends.threads()
    )
    _raise(fault)
    return bool(finite)


def add_values_(
    sums: Tensor,
    payload: Tensor,
    dtype: torch.dtype,
    weight: float,
    *,
    backend: str | None = None,
) -> None:
    """`sums += weight * values` in float64, tile by tile: no copy of the values is made.

    The same bits as adding `decode_values(...)`. Call `check_values` first: a payload that breaks
    half-way leaves `sums` half-added.
    """
    if _backends.pick(backend, payload.device) != "cpu":
        values = decode_values(payload, sums.numel(), dtype, backend=backend)
        sums += values.to(torch.float64) * weight
        return
    fault = native.add_values(
        payload.data_ptr(),
        payload.numel(),
        _CODES[dtype],
        sums.numel(),
        sums.data_ptr(),
        weight,
        _backends.threads(),
    )
    _raise(fault)


def _raise(fault: tuple[str, int] | None) -> None:
    if fault is not None:
        raise PayloadError(*fault)


# On a device: what is small (directories, plans) is checked and computed on the host.


def _run(name: str, first: Tensor, *rest: Any) -> Any:
    return _backends.on_device(getattr(_backends.kernels("entropy"), name), (first, *rest))


def _finished(coding: Coding | None, capacity: int) -> Tensor | None:
    if coding is None:
        return None
    size = Coding.sizes([coding])[0]
    return coding.room[:size] if size <= capacity else None


def _encode_mask_triton(
    words: Tensor, runs: Runs, codes: Tensor, chunk: int, capacity: int
) -> Tensor | None:
    coded, steps = _steps(runs, codes.tolist())
    head = torch.frombuffer(bytearray(_mask_head(codes, chunk, steps)), dtype=torch.uint8)
    if head.numel() + (4 + 4 * rans.LANES) * -(-steps // chunk) > capacity:
        return None
    if not steps:
        return head.to(words.device)
    plan = _device_plan(coded).to(words.device)
    return _finished(
        Coding(*_run("encode_mask", words, plan, steps, chunk, head, capacity)), capacity
    )


def _device_plan(coded: list[tuple[int, int, int]]) -> Tensor:
    """A row for each coded run, as `triton_kernels.entropy` has it."""
    rows, first = [], 0
    for start, n, code in coded:
        fill = -1 if code & ONES_COMMON else 0
        rows.append((first, start, n, fill, *density_table(code)))
        first += -(-n // STEP_BITS)
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), 20)


def _decode_mask_triton(payload: Tensor, runs: Runs, numel: int, device: torch.device) -> Tensor:
    opened = _open_mask(payload.cpu(), runs)
    words: Tensor
    words, broken = _run(
        "decode_mask",
        _padded(payload, device),
        opened.states_at,
        _offsets(opened.sizes, opened.words_at // 2).to(device),
        _device_plan(opened.coded).to(device),
        opened.steps,
        opened.chunk,
        torch.tensor(_all_ones(runs, opened.codes), dtype=torch.int64).view(-1, 2),
        num_words(numel),
    )
    for chunk in broken.nonzero()[:1].flatten().tolist():
        raise opened.broken(chunk)
    return words


def _decode_values_triton(
    payload: Tensor, numel: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    opened = _open_values(payload.cpu(), numel, dtype)
    words = _offsets(opened.sizes, opened.parts[-1] // 2)
    escapes = _offsets(opened.entries["escapes"].astype(np.int64), opened.escapes_at)
    places = torch.stack([words, escapes]).to(device)
    room = _padded(payload, device)
    values: Tensor
    values, broken = _run("decode_values", room, opened.parts, places, numel, dtype)
    for chunk in broken.any(0).nonzero()[:1].flatten().tolist():
        raise PayloadError("words or escapes that do not decode", 40 * chunk)
    return values


def _offsets(sizes: rans.Array, begin: int) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]) + begin)


def _padded(payload: Tensor, device: torch.device) -> Tensor:
    """On the device, in a multiple of 4 bytes: the one copy of a message's payload."""
    if payload.device == device and payload.numel() % 4 == 0 and payload.data_ptr() % 16 == 0:
        return payload
    room = torch.empty(-(-payload.numel() // 4) * 4, dtype=torch.uint8, device=device)
    room[: payload.numel()].copy_(payload)
    return room


# The reference: NumPy throughout, any size, slow.


def _steps(runs: Runs, codes: Any) -> tuple[list[tuple[int, int, int]], int]:
    """((start, numel, code) of each coded run, steps of all)."""
    coded = [
        (s, n, c)
        for s, n, c in zip(runs.start.tolist(), runs.numel.tolist(), codes, strict=True)
        if c & CONSTANT != CONSTANT
    ]
    return coded, sum(-(-n // STEP_BITS) for _, n, _ in coded)


def _plan(
    coded: list[tuple[int, int, int]], steps: int, chunk: int
) -> tuple[rans.Array, rans.Array, int]:
    """(active [chunks, chunk, 32], frequency [chunks, chunk, 16], chunks)."""
    chunks = -(-steps // chunk)
    chunk = min(chunk, steps) if chunks == 1 else chunk
    active = np.zeros((chunks * chunk, rans.LANES), bool)
    frequency = np.zeros((chunks * chunk, 16), np.int64)
    frequency[:, 0] = rans.SUM
    at = 0
    for _, n, code in coded:
        count, nibbles = -(-n // STEP_BITS), -(-n // 4)
        frequency[at : at + count] = density_table(code)
        active[at : at + count].reshape(-1)[:nibbles] = True
        at += count
    shape = (chunks, chunk)
    return active.reshape(*shape, -1), frequency.reshape(*shape, -1), chunks


def _mask_head(codes: Tensor, chunk: int, steps: int) -> bytes:
    head = np.array([chunk, -(-steps // chunk)], "<u4").tobytes()
    return head + _pad4(codes.numpy().tobytes())


def _encode_mask_reference(words: Tensor, runs: Runs, codes: Tensor, chunk: int) -> Tensor:
    coded, steps = _steps(runs, codes.tolist())
    head = _mask_head(codes, chunk, steps)
    if not steps:
        return torch.frombuffer(bytearray(head), dtype=torch.uint8)
    active, frequency, _ = _plan(coded, steps, chunk)
    bits = bool_from_words(words, 32 * words.numel()).numpy()
    symbols = np.zeros(active.size, np.uint8)
    at = 0
    for start, n, code in coded:
        run = np.full(-(-n // 4) * 4, bool(code & ONES_COMMON))
        run[:n] = bits[start : start + n]
        nibbles = run.reshape(-1, 4) @ np.array([1, 2, 4, 8], np.uint8)
        symbols[at : at + nibbles.size] = nibbles
        at += -(-n // STEP_BITS) * rans.LANES
    states, coded_words = rans.encode(symbols.reshape(active.shape), active, frequency)
    sizes = np.array([w.size for w in coded_words], "<u4")
    body = sizes.tobytes() + states.astype("<u4").tobytes()
    body += b"".join(w.astype("<u2").tobytes() for w in coded_words)
    return torch.frombuffer(bytearray(head + body), dtype=torch.uint8)


@dataclass(frozen=True)
class _Masked:
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


def _open_mask(payload: Tensor, runs: Runs) -> _Masked:
    data: Any = memoryview(payload.numpy())  # type: ignore[arg-type]
    count = runs.start.numel()
    directory = 8 + -(-count // 4) * 4
    if len(data) < directory:
        raise PayloadError(
            "expected a density for each tensor, got the end of the payload", len(data)
        )
    chunk, chunks = (int(v) for v in np.frombuffer(data, "<u4", 2))
    if not _MIN_CHUNK <= chunk <= _MAX_CHUNK or chunk & (chunk - 1):
        raise PayloadError("expected steps a chunk to be a power of two from 2^10 to 2^17", 0)
    codes = list(data[8 : 8 + count])
    for r, (code, n) in enumerate(zip(codes, runs.numel.tolist(), strict=True)):
        if _DENSITIES <= code & CONSTANT < CONSTANT:
            raise PayloadError("unknown density code", 8 + r)
        if not n and code != CONSTANT:
            raise PayloadError("expected the code of zeros for a tensor without bits", 8 + r)
    _check_zeros(data, 8 + count, directory)
    coded, steps = _steps(runs, codes)
    if chunks != -(-steps // chunk):
        raise PayloadError("the number of chunks disagrees with the densities", 4)
    states_at = directory + 4 * chunks
    words_at = states_at + 4 * rans.LANES * chunks
    if len(data) < words_at:
        raise PayloadError("expected directory and states, got the end of the payload", len(data))
    sizes = np.frombuffer(data, "<u4", chunks, directory).astype(np.int64)
    if words_at + 2 * int(sizes.sum()) != len(data):
        reason = "the directory's words disagree with the size of the payload"
        raise PayloadError(reason, directory)
    states = _states(data, states_at, chunks)
    return _Masked(chunk, codes, coded, steps, directory, states_at, states, sizes, words_at)


def _decode_mask_reference(payload: Tensor, runs: Runs, numel: int) -> Tensor:
    opened = _open_mask(payload, runs)
    bits = np.zeros(numel, bool)
    if opened.steps:
        active, frequency, _ = _plan(opened.coded, opened.steps, opened.chunk)
        words = np.frombuffer(payload.numpy(), "<u2", -1, opened.words_at)
        parts = np.split(words, np.cumsum(opened.sizes)[:-1])
        symbols = rans.decode(opened.states, parts, active, frequency)
        if isinstance(symbols, int):
            raise opened.broken(symbols)
        flat, at = symbols.reshape(-1), 0
        for start, n, code in opened.coded:
            nibbles = flat[at : at + -(-n // 4)]
            run = np.unpackbits(nibbles[:, None], axis=1, count=4, bitorder="little").reshape(-1)
            if (run[n:] != bool(code & ONES_COMMON)).any():
                raise opened.broken((at // rans.LANES + -(-n // STEP_BITS) - 1) // opened.chunk)
            bits[start : start + n] = run[:n]
            at += -(-n // STEP_BITS) * rans.LANES
    for start, end in _all_ones(runs, opened.codes):
        bits[start:end] = True
    return words_from_bool(torch.from_numpy(bits))


def _all_ones(runs: Runs, codes: list[int]) -> list[tuple[int, int]]:
    """(first bit, the bit after the last) of each run of ones alone."""
    every = zip(runs.start.tolist(), runs.numel.tolist(), codes, strict=True)
    return [(start, start + n) for start, n, code in every if code == CONSTANT | ONES_COMMON]


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


def _pad4(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _value_plan(n: int) -> tuple[rans.Array, int]:
    """(active [chunks, 1024, 32], chunks)."""
    chunks = -(-n // VALUE_CHUNK)
    active = np.arange(chunks * VALUE_CHUNK) < n
    return active.reshape(chunks, -1, rans.LANES), chunks


def _best_top(exponents: rans.Array, bits: int) -> int:
    counts = np.bincount(exponents, minlength=1 << bits)
    before = np.concatenate([[0], np.cumsum(counts)])
    tops = np.arange(1 << bits)
    return int((before[tops + 1] - before[np.maximum(tops - ESCAPE + 1, 0)]).argmax())


def _encode_values_reference(values: Tensor) -> Tensor:
    e_bits, low_bits, high_bits, kind = _SPLIT[values.dtype]
    v = values.detach().contiguous().view(torch.uint8).numpy().view(kind).astype(np.int64)
    n, mantissa = v.size, low_bits + high_bits - 1
    exponents = v >> mantissa & (1 << e_bits) - 1
    sign = v >> (e_bits + mantissa)
    high = sign << (high_bits - 1) | (v & (1 << mantissa) - 1) >> low_bits
    active, chunks = _value_plan(n)
    entries = np.zeros(chunks, _ENTRY)
    symbols = np.zeros(active.shape, np.uint8).reshape(chunks, -1)
    escapes = []
    for c in range(chunks):
        part = exponents[c * VALUE_CHUNK : (c + 1) * VALUE_CHUNK]
        top = _best_top(part, e_bits)
        s = np.where((part <= top) & (part > top - ESCAPE), top - part, ESCAPE)
        counts = np.bincount(s, minlength=16)
        f = np.where(
            counts, np.maximum(1, (2 * counts * rans.SUM + part.size) // (2 * part.size)), 0
        )
        f[f.argmax()] += rans.SUM - f.sum()
        escapes.append(part[s == ESCAPE].astype(np.uint8).tobytes())
        entries[c]["top"], entries[c]["escapes"], entries[c]["frequency"] = top, counts[ESCAPE], f
        symbols[c, : part.size] = s
    tables = np.repeat(entries["frequency"].astype(np.int64)[:, None], active.shape[1], 1)
    states, words = rans.encode(symbols.reshape(active.shape), active, tables)
    entries["words"] = [w.size for w in words]
    bits = (high[:, None] >> np.arange(high_bits) & 1).astype(np.uint8)
    parts = [
        entries.tobytes(),
        states.astype("<u4").tobytes(),
        (v & (1 << low_bits) - 1).astype(f"<u{low_bits // 8}").tobytes() if low_bits else b"",
        np.packbits(bits.reshape(-1), bitorder="little").tobytes(),
        b"".join(w.astype("<u2").tobytes() for w in words),
        b"".join(escapes),
    ]
    return torch.frombuffer(bytearray(b"".join(map(_pad4, parts))), dtype=torch.uint8)


def _value_parts(n: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Where states, low plane, high plane and words begin."""
    _, low_bits, high_bits, _ = _SPLIT[dtype]
    chunks = -(-n // VALUE_CHUNK)
    states_at = _ENTRY.itemsize * chunks
    low_at = states_at + 4 * rans.LANES * chunks
    high_at = low_at + -(-n * low_bits // 32) * 4
    return states_at, low_at, high_at, high_at + -(-n * high_bits // 32) * 4


@dataclass(frozen=True)
class _Valued:
    """A payload of values whose sizes were found consistent."""

    parts: tuple[int, int, int, int]
    entries: rans.Array
    states: rans.Array
    sizes: rans.Array
    escapes_at: int


def _open_values(payload: Tensor, n: int, dtype: torch.dtype) -> _Valued:
    e_bits, low_bits, high_bits, _ = _SPLIT[dtype]
    data: Any = memoryview(payload.numpy())  # type: ignore[arg-type]
    chunks = -(-n // VALUE_CHUNK)
    parts = states_at, low_at, high_at, words_at = _value_parts(n, dtype)
    low_end, high_end = low_at + n * low_bits // 8, high_at + -(-n * high_bits // 8)
    if len(data) < words_at:
        reason = "expected directory, states and planes, got the end of the payload"
        raise PayloadError(reason, len(data))
    entries = np.frombuffer(data, _ENTRY, chunks)
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
    if -(-escapes_end // 4) * 4 != len(data):
        raise PayloadError("the directory disagrees with the size of the payload", 0)
    states = _states(data, states_at, chunks)
    if n * high_bits % 8 and data[high_end - 1] >> n * high_bits % 8:
        raise PayloadError("expected padding to be zero", high_end - 1)
    gaps = ((low_end, high_at), (high_end, words_at), (words_end, escapes_at))
    for begin, end in (*gaps, (escapes_end, len(data))):
        _check_zeros(data, begin, end)
    return _Valued(parts, entries, states, sizes, escapes_at)


def _decode_values_reference(payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    e_bits, low_bits, high_bits, kind = _SPLIT[dtype]
    data = payload.numpy()
    opened = _open_values(payload, n, dtype)
    entries, sizes = opened.entries, opened.sizes
    _, low_at, high_at, words_at = opened.parts
    active, _ = _value_plan(n)
    words = np.frombuffer(data, "<u2", int(sizes.sum()), words_at)
    tables = np.repeat(entries["frequency"].astype(np.int64)[:, None], active.shape[1], 1)
    symbols = rans.decode(opened.states, np.split(words, np.cumsum(sizes)[:-1]), active, tables)
    if isinstance(symbols, int):
        raise PayloadError("words or escapes that do not decode", 40 * symbols)
    exponents = np.repeat(entries["top"].astype(np.int64), VALUE_CHUNK) - symbols.reshape(-1)
    escaped = (symbols.reshape(-1) == ESCAPE) & active.reshape(-1)
    at = opened.escapes_at
    for c, e in enumerate(entries):
        chunk = slice(c * VALUE_CHUNK, (c + 1) * VALUE_CHUNK)
        here = np.frombuffer(data, np.uint8, int(e["escapes"]), at)
        at += here.size
        plain = exponents[chunk][active.reshape(-1)[chunk] & ~escaped[chunk]]
        if escaped[chunk].sum() != here.size or (here >= 1 << e_bits).any() or (plain < 0).any():
            raise PayloadError("words or escapes that do not decode", 40 * c)
        exponents[chunk][escaped[chunk]] = here
    high_bytes = np.frombuffer(data, np.uint8, -(-n * high_bits // 8), high_at)
    bits = np.unpackbits(high_bytes, count=n * high_bits, bitorder="little").reshape(n, high_bits)
    high = bits.astype(np.int64) @ (1 << np.arange(high_bits))
    low = np.frombuffer(data, f"<u{low_bits // 8}", n, low_at).astype(np.int64) if low_bits else 0
    mantissa = low_bits + high_bits - 1
    v = (high >> (high_bits - 1)) << (e_bits + mantissa) | exponents[:n] << mantissa
    v |= (high & (1 << (high_bits - 1)) - 1) << low_bits | low
    return torch.from_numpy(v.astype(kind).view(np.uint8)).view(dtype)
