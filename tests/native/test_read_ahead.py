"""Fetching ahead (csrc/core/ahead.h) changes when memory is read, never what comes out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fedmap_sparse import ops
from fedmap_sparse._backends import native

pytestmark = pytest.mark.skipif(native is None, reason="fedmap_sparse._native is not built")


@pytest.fixture
def ahead() -> Iterator[None]:
    before = native.read_ahead(), native.write_ahead()
    yield
    native.set_read_ahead(before[0])
    native.set_write_ahead(before[1])


def fetch_ahead(reads: int, writes: int) -> None:
    native.set_read_ahead(reads)
    native.set_write_ahead(writes)
    assert (native.read_ahead(), native.write_ahead()) == (reads, writes)


def made(dtype: torch.dtype, density: float, n: int = 70_001) -> list[torch.Tensor]:
    """What every kernel that fetches ahead makes of the same inputs."""
    torch.manual_seed(3)
    values, grad = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    mask = ops.prune_(values, round(density * n))
    found = [mask.words, mask.rank, ops.pack(values, mask), values]
    master = None if dtype == torch.float32 else ops.pack(values, mask).float()
    state = [torch.zeros(mask.nnz) for _ in range(3)]
    ops.masked_sgd_(
        values, mask, grad, lr=0.1, momentum=0.9, momentum_buffer=state[0], master=master
    )
    adamw = {"lr": 0.1, "step": 1, "exp_avg": state[1], "exp_avg_sq": state[2], "master": master}
    ops.masked_adamw_(values, mask, grad, **adamw)
    codes, scales = ops.quantize_int8(grad.float())
    found += [codes, scales, ops.dequantize_int8(codes, scales), ops.unpack(found[2], mask)]
    found += [ops.cast(grad, other)[0] for other in (torch.float32, torch.float16, torch.bfloat16)]
    found += [ops.weighted_mean([values, grad], [0.3, 0.7])]
    return [*found, *state] + ([] if master is None else [master])


@pytest.mark.parametrize("nbytes", [0, 4 << 10])
def test_large_results_are_written_alike(isa: str, ahead: None, nbytes: int) -> None:
    """Past the cache, or through it with lines asked for: 16 MiB are enough for either."""
    fetch_ahead(0, nbytes)
    values = torch.randn((4 << 20) + 77)
    mask = ops.magnitude_mask(values, values.numel() // 2)
    kept = torch.where(mask.to_bool(), values, 0.0)
    assert torch.equal(ops.unpack(ops.pack(values, mask), mask), kept)
    half = ops.cast(values, torch.bfloat16)[0]
    assert torch.equal(half, values.bfloat16())
    assert torch.equal(ops.cast(half, torch.float32)[0], half.float())


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits(isa: str, ahead: None, dtype: torch.dtype, density: float) -> None:
    results = []
    for nbytes in (0, 8 << 10):
        fetch_ahead(nbytes, nbytes)
        results.append(made(dtype, density))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_floors_touch_the_same(ahead: None) -> None:
    from fedmap_sparse.bench import floors

    mask = ops.magnitude_mask(torch.randn(100_352), 5_000)
    results = []
    for nbytes in (0, 8 << 10):
        fetch_ahead(nbytes, nbytes)
        buffers = torch.zeros(100_352), torch.zeros(100_352)
        floors.inplace(buffers[0])()
        floors.touched(buffers[1], mask)()
        assert buffers[0].count_nonzero() >= 50_176
        assert 5_000 <= buffers[1].count_nonzero() < 100_352
        results.append(buffers)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
