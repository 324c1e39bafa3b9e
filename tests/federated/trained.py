"""A network that is trained for a few steps a round, for the tests of whole rounds."""

import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.federated import FedMapClient, FedMapServer
from fedmap_sparse.optim import MaskedSGD
from fedmap_sparse.schedule import Iterative


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)
    )


def make_server(schedule=None, **kw) -> FedMapServer:
    torch.manual_seed(0)
    return FedMapServer(fs.flatten(net()), schedule or Iterative(0.9, 1, 15, 2), lr=0.05, **kw)


def make_client(seed=1, **kw) -> FedMapClient:
    torch.manual_seed(seed)
    kw.setdefault("optimizer", lambda p, m, lr: MaskedSGD(p, m, lr=lr, momentum=0.9))
    return FedMapClient(fs.flatten(net()), **kw)


def train(client: FedMapClient, seed: int, steps: int = 2) -> None:
    g = torch.Generator().manual_seed(seed)
    module = client.params.module.train()
    for _ in range(steps):
        x, y = torch.randn(8, 1, 6, 6, generator=g), torch.randint(10, (8,), generator=g)
        client.optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        client.optimizer.step()


def answer(server, client, seed, samples=10) -> bytes:
    client.receive(server.broadcast(client.have))
    train(client, seed)
    return client.update(samples, 0.5)


def bits(server) -> list[torch.Tensor]:
    state = server.params.to_state_dict()
    return [t.view(torch.int32) if t.is_floating_point() else t for t in state.values()]
