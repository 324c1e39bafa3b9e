"""extract and deposit: bits over a parent's survivors, and back."""

from __future__ import annotations

import pytest
import torch
from guards import EDGES, guarded, random_mask

import fedmap_sparse as fs
from fedmap_sparse import Mask
from fedmap_sparse._backends import native
from fedmap_sparse.mask import num_ranks

pytestmark = pytest.mark.skipif(native is None, reason="fedmap_sparse._native is not built")


def check(parent: Mask, child: Mask) -> None:
    kept = fs.ops.extract(child, parent, backend="cpu")
    wanted = fs.ops.extract(child, parent, backend="reference")
    assert torch.equal(kept.words, wanted.words)
    assert torch.equal(kept.rank, wanted.rank)
    assert (kept.numel, kept.nnz) == (parent.nnz, child.nnz)
    assert torch.equal(kept.to_bool(), child.to_bool()[parent.to_bool()])
    assert fs.ops.deposit(kept, parent, backend="cpu") == child
    assert fs.ops.deposit(kept, parent, backend="reference") == child


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 0.93, 1.0])
def test_every_edge(isa: str, density: float) -> None:
    for n in [*EDGES, 70_003]:
        parent = random_mask(n, density)
        for share in (0.0, 0.3, 1.0):
            check(parent, parent & random_mask(n, share, seed=1))


@pytest.mark.parametrize("density", [0.0003, 0.1, 0.9])
def test_any_thread_count(isa: str, threads: int, density: float) -> None:
    """Tasks end in the middle of a word of the result, which two threads then share."""
    parent = random_mask(4_000_003, density)
    check(parent, parent & random_mask(4_000_003, 0.8, seed=1))


def test_blocks_of_every_density(isa: str) -> None:
    parts = [torch.rand(2048) < d for d in (1.0, 0.0, 0.001, 0.6, 0.0, 1.0, 0.03)] * 80
    parent = Mask.from_bool(torch.cat(parts))
    check(parent, parent & random_mask(parent.numel, 0.5))


def test_written_by_hand() -> None:
    parent = Mask.from_bool(torch.tensor([1, 0, 1, 1, 0, 1]).bool())
    child = Mask.from_bool(torch.tensor([1, 0, 0, 1, 0, 0]).bool())
    kept = fs.ops.extract(child, parent, backend="cpu")
    assert kept.to_bool().tolist() == [True, False, True, False]
    assert fs.ops.deposit(kept, parent, backend="cpu") == child


def test_nothing_is_written_around_the_results(isa: str) -> None:
    for n in EDGES[1:]:
        parent = random_mask(n, 0.6)
        child = parent & random_mask(n, 0.5, seed=1)
        arguments = parent.words, parent.rank, n
        with (
            guarded(-(-parent.nnz // 32), torch.int32, shift=1) as kept,
            guarded(num_ranks(parent.nnz), torch.int64) as rank,
        ):
            native.extract(child.words, *arguments, kept, rank, 2, False)
            with (
                guarded(-(-n // 32), torch.int32, shift=1) as words,
                guarded(num_ranks(n), torch.int64) as rank,
            ):
                native.deposit(kept, *arguments, words, rank, 2, False)
                assert torch.equal(words, child.words)
                assert torch.equal(rank, child.rank)
