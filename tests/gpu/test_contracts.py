"""The contracts of the ladder on a real device, at sizes that fill it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from ladder import contracts
from ladder.syncs import watched

import fedmap_sparse as fs
from fedmap_sparse import ops
from fedmap_sparse.ops import masked_sgd
from fedmap_sparse.ops._segments import Segments

pytestmark = pytest.mark.gpu
FLOATS = contracts.FLOATS


def show(**tensors: Any) -> None:
    """A device reaches every tensor by its address."""


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "density"), [(31, 0.5), (5001, 0.4), (3_000_001, 0.08)])
def test_pack(n: int, density: float, dtype: torch.dtype) -> None:
    contracts.pack(n, density, dtype, "cuda", show)


@pytest.mark.parametrize(("n", "density"), [(65, 0.5), (3_000_001, 0.3), (3_000_001, 0.01)])
def test_deposit(n: int, density: float) -> None:
    contracts.deposit(n, density, "cuda", show)
    contracts.rank_index(n, "cuda", show)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.02])
@pytest.mark.parametrize("aligned", [True, False])
def test_masked_steps(density: float, dtype: torch.dtype, aligned: bool) -> None:
    contracts.masked_sgd(density, dtype, "cuda", show, aligned=aligned)
    contracts.masked_adamw(density, dtype, "cuda", show, aligned=aligned, amsgrad=aligned)
    if not aligned:
        contracts.masked_sgd(density, dtype, "cuda", show, skipped=True)
        contracts.masked_adamw(density, dtype, "cuda", show, skipped=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("aligned", [True, False])
def test_accumulate(dtype: torch.dtype, aligned: bool) -> None:
    contracts.accumulate(1_000_001, dtype, "cuda", show, aligned=aligned)
    contracts.mean_rounds_once("cuda", show)


# Of 64 less 6 the compiler takes minutes.
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("count", "trim"), [(1, 0), (10, 4), (50, 24), (64, 31), (65, 32)])
def test_trimmed(count: int, trim: int, aligned: bool) -> None:
    contracts.trimmed(count, trim, 300_001, "cuda", show, aligned=aligned)


@pytest.mark.parametrize("n", [1, 65_537, 1_000_001])
def test_distances(n: int) -> None:
    contracts.distances(11, n, "cuda", show)


@pytest.mark.parametrize("n", [1, 33, 3_000_001])
def test_digest_and_finiteness(n: int) -> None:
    contracts.digest(n, "cuda", show)
    for dtype in FLOATS:
        contracts.all_finite(n, dtype, "cuda", show)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cast(dtype: torch.dtype) -> None:
    contracts.cast(1_000_001, dtype, "cuda", show)


@pytest.mark.parametrize("block", [64, 192, 256, 1024])
@pytest.mark.parametrize("feedback", [True, False])
def test_quantize(block: int, feedback: bool) -> None:
    contracts.quantize(1_000_001, block, "cuda", show, feedback=feedback)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "share"), [(1, 1.0), (70000, 0.9), (9_000_001, 0.1)])
def test_select(n: int, share: float, dtype: torch.dtype) -> None:
    values = contracts.special(n, dtype, "cuda")
    contracts.select(values, max(1, round(n * share)), None, show)
    within = contracts.mask_of(n, 0.3, "cuda", holes=True)
    contracts.select(values, within.nnz // 2, within, show)
    contracts.select(torch.ones_like(values), max(1, n // 2), None, show)
    if n > 4096:
        hidden = contracts.hidden_from_the_sample(n, dtype, "cuda")
        contracts.select(hidden, n // 3, None, show)
        contracts.select(hidden, within.nnz // 3, within, show)


def test_select_does_not_wait_for_the_device() -> None:
    values = torch.randn(1 << 20, device="cuda")
    within = fs.Mask.full(1 << 20, "cuda")
    ops.magnitude_mask(values, 1000, within=within)
    with watched("error"):
        ops.magnitude_mask(values, 1000, within=within)


def test_a_step_in_a_cuda_graph_reads_scalars_from_the_device() -> None:
    n = 100_000
    mask = contracts.mask_of(n, 0.3, "cuda")
    segments = Segments([0], [n])
    segments.scalars = torch.zeros(1, 8, dtype=torch.float64, device="cuda")
    values = torch.randn(n, device="cuda") * mask.to_bool()
    grad = torch.randn(n, device="cuda")
    start = values.clone()

    def step() -> None:
        masked_sgd.step_segments_(values, mask, [grad], segments)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lr in (0.5, 0.25):
        values.copy_(start)
        segments.scalars[0, 0] = lr
        graph.replay()
        expected = (start - lr * grad) * mask.to_bool()
        torch.testing.assert_close(values, expected)
