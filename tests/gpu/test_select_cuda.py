"""csrc/cuda/select.cu on a device: the masks of the reference, whatever the input."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from ladder import contracts

import fedmap_sparse as fs
from fedmap_sparse import ops
from fedmap_sparse.cuda_kernels import _driver, select

if reason := _driver.missing():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.gpu
KINDS = ["special", "constant", "zeros", "two values", "rounded", "sorted", "hidden"]


def drawn(kind: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    values = contracts.special(n, dtype, "cuda")
    if kind == "constant":
        return torch.ones_like(values)
    if kind == "zeros":
        return torch.zeros_like(values)
    if kind == "two values":
        return torch.where(values > 0, 1.0, -2.0).to(dtype)
    if kind == "rounded":
        return (values * 4).round() / 4
    if kind == "sorted":
        return torch.randn(n, device="cuda").abs().sort().values.to(dtype)
    if kind == "hidden":  # small where the sample looks, so that the bracket misses
        octets, run = (n + 2047) // 2048 * 256, torch.arange(2048)
        begin = run * octets // 2048
        mixed = (run * 0x9E3779B1 & 0xFFFFFFFF) * ((run + 1) * octets // 2048 - begin) >> 32
        seen = torch.zeros(octets, dtype=torch.bool)
        seen[begin + mixed] = True
        seen = seen.repeat_interleave(8)[:n].cuda()
        drawn = torch.randn(n, device="cuda")
        return torch.where(seen, drawn * 1e-3, 1 + drawn.square()).to(dtype)
    return values


@pytest.mark.parametrize("dtype", contracts.FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 33, 2049, 70_001, 3_000_001])
def test_select(n: int, kind: str, dtype: torch.dtype) -> None:
    values = drawn(kind, n, dtype)
    for keep in {1, max(1, n // 10), max(1, n // 2), n}:
        check([values], [None], keep)
    if n > 33:
        within = contracts.mask_of(n, 0.3, "cuda", holes=True)
        check([values], [within], within.nnz // 2)


@pytest.mark.parametrize("dtype", contracts.FLOATS)
def test_a_list_and_a_view_that_is_not_aligned(dtype: torch.dtype) -> None:
    parts = [drawn(kind, n, dtype)[1:] for n, kind in zip(
        (2, 2050, 5002, 100_002, 65_537), KINDS, strict=False)]  # fmt: skip
    parts.append(parts[0][:0])
    within = [None if i % 2 else contracts.mask_of(p.numel(), 0.5, "cuda")
              for i, p in enumerate(parts)]  # fmt: skip
    eligible = sum(p.numel() if m is None else m.nnz for p, m in zip(parts, within, strict=True))
    for keep in (1, eligible // 7, eligible):
        check(parts, within, keep)


def check(values: list[torch.Tensor], within: list[fs.Mask | None], keep: int) -> None:
    words = [None if m is None else m.words for m in within]
    eligible = sum(v.numel() if m is None else m.nnz for v, m in zip(values, within, strict=True))
    got = select.magnitude_mask(values, words, eligible, keep)
    want = ops.magnitude_mask(values, keep, within=within, backend="reference")
    for i, mask in enumerate(want):
        assert torch.equal(got[i], mask.words)
        assert torch.equal(got[len(values) + i], mask.rank)
    key = select.magnitude_threshold(values, words, eligible, keep)
    expected = ops.magnitude_threshold(values, keep, within=within, backend="reference")
    assert contracts.same(key, expected)
