"""A flattened model in torch's own machinery: torch.compile, DDP, DataLoader workers, deepcopy."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedAdamW, MaskedSGD


def net() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 6))


def batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(size, 9, generator=g), torch.randint(6, (size,), generator=g)


def prune_and_train(flat, forward, steps=4):
    mask = fs.ops.prune_(flat.prunable, 120, within=flat.mask)
    optimizer = MaskedSGD(flat, mask, lr=0.1, momentum=0.9)
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(x), y).backward()
        optimizer.step()
    return flat.values.clone()


def test_compiled_model_sees_every_step():
    eager = prune_and_train(flat := fs.flatten(net()), flat.module)
    flat = fs.flatten(net())
    compiled = torch.compile(flat.module, backend="aot_eager")
    torch.testing.assert_close(prune_and_train(flat, compiled), eager, rtol=1e-6, atol=1e-7)


RANK = """
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedSGD

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
model = torch.load(f"{folder}/model.pt", weights_only=False)
flat = fs.flatten(model)
mask = fs.ops.prune_(flat.prunable, 120, within=flat.mask)
parallel = nn.parallel.DistributedDataParallel(model)
optimizer = MaskedSGD(flat, mask, lr=0.1, momentum=0.9)
for step, (x, y) in enumerate(torch.load(f"{folder}/batches.pt", weights_only=True)):
    half = slice(4 * rank, 4 * rank + 4)
    optimizer.zero_grad(set_to_none=step % 2 == 0)
    nn.functional.cross_entropy(parallel(x[half]), y[half]).backward()
    optimizer.step()
torch.save(flat.values, f"{folder}/{rank}.pt")
dist.barrier()
# gloo's own threads abort 1 exit in 24 here, with a plain torch model and without this package too
os._exit(0)
"""


def test_ddp_of_two_ranks_equals_one_process(tmp_path):
    torch.save(net(), tmp_path / "model.pt")
    torch.save([batch(step) for step in range(4)], tmp_path / "batches.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(r), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    one, two = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert torch.equal(one, two)
    flat = fs.flatten(net())
    alone = prune_and_train(flat, flat.module)
    torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-6)


class Selecting(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        values = torch.randn(300_000, generator=torch.Generator().manual_seed(i))
        return fs.ops.magnitude_mask(values, 1000).digest()


def test_kernels_in_dataloader_workers_after_use_in_the_parent():
    wanted = [Selecting()[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(
        Selecting(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    assert list(loader) == wanted


def test_deepcopy_is_an_ordinary_model():
    flat = fs.flatten(net())
    clone = copy.deepcopy(flat.module)
    before = flat.values.clone()
    optimizer = torch.optim.SGD(clone.parameters(), lr=1.0)
    clone(torch.ones(2, 9)).sum().backward()
    optimizer.step()
    assert torch.equal(flat.values, before)
    again = fs.flatten(clone)
    assert again.layout.digest() == flat.layout.digest()
    assert not torch.equal(again.values, before)


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
def test_one_call_into_the_kernels_a_step(make, monkeypatch):
    from fedmap_sparse._backends import native

    name = "masked_sgd" if make is MaskedSGD else "masked_adamw"
    calls = []
    kernel = getattr(native, name)
    monkeypatch.setattr(native, name, lambda *a: (calls.append(a), kernel(*a)))
    flat = fs.flatten(net())
    groups = [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(flat.parameters)]
    optimizer = make(flat, groups=groups)
    flat.module(torch.ones(2, 9)).sum().backward()
    optimizer.step()
    assert len(calls) == 1


def test_environment_forces_a_backend():
    code = (
        "import torch, fedmap_sparse as fs\n"
        "print(fs._backends.pick(None, torch.device('cpu')))\n"
        "fs.ops.magnitude_mask(torch.ones(3), 1)\n"
    )

    def run(backend):
        env = {**os.environ, "FEDMAP_SPARSE_BACKEND": backend}
        env.pop("TRITON_INTERPRET", None)
        return subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )

    for name in ("reference", "cpu"):
        assert run(name).stdout.strip() == name
    unknown = run("gpu")
    assert unknown.returncode == 1
    assert "expected one of reference, cpu, triton, cuda, got 'gpu'" in unknown.stderr
    if not torch.cuda.is_available():
        missing = run("triton").stderr
        assert "backend 'triton' is not available" in missing
        assert "Available: reference, cpu" in missing


def test_backends_are_listed_and_forced_by_argument():
    assert fs.backends().keys() == {"reference", "cpu", "triton", "cuda"}
    x = torch.randn(100)
    for name in ("reference", "cpu"):
        assert fs.ops.magnitude_mask(x, 7, backend=name).nnz == 7
    with pytest.raises(ValueError, match="got 'fast'"):
        fs.ops.magnitude_mask(x, 7, backend="fast")
