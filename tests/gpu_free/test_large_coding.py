"""Chunks of masks and values beyond 2^32 elements are coded as those near by (`gpucheck.far`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpucheck.far import before, run
from torch import Tensor

from fedmap_sparse.ops._payload import density_table
from fedmap_sparse.triton_kernels import (
    _entropy_join,
    _entropy_masks,
    _entropy_values,
    entropy,
)

FAR = 5_000_000_000  # words of the chunks before


def zeros(n: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(n, dtype=dtype)


def compact(scratch: Tensor, chunk: int, count: int, begin: int) -> tuple[Tensor, Tensor]:
    """(words of the chunk, which lie from word `begin` on and have room behind; where they are)."""
    offsets, out = torch.tensor([begin, begin + count]), zeros(1024, torch.uint16)
    run(
        entropy._compact,
        {
            "scratch": "*u16", "room": "i32", "offsets": "*i64", "out": "*u16", "base": "i32",
            "limit": "i64", "size": "*i64", "chunks": "i32",
        },
        {"escapes": None, "BLOCK": 256},
        {
            "scratch": before(scratch, chunk * scratch.numel()), "room": scratch.numel(),
            "offsets": before(offsets, chunk), "out": before(out, begin), "base": 0,
            "limit": begin + 1024, "size": zeros(1, torch.int64), "chunks": chunk + 1,
        },
        {"scratch": scratch, "offsets": offsets, "out": out},
        [chunk],
    )  # fmt: skip
    return out, offsets


def code_mask(words: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """(states, words, the bitmap decoded) of a chunk of 16 steps, the last of a run."""
    steps, begin = 16, FAR if chunk else 0
    total, room = (chunk + 1) * steps, steps * 32
    plan = torch.tensor([0, 0, total * 128, 0, *density_table(10)])
    scratch, states = zeros(room, torch.uint16), zeros(32)
    directory, counts = zeros(1), zeros(1, torch.int64)
    run(
        _entropy_masks._encode_mask,
        {
            "words": "*i32", "plan": "*i64", "runs": "i32", "steps": "i64", "chunk": "i32",
            "room": "i32", "scratch": "*u16", "counts": "*i64", "directory": "*i32",
            "states": "*i32",
        },
        {},
        {
            "words": before(words, chunk * steps * 4), "plan": plan, "runs": 1, "steps": total,
            "chunk": steps, "room": room, "scratch": before(scratch, chunk * room),
            "counts": before(counts, chunk + 1), "directory": before(directory, chunk),
            "states": before(states, chunk * 32),
        },
        {
            "words": words, "scratch": scratch, "counts": counts, "directory": directory,
            "states": states,
        },
        [chunk],
        warps=1,
    )  # fmt: skip
    count = int(counts)
    assert count == int(directory)
    coded, offsets = compact(scratch, chunk, count, begin)
    back, broken, payload = zeros(words.numel()), zeros(1) + 1, before(coded, begin)
    run(
        _entropy_masks._decode_mask,
        {
            "payload": "*i32", "pairs": "i64", "states": "i64", "offsets": "*i64", "plan": "*i64",
            "runs": "i32", "steps": "i64", "chunk": "i32", "words": "*i32", "broken": "*i32",
        },
        {},
        {
            "payload": payload, "pairs": (begin + coded.numel()) // 2,
            "states": (states.data_ptr() - payload) // 4 - chunk * 32,
            "offsets": before(offsets, chunk), "plan": plan, "runs": 1, "steps": total,
            "chunk": steps, "words": before(back, chunk * steps * 4),
            "broken": before(broken, chunk),
        },
        {"coded": coded, "states": states, "offsets": offsets, "words": back, "broken": broken},
        [chunk],
        warps=1,
    )  # fmt: skip
    assert not broken.any()
    return states, coded[:count], back


def test_masks() -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (64,), dtype=torch.int64).to(torch.int32)
    words &= words.roll(1) & words.roll(2)
    near = code_mask(words, 0)
    far = code_mask(words, (1 << 32) // (16 * 128) + 3)
    assert near[1].numel() > 30
    assert all(torch.equal(one, other) for one, other in zip(near, far, strict=True))
    assert torch.equal(far[2], words)


def test_filling_and_ranks() -> None:
    """Bits from one place to another, and the survivors before one, both far out."""
    words, first = zeros(64), (1 << 32) + 37
    spans = torch.tensor([first, first + 1000])
    run(
        _entropy_masks._fill,
        {"words": "*i32", "spans": "*i64"},
        {"BLOCK": 128},
        {"words": before(words, (1 << 32) // 32), "spans": spans},
        {"words": words},
        [0],
    )
    bits = (words[:, None] >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten().nonzero().flatten(), torch.arange(37, 1037))
    block, rank, out = (1 << 32) // 2048, torch.tensor([FAR]), zeros(1, torch.int64)
    run(
        entropy._ranks_at,
        {"words": "*i32", "rank": "*i64", "positions": "*i64", "out": "*i64"},
        {},
        {
            "words": before(words, block * 64),
            "rank": before(rank, block),
            "positions": torch.tensor([first + 63]),
            "out": out,
        },
        {"words": words, "rank": rank},
        [0],
        warps=1,
    )
    assert int(out) == FAR + 63


def code_values(values: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """(directory, states, planes, words, escapes, the bits decoded) of a chunk, the last of all."""
    exponent, low_bits, high_bits, low_type = entropy._SPLIT[values.dtype]
    size, begin = values.numel(), FAR if chunk else 0
    n, bits = (chunk + 1) * size, entropy._raw(values)
    kind, low_kind = (f"*u{8 * t.itemsize}" for t in (bits.dtype, low_type))
    high_kind = "*u8" if high_bits == 8 else "*i32"
    split: dict[str, Any] = {"CHUNK": size, "EXPONENT": exponent, "TILES": size // 256}
    planes: dict[str, Any] = {**split, "LOW": low_bits, "HIGH": high_bits}
    found: dict[str, Any] = {**split, "MANTISSA": low_bits + high_bits - 1}
    directory, states, nibbles = zeros(20, torch.uint16), zeros(32), zeros(size // 8)
    low, high = zeros(size, low_type), zeros(size * high_bits // 8, torch.uint8)
    counts, escapes = zeros(1, torch.int64), torch.tensor([begin, begin])
    scratch, everywhere = zeros(size, torch.uint16), {"n": n, "values": before(bits, chunk * size)}
    everywhere |= {"directory": before(directory, chunk * 20), "low": before(low, chunk * size)}
    everywhere |= {"high": before(high, chunk * high.numel()), "states": before(states, chunk * 32)}
    everywhere |= {"nibbles": before(nibbles, chunk * size // 8)}
    shown = {"values": bits, "directory": directory, "low": low, "high": high, "states": states}
    shown |= {"nibbles": nibbles, "escapes": escapes}
    run(
        _entropy_values._describe,
        {
            "values": kind, "n": "i64", "directory": "*u16", "low": low_kind, "high": high_kind,
            "escapes": "*i64", "nibbles": "*i32",
        },
        {**planes, "BLOCK": size, "SAMPLE": size // 2},
        everywhere | {"escapes": before(escapes, chunk)},
        shown,
        [chunk],
    )  # fmt: skip
    rare = int(escapes[1])
    run(
        _entropy_values._encode_values,
        {
            "nibbles": "*i32", "n": "i64", "directory": "*u16", "states": "*i32",
            "scratch": "*u16", "counts": "*i64",
        },
        {"CHUNK": size},
        everywhere
        | {"scratch": before(scratch, chunk * size), "counts": before(counts, chunk + 1)},
        {**shown, "scratch": scratch, "counts": counts},
        [chunk],
        warps=1,
    )  # fmt: skip
    count, escapes[1] = int(counts), begin + rare
    coded, offsets = compact(scratch, chunk, count, begin)
    escaped, base = zeros(rare, torch.uint8), (2 * (begin + count) + 3) // 4 * 4 + begin
    run(
        _entropy_values._escapes,
        {
            "values": kind, "n": "i64", "nibbles": "*i32", "offsets": "*i64", "escapes": "*i64",
            "out": "*u8", "base": "i64", "limit": "i64", "chunks": "i32",
        },
        found,
        everywhere
        | {
            "offsets": before(offsets, chunk), "escapes": before(escapes, chunk),
            "out": before(escaped, base), "base": 0, "limit": base + rare, "chunks": chunk + 1,
        },
        {**shown, "offsets": offsets, "escaped": escaped},
        [chunk],
        warps=1,
    )  # fmt: skip
    back, broken = torch.zeros_like(bits), torch.ones(2, dtype=torch.int32)
    got, payload = zeros(size // 8), before(coded, begin)
    run(
        _entropy_join._decode_values,
        {
            "payload": "*i32", "directory": "*u16", "pairs": "i64", "states": "i64",
            "offsets": "*i64", "n": "i64", "nibbles": "*i32", "broken": "*i32",
        },
        {"CHUNK": size},
        everywhere
        | {
            "payload": payload, "pairs": (begin + coded.numel()) // 2,
            "states": (states.data_ptr() - payload) // 4 - chunk * 32,
            "offsets": before(offsets, chunk), "nibbles": before(got, chunk * size // 8),
            "broken": before(broken[:1], chunk),
        },
        {**shown, "coded": coded, "offsets": offsets, "got": got, "broken": broken},
        [chunk],
        warps=1,
    )  # fmt: skip
    assert torch.equal(got, nibbles)
    run(
        _entropy_join._join,
        {
            "nibbles": "*i32", "directory": "*u16", "low": low_kind, "high": "*u8", "n": "i64",
            "out": kind,
        },
        planes,
        everywhere | {"out": before(back, chunk * size)},
        {**shown, "out": back},
        [chunk],
    )  # fmt: skip
    run(
        _entropy_join._restore,
        {
            "nibbles": "*i32", "directory": "*u16", "offsets": "*i64", "escapes": "*u8",
            "n": "i64", "out": kind, "broken": "*i32",
        },
        found,
        everywhere
        | {
            "offsets": before(escapes, chunk), "escapes": before(escaped, begin),
            "out": before(back, chunk * size), "broken": before(broken[1:], chunk),
        },
        {**shown, "offsets": escapes, "escaped": escaped, "out": back, "broken": broken},
        [chunk],
        warps=1,
    )  # fmt: skip
    assert not broken.any()
    return directory, states, low, high, coded[:count], escaped, back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values(dtype: torch.dtype) -> None:
    values = (torch.randn(512) * torch.where(torch.rand(512) < 0.1, 1e-5, 1.0)).to(dtype)
    near = code_values(values, 0)
    far = code_values(values, (1 << 32) // 512 + 3)
    assert near[5].numel() > 10  # escapes
    assert all(torch.equal(one, other) for one, other in zip(near, far, strict=True))
    assert torch.equal(far[-1], entropy._raw(values))
