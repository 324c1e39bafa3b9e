"""Offsets beyond 2^31 elements, without the memory (`gpucheck.far`)."""

from __future__ import annotations

import pytest
import torch
from gpucheck.far import before, run
from torch import Tensor

from fedmap_sparse.triton_kernels import pack, quantize, select

BLOCK = (1 << 32) // 2048 + 3  # the 2048 elements from here on lie beyond 2^32


@pytest.fixture
def tile() -> dict[str, Tensor]:
    keep = torch.rand(2048) < 0.5
    bits = keep.view(64, 32).to(torch.int64) << torch.arange(32)
    rank = torch.tensor([7_000_000_000, 7_000_000_000 + int(keep.sum())])
    return {
        "keep": keep,
        "words": bits.sum(1).to(torch.int32),
        "rank": rank,
        "values": torch.randn(2048),
        "packed": torch.zeros(int(keep.sum())),
    }


def test_pack_and_unpack(tile: dict[str, Tensor]) -> None:
    start, base = BLOCK * 2048, int(tile["rank"][0])
    shown = {name: tile[name] for name in ("words", "rank", "values", "packed")}
    where = {
        "words": before(tile["words"], BLOCK * 64),
        "rank": before(tile["rank"], BLOCK),
        "num_words": (BLOCK + 1) * 64,
    }
    pointers = {"words": "*i32", "rank": "*i64", "num_words": "i64"}
    run(
        pack._pack,
        {"values": "*i32", "out": "*i32", **pointers},
        {"WORDS": 64, "STEPS": 6, "LANES": 1024, "FLAT": 512, "FROM": 0, "TO": 0},
        {"values": before(tile["values"], start), "out": before(tile["packed"], base), **where},
        shown,
        [BLOCK],
    )
    assert torch.equal(tile["packed"], tile["values"][tile["keep"]])
    dense = torch.full((2048,), 7.0)
    run(
        pack._unpack_rows,
        {"packed": "*i32", "out": "*i32", "numel": "i64", **pointers},
        {"WORDS": 64, "FROM": 0, "TO": 0},
        {
            "packed": before(tile["packed"], base),
            "out": before(dense, start),
            "numel": start + 2048,
            **where,
        },
        {**shown, "dense": dense},
        [BLOCK],
    )
    assert torch.equal(dense, tile["values"] * tile["keep"])


def test_cast_and_zero_pruned(tile: dict[str, Tensor]) -> None:
    start = BLOCK * 2048
    out, overflowed = torch.zeros(2048, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    run(
        quantize._cast,
        {"values": "*i32", "out": "*i16", "overflowed": "*i64", "n": "i64"},
        {"FROM": 0, "TO": 2, "BLOCK": 1024, "PARTS": 2},
        {
            "values": before(tile["values"], start),
            "out": before(out, start),
            "overflowed": overflowed,
            "n": start + 2048,
        },
        {"values": tile["values"], "out": out},
        [BLOCK],
    )
    assert torch.equal(out, tile["values"].to(torch.bfloat16))
    values = tile["values"].clone()
    run(
        select._zero_pruned,
        {"values": "*i32", "after": "*i32", "n": "i64", "num_words": "i64"},
        {"before": None, "WORDS": 64},
        {
            "values": before(values, start),
            "after": before(tile["words"], BLOCK * 64),
            "n": start + 2048,
            "num_words": (BLOCK + 1) * 64,
        },
        {"values": values, "words": tile["words"]},
        [BLOCK],
    )
    assert torch.equal(values, tile["values"] * tile["keep"])


def test_select_reads_a_block(tile: dict[str, Tensor]) -> None:
    start = BLOCK * 2048
    key = tile["values"].view(torch.int32) & 0x7FFFFFFF
    low = int(key.sort().values[1000])
    state = torch.zeros(16, dtype=torch.int64)
    state[:3] = torch.tensor([low + (1 << 20) - 1, low, 9])
    words = torch.zeros(64, dtype=torch.int32)
    keys, places = torch.zeros(2048, dtype=torch.int32), torch.zeros(2048, dtype=torch.int16)
    block = {name: torch.zeros(1, dtype=kind) for name, kind in (
        ("offsets", torch.int64), ("counts", torch.int32), ("above", torch.int32))}  # fmt: skip
    histogram = torch.zeros(2048, dtype=torch.int32)
    run(
        select._read,
        {
            "values": "*i32", "words": "*i32", "keys": "*i32", "places": "*i16",
            "offsets": "*i64", "counts": "*i32", "above": "*i32", "state": "*i64",
            "histogram": "*i32", "copies": "i32", "n": "i64", "num_words": "i64",
            "first_block": "i32", "capacity": "i32",
        },
        {"within": None, "KEY_BITS": 31},
        {
            "values": before(tile["values"], start), "words": before(words, BLOCK * 64),
            "keys": keys, "places": places, "state": state, "histogram": histogram, "copies": 1,
            "n": start + 2048, "num_words": (BLOCK + 1) * 64, "first_block": 0,
            "capacity": 2048, **{k: before(t, BLOCK) for k, t in block.items()},
        },
        {"values": tile["values"], "words": words, **block},
        [BLOCK],
    )  # fmt: skip
    inside = (key >= low) & (key < low + (1 << 20))
    found = int(state[5])
    assert torch.equal(keys[:found], key[inside])
    assert torch.equal(places[:found].long(), inside.nonzero().flatten())
    assert torch.equal(histogram.long(), torch.bincount((key[inside] - low) >> 9, minlength=2048))
    assert int(state[4]) == int((key >= low + (1 << 20)).sum())
