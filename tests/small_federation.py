"""A federation of four small clients, for the in-process engine with and without workers."""

from typing import Any

import torch
from torch import Tensor, nn

import fedmap_sparse as fs
from fedmap_sparse.engines.in_process import InProcessEngine
from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.engines.workers import Bench
from fedmap_sparse.optim import MaskedSGD
from fedmap_sparse.schedule import Iterative

SCHEDULE = Iterative(0.9, start=1, end=4)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 7))


def train(name: Any, client: Any, message: Any) -> tuple[int, float]:
    """Two steps on data that depend on client and round alone."""
    rng = torch.Generator().manual_seed(1000 * message.round + name)
    x = torch.randn(16, 20, generator=rng)
    y = torch.randint(7, (16,), generator=rng)
    for _ in range(2):
        loss = nn.functional.cross_entropy(client.params.module(x), y)
        loss.backward()
        client.optimizer.step()
        client.optimizer.zero_grad()
    return 10 + name, loss.item()


def sgd(params: Any, mask: Any, lr: float | None) -> MaskedSGD:
    return MaskedSGD(params, mask, lr=lr or 0.1, momentum=0.9)


def client(params: fs.FlatParameters, *, keep: bool, dtype: str) -> fs.FedMapClient:
    return fs.FedMapClient(
        params, optimizer=sgd, keep_optimizer=keep, coding="raw", dtype=dtype, delta=dtype == "int8"
    )


def make_bench(train: Any = train, keep: bool = False, dtype: str = "float32") -> Bench:
    """What a worker process trains with."""
    return Bench(client(fs.flatten(network()), keep=keep, dtype=dtype), train, Phases())


def make(
    clients: int = 4,
    *,
    shared: bool = True,
    keep: bool = False,
    schedule: Any = SCHEDULE,
    min_updates: int = 1,
    dtype: str = "float32",
    **options: Any,
) -> InProcessEngine:
    # Uncoded, so that the size of a message does not depend on what is in it.
    server = fs.FedMapServer(
        fs.flatten(network()), schedule, lr=0.05, min_updates=min_updates, coding="raw"
    )
    one = fs.flatten(network())
    members = {
        i: client(one if shared else fs.flatten(network()), keep=keep, dtype=dtype)
        for i in range(clients)
    }
    return InProcessEngine(server, members, options.pop("train", train), **options)


def bits(params: Any) -> Tensor:
    return params.values.view(torch.int32).clone()
