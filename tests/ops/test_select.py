"""Selection by magnitude: kernels against the reference, and what they promise of their cost."""

from __future__ import annotations

from functools import cache, lru_cache

import pytest
import torch
from guards import EDGES, FLOATS, bits, guarded, random_mask
from page_faults import LINUX, touched_bytes
from torch import Tensor

import fedmap_sparse as fs
from fedmap_sparse import Mask
from fedmap_sparse._backends import native
from fedmap_sparse.ops.select import magnitude_key, zero_pruned_

pytestmark = pytest.mark.skipif(native is None, reason="fedmap_sparse._native is not built")

KINDS = ["normal", "constant", "two values", "ties", "sorted", "descending", "bits", "zeros"]


@lru_cache(maxsize=64)
def make(kind: str, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=g)
    if kind == "constant":
        return torch.full((n,), -1.5, dtype=dtype)
    if kind == "two values":
        return torch.where(torch.rand(n, generator=g) < 0.1, 2.0, -1.0).to(dtype)
    if kind == "ties":
        return (torch.randint(-16, 17, (n,), generator=g) / 16).to(dtype)
    if kind == "sorted":
        return normal.sort().values.to(dtype)
    if kind == "descending":
        return normal.abs().sort(descending=True).values.to(dtype)
    if kind == "bits":  # every exponent, NaN and infinity among them
        width = torch.int32 if dtype == torch.float32 else torch.int16
        info = torch.iinfo(width)
        return torch.randint(info.min, info.max, (n,), dtype=width, generator=g).view(dtype)
    if kind == "zeros":  # of both signs
        return torch.where(torch.rand(n, generator=g) < 0.6, normal * 0.0, normal).to(dtype)
    return normal.to(dtype)


def assert_same(got: Mask, wanted: Mask) -> None:
    assert torch.equal(got.words, wanted.words)
    assert torch.equal(got.rank, wanted.rank)
    assert (got.numel, got.nnz) == (wanted.numel, wanted.nnz)


@cache  # the same cases come again for each ISA level and thread count
def wanted(kind: str, n: int, dtype: torch.dtype, keep: int, density: float = 1.0) -> Mask:
    within = None if density == 1.0 else random_mask(n, density)
    return fs.ops.magnitude_mask(make(kind, n, dtype), keep, within=within, backend="reference")


