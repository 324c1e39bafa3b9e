"""Sparse data-parallel training.

    torchrun --standalone --nproc-per-node 2 examples/distributed/ddp.py

One hook, and the ranks exchange the gradients of survivors alone. The weights are those of plain
DDP, bit for bit, on two ranks. On GPUs: move the model, and `init_process_group("nccl")`.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fedmap_sparse as fs
from fedmap_sparse.engines.distributed import PackedHook, check_same_mask
from fedmap_sparse.experiments.data import load

torch.set_num_threads(1)  # the ranks share the cores
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
data = load("fashion-mnist-subset")
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))

params = fs.flatten(model)
ddp = DistributedDataParallel(model)
hook = PackedHook(params)
hook.register(ddp)
optimizer = fs.optim.MaskedSGD(params, lr=0.05, momentum=0.9)
schedule = fs.schedule.Iterative(target=0.95, start=1, end=4)

for epoch in range(6):
    keep = schedule.keep(epoch, params.layout.eligible)
    if keep < params.mask.nnz:
        params.mask = fs.ops.prune_(params.prunable, keep, within=params.mask)
        check_same_mask(params)  # the ranks' weights are equal, so their masks are
    before, steps = hook.bytes, 0
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(epoch))
    for chosen in order[: len(order) // 2][rank::world].split(64):
        optimizer.zero_grad()
        cross_entropy(ddp(data.train.images[chosen]), data.train.labels[chosen]).backward()
        optimizer.step()
        steps += 1
    if rank == 0:
        sent, dense = (hook.bytes - before) // steps, 4 * sum(p.numel() for p in model.parameters())
        print(f"epoch {epoch}: density {params.density:.2f}, {sent:,} of {dense:,} bytes per step")

if rank == 0:
    with torch.no_grad():
        right = (model(data.validation.images).argmax(1) == data.validation.labels).float().mean()
    print(f"validation accuracy {right:.1%}")
dist.destroy_process_group()
