"""rANS on the device: one warp per chunk, one lane per state. Bytes: docs/format.md, 4.1 and 5.

What limits it is latency. A chunk is a chain of steps, each waiting for the one before, and a mask
of 26 M weights is 200 chunks of 1024 steps at density 0.1 (50 of 4096 at 0.01), its survivors 80
chunks of 1024: warps for a part of an H200's 528 schedulers. So a step is kept short. The words
that lanes take or put are placed by a ballot (a sum of distinct bits: one REDUX on sm_80 and later)
and its popcounts, those of eight steps side by side where words are put; a slot's frequency is
found by adds and minima, and its symbol afterwards; words come from registers, 64 in each, the next
on their way; nibbles of eight steps are read, transposed and written together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.triton_kernels import _tuning
from fedmap_sparse.triton_kernels._bits import load_words, popcount
from fedmap_sparse.triton_kernels._entropy_join import _decode_values, _join, _restore
from fedmap_sparse.triton_kernels._entropy_masks import _decode_mask, _encode_mask, _fill, _inside
from fedmap_sparse.triton_kernels._entropy_values import _describe, _encode_values, _escapes
from fedmap_sparse.triton_kernels._launch import cdiv, launch

LANES = 32
#: Values a chunk.
CHUNK = 1 << 15
_WORDS = 1024  # that a program copies at once


@triton.jit(
    do_not_specialize=["room", "base", "limit", "chunks"],
    do_not_specialize_on_alignment=["offsets", "escapes"],
)
def _compact(scratch, room, offsets, escapes, out, base, limit, size, chunks, BLOCK: tl.constexpr):
    """The words of all chunks side by side, from word `base` of the payload on, with a zero if they
    are odd; and its size."""
    c = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + c)
    count = (tl.load(offsets + c + 1) - begin).to(tl.int32)
    source = scratch + (c + 1) * room - count
    for start in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        to = base + begin + i
        word = tl.load(source + i, mask=i < count, other=0)
        tl.store(out + to, word, mask=(i < count) & (to < limit))
    if (c == 0) & (tl.program_id(1) == 0):
        end = base + tl.load(offsets + chunks)
        total = 2 * end
        if escapes is not None:
            tl.store(out + end, tl.zeros((), tl.uint16), mask=(end % 2 == 1) & (end < limit))
            total = (total + 3) // 4 * 4 + (tl.load(escapes + chunks) + 3) // 4 * 4
        tl.store(size, total)


@triton.jit
def _ranks_at(words, rank, positions, out):
    """Survivors before a position."""
    at = tl.load(positions + tl.program_id(0))
    block = at // 2048
    w = block * 64 + tl.arange(0, 64)
    bits = load_words(words, w, (at + 31) // 32)
    rest = tl.minimum(tl.maximum(at - w * 32, 0), 32).to(tl.int32)
    counts = popcount(bits & _inside(rest))
    tl.store(out + tl.program_id(0), tl.load(rank + block) + tl.sum(counts, 0).to(tl.int64))


def ranks_at(words: Tensor, rank: Tensor, positions: Tensor) -> Tensor:
    """Survivors before each of `positions`, all on the words' device."""
    out = torch.empty_like(positions)
    if out.numel():
        launch(_ranks_at, (out.numel(),), words, rank, positions, out, num_warps=1)
    return out


def _raw(t: Tensor) -> Tensor:
    return t.view(-1).view(torch.uint32 if t.dtype == torch.float32 else torch.uint16)


