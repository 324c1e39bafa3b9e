"""Fewer bytes for the same bits: mask bits and exponents under rANS. docs/format.md, 4 to 6.

Masks: nibbles of the bitmap, with one quantised density a tensor. Values: a survivor's exponent
says little (1-2.5 bits of 8), so exponents are coded and signs and mantissas stored as they are.
Both are cut into chunks that decode independently; every implementation writes the same bytes for
the same chunks, and a GPU cuts masks into shorter ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks, _transfer
from fedmap_sparse._backends import native
from fedmap_sparse.errors import PayloadError
from fedmap_sparse.mask import Mask, bool_from_words, num_words
from fedmap_sparse.ops import _entropy_reference as reference
from fedmap_sparse.ops import _rans_reference as rans
from fedmap_sparse.ops._payload import (
    CHUNK_BYTES,
    GPU_CHUNK_BYTES,
    ONES_COMMON,
    STEP_BITS,
    Runs,
    all_ones,
    chunk_steps,
    coded_runs,
    density_codes,
    density_table,
    mask_head,
    open_mask,
    open_values,
    value_parts,
)

__all__ = [
    "Coding",
    "PayloadError",
    "Runs",
    "add_values_",
    "begin_values",
    "check_values",
    "decode_mask",
    "decode_values",
    "encode_mask",
    "encode_values",
    "largest_exponent",
    "ranks_at",
]

_CODES = _checks.DTYPE_CODES


def ranks_at(mask: Mask, positions: Tensor) -> Tensor:
    """Survivors before each of ascending `positions` (int64, CPU). O(positions)."""
    out = torch.empty_like(positions)
    backend = _backends.pick(None, mask.device)
    if backend == "triton":
        at = _table(positions.numpy(), mask.device)
        before = _transfer.fetch(_run("ranks_at", mask.words, mask.rank, at))
        return torch.tensor(before, dtype=torch.int64, device="cpu")
    if backend == "cpu":
        native.ranks_at(mask.words, mask.rank, positions, out)
        return out
    found = torch.nn.functional.pad(bool_from_words(mask.words, mask.numel).cumsum(0), (1, 0))
    return found.cpu()[positions]


def encode_mask(
    words: Tensor, runs: Runs, nnz: Tensor, capacity: int, *, backend: str | None = None
) -> Tensor | None:
    """The bits of all runs, entropy-coded.

    The backend decides how many steps a chunk has (`_payload.chunk_steps`): `triton` takes shorter
    ones. For one length of chunk all backends write the same bytes, and all read any.

    Args:
        words: bitmap, int32.
        runs: the bits that travel; those outside are not stored.
        nnz: ones in each run (int64, CPU).
        capacity: give up beyond this many bytes.

    Returns:
        uint8 tensor, or None when it would not fit. O(bits).
    """
    codes = density_codes(runs.numel, nnz)
    backend = _backends.pick(backend, words.device)
    least = GPU_CHUNK_BYTES if backend == "triton" else CHUNK_BYTES
    chunk = chunk_steps(runs.numel, codes, least)
    if backend == "triton":
        return _finished(_begin_mask(words, runs, codes, chunk, capacity), capacity)
    if backend == "reference":
        payload = reference.encode_mask(words.cpu(), runs, codes, chunk)
        return payload.to(words.device) if payload.numel() <= capacity else None
    out = torch.empty(max(capacity, 0), dtype=torch.uint8, device="cpu")
    threads = _backends.threads()
    size = native.encode_mask(words, runs.start, runs.numel, codes, chunk, out, threads)
    return None if size < 0 else out[:size]


@dataclass(frozen=True)
class Decoding:
    """What a device may still be decoding.

    Attributes:
        out: the bitmap's words, or the values.
        broken: int32[rows, chunks], not 0 for chunks that do not decode.
        fault: what is wrong with a chunk.
    """

    out: Tensor
    broken: Tensor
    fault: Callable[[int], PayloadError]

    def finished(self) -> Tensor:
        """`out`, once the device is done. Raises PayloadError for the first broken chunk."""
        return self.checked(bool(self.broken.any()))

    def checked(self, any_broken: bool) -> Tensor:
        """`finished`, where it is known already whether any chunk is broken."""
        if any_broken:
            raise self.fault(int(self.broken.any(0).nonzero()[0]))
        return self.out


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
        return begin_mask_back(payload, runs, numel, device).finished()
    if backend == "reference":
        return reference.decode_mask(payload.cpu(), runs, numel).to(device)
    words = torch.empty(num_words(numel), dtype=torch.int32, device="cpu")
    threads = _backends.threads()
    _raise(native.decode_mask(payload, runs.start, runs.numel, numel, words, threads))
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
        known = iter(_transfer.fetch(torch.cat(under_way)) if under_way else ())
        return [0 if coding is None else next(known) for coding in codings]


def begin_values(values: Tensor, capacity: int) -> Coding | None:
    """Launch what `encode_values` does on a device, and do not wait for it.

    Returns:
        A coding whose size is above `capacity` where the payload does not fit; None where it is
        known not to fit.
    """
    parts = value_parts(values.numel(), values.dtype)
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
        payload = reference.encode_values(values.cpu())
        return payload.to(values.device) if payload.numel() <= capacity else None
    out = torch.empty(max(capacity, 0), dtype=torch.uint8, device="cpu")
    size = native.encode_values(values, out, _backends.threads())
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
        return begin_values_back(payload, numel, dtype, device).finished()
    if backend == "reference":
        return reference.decode_values(payload.cpu(), numel, dtype).to(device)
    out = torch.empty(numel, dtype=dtype, device="cpu")
    _raise(native.decode_values(payload, out, _backends.threads()))
    return out


def check_values(
    payload: Tensor, numel: int, dtype: torch.dtype, *, backend: str | None = None
) -> bool:
    """Decode tile by tile without storing: PayloadError, or whether all values are finite."""
    if _backends.pick(backend, payload.device) != "cpu":
        return bool(torch.isfinite(decode_values(payload, numel, dtype, backend=backend)).all())
    fault, finite = native.check_values(payload, _CODES[dtype], numel, _backends.threads())
    _raise(fault)
    return bool(finite)


def largest_exponent(payload: Tensor, numel: int, dtype: torch.dtype) -> int:
    """The largest biased exponent of values that `check_values` accepted. O(chunks + escapes)."""
    opened = open_values(payload, numel, dtype)
    occur = opened.entries["frequency"] > 0
    first = opened.entries["top"].astype(np.int64) - occur.argmax(1)  # the first symbol in use
    escapes = payload[opened.escapes_at :].cpu().numpy()  # with up to 3 zeros of padding
    return max(int(first.max(initial=0)), int(escapes.max(initial=0)))


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
    _raise(native.add_values(payload, _CODES[dtype], sums, weight, _backends.threads()))


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


def begin_mask(words: Tensor, runs: Runs, nnz: Tensor, capacity: int) -> Coding | None:
    """Launch what `encode_mask` does on a device; otherwise as `begin_values`."""
    codes = density_codes(runs.numel, nnz)
    chunk = chunk_steps(runs.numel, codes, GPU_CHUNK_BYTES)
    return _begin_mask(words, runs, codes, chunk, capacity)


def _begin_mask(
    words: Tensor, runs: Runs, codes: Tensor, chunk: int, capacity: int
) -> Coding | None:
    coded, steps = coded_runs(runs, codes.tolist())
    head = torch.frombuffer(bytearray(mask_head(codes, chunk, steps)), dtype=torch.uint8)
    if head.numel() + (4 + 4 * rans.LANES) * -(-steps // chunk) > capacity:
        return None
    if not steps:
        size = torch.full((1,), head.numel(), dtype=torch.int64, device=words.device)
        return Coding(head.to(words.device), size)
    plan, head = _plan_and(head, coded, words.device)
    return Coding(*_run("encode_mask", words, plan, steps, chunk, head, capacity))


def _device_plan(coded: list[tuple[int, int, int]]) -> Tensor:
    """A row for each coded run, as `triton_kernels.entropy` has it."""
    rows, first = [], 0
    for start, n, code in coded:
        fill = -1 if code & ONES_COMMON else 0
        rows.append((first, start, n, fill, *density_table(code)))
        first += -(-n // STEP_BITS)
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(rows), 20)


def _plan_and(
    head: Tensor, coded: list[tuple[int, int, int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """`_device_plan` and a payload's first bytes on the device: one copy, not waited for."""
    plan, size = _device_plan(coded), head.numel()
    first = np.frombuffer(bytes(head.numpy()).ljust(-(-size // 8) * 8, b"\0"), np.int64)
    there = _table(np.concatenate([first, plan.numpy().ravel()]), device)
    return there[first.size :].view(plan.shape), there[: first.size].view(torch.uint8)[:size]


def begin_mask_back(payload: Tensor, runs: Runs, numel: int, device: torch.device) -> Decoding:
    """Launch what `decode_mask` does on a device, and do not wait for it."""
    opened = open_mask(payload, runs)
    plan = _device_plan(opened.coded)
    places = _offsets(opened.sizes, opened.words_at // 2)
    there = _table(np.concatenate([places, plan.numpy().ravel()]), device)
    words, broken = _run(
        "decode_mask",
        _padded(payload, device),
        opened.states_at,
        there[: places.size],
        there[places.size :].view(plan.shape),
        opened.steps,
        opened.chunk,
        torch.tensor(all_ones(runs, opened.codes), dtype=torch.int64, device="cpu").view(-1, 2),
        num_words(numel),
    )
    return Decoding(words, broken.view(1, -1), opened.broken)


def begin_values_back(
    payload: Tensor, numel: int, dtype: torch.dtype, device: torch.device
) -> Decoding:
    """Launch what `decode_values` does on a device, and do not wait for it."""
    opened = open_values(payload, numel, dtype)
    words = _offsets(opened.sizes, opened.parts[-1] // 2)
    escapes = _offsets(opened.entries["escapes"].astype(np.int64), opened.escapes_at)
    places = _table(np.concatenate([words, escapes]), device).view(2, -1)
    room = _padded(payload, device)
    values, broken = _run("decode_values", room, opened.parts, places, numel, dtype)
    return Decoding(values, broken, _broken_values)


def _broken_values(chunk: int) -> PayloadError:
    return PayloadError("words or escapes that do not decode", 40 * chunk)


def _table(numbers: rans.Array, device: torch.device) -> Tensor:
    """int64 numbers on the device, which is not waited for."""
    content = torch.from_numpy(np.ascontiguousarray(numbers, np.int64))
    return _transfer.to_device(content.view(torch.uint8), device).view(torch.int64)


def _offsets(sizes: rans.Array, begin: int) -> rans.Array:
    return np.concatenate([[0], np.cumsum(sizes)]) + begin


def _padded(payload: Tensor, device: torch.device) -> Tensor:
    """On the device, in a multiple of 4 bytes: the one copy of a message's payload."""
    if payload.device == device and payload.numel() % 4 == 0 and payload.data_ptr() % 16 == 0:
        return payload
    return _transfer.to_device(payload, device)
