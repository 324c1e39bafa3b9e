"""What private sums are made of: contracts and workloads of the cut, of noise, of integers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fedmap_sparse import ops
from fedmap_sparse.triton_kernels import clip as clipping
from fedmap_sparse.triton_kernels import fixed as integers
from fedmap_sparse.triton_kernels import noise as noises
from ladder.catalogue import Workload
from ladder.contracts import Show, same


def clip(n: int, device: str, show: Show, *, share: float = 0.4) -> None:
    values = (torch.randn(n) * torch.randint(-9, 9, (n,)).float().exp2()).to(device)
    start = torch.randn(n).to(device)
    limit = share * float((values.double() - start.double()).norm())
    ours, theirs = values.clone(), values.clone()
    norm = ops.clip_difference_(ours, start, limit, backend="triton")
    assert norm == ops.clip_difference_(theirs, start, limit, backend="reference")
    assert same(ours, theirs)
    assert torch.equal(ours, values) is (share > 1)


def clip_refuses(device: str, show: Show) -> None:
    """Nothing is written where the norm is no number."""
    for bad in (torch.nan, torch.inf):
        values, start = torch.ones(5000, device=device), torch.zeros(5000, device=device)
        values[4321] = bad
        before = values.clone()
        try:
            ops.clip_difference_(values, start, 1.0, backend="triton")
        except ValueError:
            assert same(values, before)
        else:
            raise AssertionError("expected a ValueError")


def noise(n: int, device: str, show: Show) -> None:
    values = torch.randn(n).to(device)
    for std, seed, stream in ((0.7, 2**63 - 1, 5), (1e-6, 9, 2**63 - 1)):
        ours, theirs = values.clone(), values.clone()
        ops.add_gaussian_(ours, std, seed=seed, stream=stream, backend="triton")
        ops.add_gaussian_(theirs, std, seed=seed, stream=stream, backend="reference")
        assert same(ours, theirs)


def fixed(n: int, device: str, show: Show) -> None:
    values = (torch.randn(n) * 2).to(device)
    values[: n // 4] = (values[: n // 4] * 2).round() / 2  # ties
    for clip, scale, weight in ((1.5, 1.0, 3), (2.0, 2.0**20, 1), (0.3, 1234.5, 70)):
        how = {"clip": clip, "scale": scale, "weight": weight}
        ours, beyond = ops.to_fixed(values, **how, backend="triton")
        theirs, expected = ops.to_fixed(values, **how, backend="reference")
        assert same(ours, theirs)
        assert beyond == expected
        back = ops.from_fixed(ours, scale * weight * 3, backend="triton")
        assert same(back, ops.from_fixed(ours, scale * weight * 3, backend="reference"))


def each_workload(n: int, device: torch.device) -> Iterator[Workload]:
    values, start = torch.randn(n, device=device), torch.randn(n, device=device)
    out = torch.empty(n, dtype=torch.int32, device=device)
    yield Workload(
        "clip_difference",
        n,
        lambda: clipping.clip_difference_(values, start, 1e-3),
        20.0 + 16 / 4096,
        1.01,
        1.05,
    )
    yield Workload(
        "add_gaussian", n, lambda: noises.add_gaussian_(values, 0.5, 1, 2), 8.0, 1.01, 1.05
    )
    yield Workload(
        "to_fixed", n, lambda: integers.to_fixed_out(values, 2.0, 1e6, 3, out), 8.0, 1.01, 1.05
    )
    yield Workload("from_fixed", n, lambda: integers.from_fixed(out, 3e6), 8.0, 1.01, 1.05)
