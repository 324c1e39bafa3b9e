"""pack and unpack: kernels against the reference, bit for bit, at every level and thread count."""

from __future__ import annotations

import pytest
import torch
from guards import EDGES, FLOATS, bits, guarded, random_mask
from torch import Tensor

import fedmap_sparse as fs
from fedmap_sparse import Mask
from fedmap_sparse._backends import native

pytestmark = pytest.mark.skipif(native is None, reason="fedmap_sparse._native is not built")

DENSITIES = [0.0, 0.01, 0.1, 0.5, 0.97, 1.0]


def anything(n: int, dtype: torch.dtype) -> Tensor:
    """Every bit pattern: NaN payloads, infinities, subnormals, both zeros."""
    width = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(width)
    return torch.randint(info.min, info.max, (n,), dtype=width).view(dtype)


def assert_same(got: Tensor, wanted: Tensor, *, moved: bool) -> None:
    """Bit for bit; a NaN that was widened may be any, as torch's own depends on its place."""
    if not moved:
        nan = wanted.isnan()
        assert torch.equal(got.isnan(), nan)
        got, wanted = (torch.where(nan, 0.0, t) for t in (got, wanted))
    assert torch.equal(bits(got), bits(wanted))


def check(values: Tensor, mask: Mask, packed_dtype: torch.dtype) -> None:
    moved = packed_dtype == values.dtype
    kept = mask.to_bool()
    with guarded(mask.nnz, packed_dtype, shift=1) as out:
        fs.ops.pack(values, mask, out=out, backend="cpu")
        wanted = fs.ops.pack(
            values, mask, out=torch.empty(mask.nnz, dtype=packed_dtype), backend="reference"
        )
        assert_same(out, wanted, moved=moved)
        if moved:
            assert torch.equal(bits(out), bits(values)[kept])
        with guarded(values.numel(), values.dtype) as back:
            fs.ops.unpack(out, mask, out=back, backend="cpu")
            wanted = fs.ops.unpack(out, mask, out=torch.empty_like(values), backend="reference")
            assert_same(back, wanted, moved=moved)
            assert not bool(bits(back)[~kept].any())


@pytest.mark.parametrize("packed", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_edge(isa: str, dtype: torch.dtype, packed: torch.dtype) -> None:
    for n in EDGES:
        for density in DENSITIES:
            check(anything(n, dtype), random_mask(n, density), packed)


@pytest.mark.parametrize(
    ("dtype", "packed"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_any_thread_count(isa: str, threads: int, dtype: torch.dtype, packed: torch.dtype) -> None:
    for density in (0.01, 0.5):
        check(anything(1_000_003, dtype), random_mask(1_000_003, density), packed)


def test_blocks_of_every_density(isa: str) -> None:
    kept = torch.cat([torch.rand(2048) < d for d in (1.0, 0.0, 0.001, 0.6, 0.0, 1.0, 0.03)])
    for n in (kept.numel(), kept.numel() - 5):
        check(anything(n, torch.float32), Mask.from_bool(kept[:n].clone()), torch.float32)


@pytest.mark.parametrize("shift", [0, 1])
def test_results_that_go_past_the_cache(isa: str, shift: int) -> None:
    """From 16 MiB on whole lines are streamed: unpacking only where they are aligned."""
    n = (17 << 20) // 4 + 67
    mask, values = random_mask(n, 0.97), torch.randn(n)
    kept = mask.to_bool()
    with (
        guarded(mask.nnz, torch.float32, shift=shift) as packed,
        guarded(n, torch.float32, shift=shift) as back,
    ):
        assert packed.nbytes >= 16 << 20
        fs.ops.pack(values, mask, out=packed, backend="cpu")
        assert torch.equal(packed, values[kept])
        fs.ops.unpack(packed, mask, out=back, backend="cpu")
        assert torch.equal(back, torch.where(kept, values, 0.0))


def test_overflow_is_counted(isa: str) -> None:
    """65520 is the least that rounds to infinity in float16; what is infinite already is not."""
    values = torch.tensor([65519.0, 65520.0, -65520.0, 1e30, torch.inf, torch.nan, 1.0] * 9)
    mask = random_mask(values.numel(), 0.7)
    large = (values.abs() >= 65520) & values.isfinite()
    out = torch.empty(mask.nnz, dtype=torch.float16)
    count = native.pack(values, mask.words, mask.rank, out, 1, False)
    assert count == int((large & mask.to_bool()).sum())


def test_flushing_of_subnormals_changes_nothing(isa: str) -> None:
    mask, values = random_mask(5000, 0.5), torch.randn(5000) * 1e-7
    out = torch.empty(mask.nnz, dtype=torch.float16)
    plain = fs.ops.pack(values, mask, out=out.clone(), backend="cpu")
    assert bool((plain.abs() < 2.0**-14).any())
    assert torch.set_flush_denormal(True)
    try:
        flushed = fs.ops.pack(values, mask, out=out, backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(flushed), bits(plain))
