"""torch.distributed over NCCL, with one rank: the same calls as over gloo, on CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if not (dist.is_available() and dist.is_nccl_available()):
    pytest.skip("torch is built without NCCL", allow_module_level=True)

import fedmap_sparse as fs
from fedmap_sparse.engines.distributed import PackedHook, packed_all_reduce

pytestmark = pytest.mark.gpu
DEVICE, BACKEND = "cuda", "nccl"


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(BACKEND, init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dense_above", [0.0, 1.0])
def test_survivors_are_summed_and_the_rest_is_zero(exact: bool, dense_above: float) -> None:
    values = torch.randn(5000, device=DEVICE)
    mask = fs.ops.magnitude_mask(values, 700)
    wanted = fs.ops.unpack(fs.ops.pack(values, mask), mask)
    packed_all_reduce(values, mask, exact=exact, dense_above=dense_above)
    assert torch.equal(values, wanted)


def test_training_gives_the_weights_of_ddp_without_the_hook() -> None:
    def train(hooked: bool) -> tuple[torch.Tensor, int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(DEVICE)
        params = fs.flatten(model)
        params.mask = fs.ops.prune_(params.prunable, 900, within=params.mask)
        ddp = DistributedDataParallel(model)
        hook = PackedHook(params)
        if hooked:
            hook.register(ddp)
        optimizer = fs.optim.MaskedSGD(params, lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.randn(32, 64, device=DEVICE)
            cross_entropy(ddp(x), torch.randint(0, 10, (32,), device=DEVICE)).backward()
            optimizer.step()
        return params.values.clone(), hook.bytes

    dense, _ = train(False)
    packed, sent = train(True)
    assert torch.equal(packed, dense)
    assert sent == 3 * 4 * (900 + 128 + 10)
