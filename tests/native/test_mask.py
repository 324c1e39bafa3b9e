"""The mask kernels against the plain-torch forms of mask.py."""

from __future__ import annotations

import pytest
import torch
from guards import EDGES, guarded, random_mask

from fedmap_sparse import Mask
from fedmap_sparse._backends import native
from fedmap_sparse.mask import (
    bool_from_words,
    digest_reference,
    num_ranks,
    num_words,
    rank_index,
    words_from_bool,
)

pytestmark = pytest.mark.skipif(native is None, reason="fedmap_sparse._native is not built")


def check(n: int, density: float, threads: int) -> None:
    mask = random_mask(n, density)
    words, kept = mask.words, bool_from_words(mask.words, n)
    with guarded(num_ranks(n), torch.int64) as rank:
        assert native.rank_index(words, n, rank, threads) == mask.nnz
        assert torch.equal(rank, rank_index(words, n, "reference"))
    with guarded(n, torch.uint8, shift=3) as bools:
        native.mask_to_bools(words, bools.view(torch.bool), threads)
        assert torch.equal(bools, kept.to(torch.uint8))
        bools *= torch.randint(1, 256, (n,), dtype=torch.uint8)  # any nonzero byte is true
        with guarded(num_words(n), torch.int32, shift=1) as back:
            native.mask_from_bools(bools.view(torch.bool), back, threads)
            assert torch.equal(back, words_from_bool(kept))
    assert native.mask_digest(words, n, threads) == digest_reference(words, n)


def test_every_edge(isa: str) -> None:
    for n in EDGES:
        for density in (0.0, 0.1, 1.0):
            check(n, density, 1)


@pytest.mark.parametrize("density", [0.01, 0.9])
def test_any_thread_count(isa: str, threads: int, density: float) -> None:
    for n in (100_003, 3_000_003):
        check(n, density, threads)


def test_one_bit_outside_is_seen_wherever_it_is(isa: str, threads: int) -> None:
    n = 9_000_001
    b = random_mask(n, 0.5)
    a = b & random_mask(n, 0.5, seed=1)
    assert a <= b
    outside = (~b.to_bool()).nonzero().flatten()
    for at in outside[[0, 1, outside.numel() // 2, -1]].tolist():
        words = a.words.clone()
        words[at // 32] |= 1 << (at % 32) if at % 32 < 31 else -(1 << 31)
        assert not Mask.from_words(words, n) <= b


def test_the_digest_depends_on_places_and_size(isa: str) -> None:
    n = 4096
    words = torch.zeros(n // 32, dtype=torch.int32)
    digests = {native.mask_digest(words, m, 1) for m in (n, n - 1)}
    for at in range(0, n, 97):
        words.zero_()
        words[at // 32] = 1
        digests.add(native.mask_digest(words, n, 1))
    assert len(digests) == 2 + len({at // 32 for at in range(0, n, 97)})