def encode_mask(
    words: Tensor, plan: Tensor, steps: int, chunk: int, head: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """(payload, its size, which is above `capacity` where the payload did not fit).

    Args:
        words: the bitmap.
        plan: int64[runs, ROW] on the words' device, one row for each coded run.
        steps: of all runs, at least 1.
        chunk: steps a chunk.
        head: uint8, the payload up to the directory. Head, directory and states fit.
    """
    device, chunks = words.device, cdiv(steps, chunk)
    out = torch.empty(-(-capacity // 4) * 4, dtype=torch.uint8, device=device)
    room = LANES * min(chunk, steps)
    scratch = torch.empty(chunks * room, dtype=torch.int16, device=device).view(torch.uint16)
    counts = torch.zeros(chunks + 1, dtype=torch.int64, device=device)
    size = torch.empty(1, dtype=torch.int64, device=device)
    directory = out[head.numel() :].view(torch.int32)
    launch(
        _encode_mask,
        (chunks,),
        words,
        plan,
        plan.shape[0],
        steps,
        chunk,
        room,
        scratch,
        counts,
        directory,
        directory[chunks:],
        num_warps=1,
    )
    base = head.numel() // 2 + 2 * chunks + 2 * LANES * chunks
    launch(
        _compact,
        (chunks, _shares(room)),
        scratch,
        room,
        counts.cumsum(0),
        None,
        out.view(torch.uint16),
        base,
        capacity // 2,
        size,
        chunks,
        BLOCK=_WORDS,
    )
    # Last, as the host waits for the device here.
    out[: head.numel()].copy_(head)
    return out, size


def _shares(room: int) -> int:
    """Programs that copy a chunk's words; they are a quarter of its room or less."""
    return max(1, min(16, room // (8 * _WORDS)))


def decode_mask(
    payload: Tensor,
    states: int,
    offsets: Tensor,
    plan: Tensor,
    steps: int,
    chunk: int,
    spans: Tensor,
    num_words: int,
) -> tuple[Tensor, Tensor]:
    """(bitmap, whether each chunk is broken).

    Args:
        payload: a multiple of 4 bytes.
        states: where they are in it, a multiple of 4.
        offsets: int64[chunks + 1], where each chunk's words are, in words.
        plan, steps, chunk: as in `encode_mask`.
        spans: int64[runs, 2] on the CPU, begin and end of the runs that are all ones.
    """
    device = payload.device
    words = torch.zeros(num_words, dtype=torch.int32, device=device)
    chunks = offsets.numel() - 1
    broken = torch.zeros(chunks, dtype=torch.int32, device=device)
    if spans.numel():
        longest = int((spans[:, 1] - spans[:, 0]).max())
        grid = (cdiv(longest, 32 * _WORDS) + 1, spans.shape[0])
        launch(_fill, grid, words, spans.to(device), BLOCK=_WORDS)
    if chunks:
        launch(
            _decode_mask,
            (chunks,),
            payload.view(torch.int32),
            payload.numel() // 4,
            states // 4,
            offsets,
            plan,
            plan.shape[0],
            steps,
            chunk,
            words,
            broken,
            num_warps=1,
        )
    return words, broken


#: Bits of the exponent, of the low plane and of the high plane; the low plane's integers.
_SPLIT = {
    torch.float32: (8, 16, 8, torch.uint16),
    torch.float16: (5, 8, 3, torch.uint8),
    torch.bfloat16: (8, 0, 8, torch.uint8),
}


def encode_values(values: Tensor, parts: tuple[int, ...], capacity: int) -> tuple[Tensor, Tensor]:
    """(payload, its size), as `encode_mask`.

    Args:
        parts: where states, low plane, high plane and words begin, each a multiple of 4.
    """
    device, n = values.device, values.numel()
    chunks = cdiv(n, CHUNK)
    exponent, low_bits, high_bits, low_type = _SPLIT[values.dtype]
    states, low, high, base = parts
    out = torch.empty(-(-capacity // 4) * 4, dtype=torch.uint8, device=device)
    for at, bits_each, end in ((low, low_bits, high), (high, high_bits, base)):
        if at + n * bits_each // 8 < end:
            out[at + n * bits_each // 8 : end].zero_()  # the padding, and bits before it
    scratch = torch.empty(chunks * CHUNK, dtype=torch.int16, device=device).view(torch.uint16)
    nibbles = torch.empty(chunks * CHUNK // 8, dtype=torch.int32, device=device)
    counts = torch.zeros(2, chunks + 1, dtype=torch.int64, device=device)
    size = torch.empty(1, dtype=torch.int64, device=device)
    bits, shorts, mantissa = _raw(values), out.view(torch.uint16), low_bits + high_bits - 1
    block, tiles, warps = _tuning.DESCRIBE
    launch(
        _describe,
        (chunks,),
        bits,
        n,
        shorts,
        out[low:].view(low_type),
        out[high:].view(torch.uint8 if high_bits == 8 else torch.int32),
        counts[1],
        nibbles,
        CHUNK=CHUNK,
        EXPONENT=exponent,
        LOW=low_bits,
        HIGH=high_bits,
        BLOCK=min(block, CHUNK),
        SAMPLE=min(1024, CHUNK // 2),
        TILES=min(tiles, CHUNK // 512),
        num_warps=warps,
    )
    launch(
        _encode_values,
        (chunks,),
        nibbles,
        n,
        shorts,
        out[states:].view(torch.int32),
        scratch,
        counts[0],
        CHUNK=CHUNK,
        num_warps=1,
    )
    words, escapes = counts.cumsum(1)
    launch(
        _compact,
        (chunks, 4),
        scratch,
        CHUNK,
        words,
        escapes,
        shorts,
        base // 2,
        capacity // 2,
        size,
        chunks,
        BLOCK=_WORDS,
    )
    launch(
        _escapes,
        (chunks,),
        bits,
        n,
        nibbles,
        words,
        escapes,
        out,
        base,
        capacity,
        chunks,
        CHUNK=CHUNK,
        EXPONENT=exponent,
        MANTISSA=mantissa,
        TILES=min(8, CHUNK // 256),
        num_warps=1,
    )
    return out, size


def decode_values(
    payload: Tensor, parts: tuple[int, ...], places: Tensor, numel: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(values, whether each chunk is broken, in two rows).

    Args:
        payload: a multiple of 4 bytes.
        parts: as in `encode_values`.
        places: int64[2, chunks + 1], where each chunk's words (in words) and escapes (in bytes)
            are.
    """
    chunks = places.shape[1] - 1
    exponent, low_bits, high_bits, low_type = _SPLIT[dtype]
    states, low, high, _ = parts
    out = torch.empty(numel, dtype=dtype, device=payload.device)
    nibbles = torch.empty(chunks * CHUNK // 8, dtype=torch.int32, device=payload.device)
    broken = torch.empty(2, chunks, dtype=torch.int32, device=payload.device)
    shorts, bits = payload.view(torch.uint16), _raw(out)
    tiles, warps = _tuning.JOIN
    launch(
        _decode_values,
        (chunks,),
        payload.view(torch.int32),
        shorts,
        payload.numel() // 4,
        states // 4,
        places[0],
        numel,
        nibbles,
        broken[0],
        CHUNK=CHUNK,
        num_warps=1,
    )
    tiles = min(tiles, CHUNK // 256)
    launch(
        _join,
        (cdiv(numel, 256 * tiles),),
        nibbles,
        shorts,
        payload[low:].view(low_type),
        payload[high:],
        numel,
        bits,
        CHUNK=CHUNK,
        EXPONENT=exponent,
        LOW=low_bits,
        HIGH=high_bits,
        TILES=tiles,
        num_warps=warps,
    )
    launch(
        _restore,
        (chunks,),
        nibbles,
        shorts,
        places[1],
        payload,
        numel,
        bits,
        broken[1],
        CHUNK=CHUNK,
        EXPONENT=exponent,
        MANTISSA=low_bits + high_bits - 1,
        TILES=min(8, CHUNK // 256),
        num_warps=1,
    )
    return out, broken