def check(kind: str, n: int, dtype: torch.dtype, keep: int, density: float = 1.0) -> None:
    values = make(kind, n, dtype)
    within = None if density == 1.0 else random_mask(n, density)
    reference = wanted(kind, n, dtype, keep, density)
    assert_same(fs.ops.magnitude_mask(values, keep, within=within, backend="cpu"), reference)
    if keep:
        threshold = fs.ops.magnitude_threshold(values, keep, within=within, backend="cpu")
        least = magnitude_key(values)[reference.to_bool()].min()
        assert torch.equal(magnitude_key(threshold), least)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_edge(isa: str, dtype: torch.dtype) -> None:
    for n in EDGES:
        for kind in KINDS:
            for keep in sorted({0, min(1, n), n // 10, n // 2, n}):
                check(kind, n, dtype, keep)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_thread_count(isa: str, threads: int, dtype: torch.dtype) -> None:
    for kind in KINDS:
        for keep in (1, 10_000, 50_000):
            check(kind, 100_003, dtype, keep)


@pytest.mark.parametrize("threads", [2, 7], indirect=True)
def test_a_million(isa: str, threads: int) -> None:
    for kind in ("normal", "two values"):
        check(kind, 1_000_003, torch.float32, 100_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("density", [0.5, 0.1, 0.005])
def test_within(isa: str, dtype: torch.dtype, density: float) -> None:
    for n in (33, 2049, 70_003):
        eligible = random_mask(n, density).nnz
        for kind in ("normal", "ties", "constant"):
            for keep in sorted({min(1, eligible), eligible // 3, eligible}):
                check(kind, n, dtype, keep, density)


def test_within_a_stretch(isa: str) -> None:
    """Long runs of empty words are skipped, the values under them never looked at."""
    values = make("normal", 70_000)
    held = torch.zeros(70_000, dtype=torch.bool)
    held[33_000:41_000] = True
    values[~held] = float("nan")  # would rank first
    mask = fs.ops.magnitude_mask(values, 800, within=Mask.from_bool(held), backend="cpu")
    assert mask.nnz == 800
    assert not bool((mask.to_bool() & ~held).any())


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_a_list_is_ranked_globally(isa: str, threads: int) -> None:
    sizes = [0, 70_001, 31, 0, 40_000, 2048, 1]
    for kind in ("normal", "ties", "constant"):
        tensors = [make(kind, n, seed=i) for i, n in enumerate(sizes)]
        within = [None if i % 2 else random_mask(n, 0.4, i) for i, n in enumerate(sizes)]
        eligible = sum(n if m is None else m.nnz for n, m in zip(sizes, within, strict=True))
        for masks in ([None] * len(sizes), within):
            for keep in (1, eligible // 7, eligible):
                got = fs.ops.magnitude_mask(tensors, keep, within=masks, backend="cpu")
                reference = fs.ops.magnitude_mask(tensors, keep, within=masks, backend="reference")
                for mine, theirs in zip(got, reference, strict=True):
                    assert_same(mine, theirs)


def test_ties_keep_the_lowest_index_across_a_list() -> None:
    one, two = torch.ones(3), torch.full((4,), -1.0)
    masks = fs.ops.magnitude_mask([one, two], 5, backend="cpu")
    assert [m.to_bool().tolist() for m in masks] == [[True] * 3, [True, True, False, False]]


def test_order_of_magnitudes(isa: str) -> None:
    """Written by hand: NaN, infinity, finite by size, subnormals, zeros of either sign tied."""
    tiny = 2.0**-149
    values = torch.tensor([0.0, -tiny, float("-inf"), -0.0, 3.0, float("nan"), 2 * tiny, -3.0])
    order = [5, 2, 4, 7, 6, 1, 0, 3]
    for keep in range(len(order) + 1):
        kept = fs.ops.magnitude_mask(values, keep, backend="cpu").to_bool()
        assert kept.nonzero().flatten().tolist() == sorted(order[:keep])


def test_flushing_of_subnormals_changes_nothing(isa: str) -> None:
    values = make("normal", 5000) * 1e-41
    plain = fs.ops.magnitude_mask(values, 500, backend="cpu")
    assert torch.set_flush_denormal(True)
    try:
        assert_same(fs.ops.magnitude_mask(values, 500, backend="cpu"), plain)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_prune_writes_only_what_is_newly_pruned(isa: str, dtype: torch.dtype) -> None:
    for n in [*EDGES[1:], 70_003]:
        before = random_mask(n, 0.7)
        values = make("normal", n, dtype)
        with guarded(n, dtype) as pruned:
            pruned.copy_(values)
            mask = fs.ops.prune_(pruned, before.nnz // 2, within=before, backend="cpu")
            gone = before.to_bool() & ~mask.to_bool()
            assert torch.equal(bits(pruned), torch.where(gone, 0, bits(values)))
            pruned.copy_(values)
            zero_pruned_(pruned, mask, backend="cpu")
            assert torch.equal(bits(pruned), torch.where(mask.to_bool(), bits(values), 0))


def test_nothing_is_written_around_the_masks(isa: str) -> None:
    for n in EDGES[1:]:
        values = make("normal", n)
        words, ranks = -(-n // 32), -(-n // 2048) + 1
        with guarded(words, torch.int32, shift=1) as w, guarded(ranks, torch.int64) as r:
            native.select([values], [None], n, -(-n // 3), [w], [r], 2, False)
            assert torch.equal(w, wanted("normal", n, torch.float32, -(-n // 3)).words)


def reads(values: Tensor, keep: int) -> int:
    native.select([values], [None], values.numel(), keep, [], [], 2, False)
    return int(native.select_reads())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reads_of_the_values(kind: str, dtype: torch.dtype) -> None:
    """One read for continuous values; ties that the threshold falls on take a second."""
    values = make(kind, 1_000_003, dtype)
    words = torch.empty(31_251, dtype=torch.int32)
    ranks = torch.empty(490, dtype=torch.int64)
    for keep in (1, 10_000, 100_000, 500_000, 999_999):
        native.select([values], [None], values.numel(), keep, [words], [ranks], 2, False)
        continuous = kind in ("normal", "sorted", "descending") and dtype == torch.float32
        most = 1 if continuous else 2
        assert native.select_reads() <= most


def test_candidates_of_16_bits_have_room_in_one_read() -> None:
    """At one half, where most values are near the threshold: 2 reads with a sample of 128 Ki."""
    values = make("normal", 32_000_000, torch.float16)
    keep = values.numel() // 2
    mask = fs.ops.magnitude_mask(values, keep, backend="cpu")
    assert native.select_reads() == 1
    chosen, magnitude = mask.to_bool(), values.abs()
    assert mask.nnz == keep
    assert magnitude[chosen].min() >= magnitude[~chosen].max()


def check_misses(values: Tensor, wanted_reads: int) -> None:
    """A sample in some thousands misses the rank: each turn of the array draws another sample."""
    n, missed = values.numel(), 0
    for turn in range(0, 12_000, 3):
        turned = values.roll(turn)
        for keep in (n // 7, n // 3):
            if reads(turned, keep) > 1:
                mask = fs.ops.magnitude_mask(turned, keep, backend="cpu")
                assert native.select_reads() == wanted_reads
                assert_same(mask, fs.ops.magnitude_mask(turned, keep, backend="reference"))
                assert reads(turned, keep) == (3 if wanted_reads == 4 else wanted_reads)
                missed += 1
    assert missed, "no sample missed: the path was not taken"


def test_a_missed_bracket_costs_two_more_reads_and_is_still_exact() -> None:
    check_misses(make("normal", 20_000), 3)


def test_a_missed_bracket_in_one_crowded_bin_takes_four_reads() -> None:
    """All keys share their first 16 bits, so the first histogram cannot part them."""
    keys = torch.randint(0, 1 << 16, (20_000,), dtype=torch.int32)
    check_misses((keys + (0x3F80 << 16)).view(torch.float32), 4)


@LINUX
@pytest.mark.parametrize("kind", ["normal", "constant", "ties", "descending"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(kind: str, dtype: str) -> None:
    """Below 2% of the input and 1 MB: every page that the call touches for the first time."""
    n, keep = 12_000_000, 1_200_000
    setup = f"""
from test_select import make
values = make({kind!r}, {n}, torch.{dtype})
words = torch.zeros({-(-n // 32)}, dtype=torch.int32)
ranks = torch.zeros({-(-n // 2048) + 1}, dtype=torch.int64)
"""
    call = f"native.select([values], [None], {n}, {keep}, [words], [ranks], 2, False)"
    touched = touched_bytes(setup, call)
    assert touched < 0.02 * n * getattr(torch, dtype).itemsize + 1e6
    assert touched > 100_000  # a measurement that sees nothing is noticed
