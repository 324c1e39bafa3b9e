"""What the tests of rounds share: a small model with buffers of each kind, servers and clients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fedmap_sparse as fs
from fedmap_sparse.federated import FedMapClient, FedMapServer
from fedmap_sparse.optim import MaskedSGD
from fedmap_sparse.schedule import Dense, Schedule


class Net(nn.Module):
    """Two matrices, a bias, and buffers: float, constant float, integer, Boolean."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 20)
        self.b = nn.Linear(20, 5, bias=False)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("causal", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("codes", torch.arange(4, dtype=torch.int32))
        self.register_buffer("ready", torch.tensor([False, True]))


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    return Net().to(dtype)


def server_of(
    schedule: Schedule | None = None, model_dtype: torch.dtype = torch.float32, **options: Any
) -> FedMapServer:
    return FedMapServer(fs.flatten(model(model_dtype)), schedule or Dense(), **options)


def client_of(model_dtype: torch.dtype = torch.float32, **options: Any) -> FedMapClient:
    return FedMapClient(fs.flatten(model(model_dtype)), **options)


def sgd(params: fs.FlatParameters, mask: fs.Mask, lr: float | None) -> MaskedSGD:
    return MaskedSGD(params, mask, lr=lr or 0.1, momentum=0.9)


def move(client: FedMapClient, seed: int, size: float = 0.01) -> None:
    """Instead of training: add to every survivor and to the tail, and count one step."""
    g = torch.Generator().manual_seed(seed)
    flat = client.params
    with torch.no_grad():
        for p in flat.parameters:
            p.add_((size * torch.randn(p.shape, generator=g)).to(p.dtype))
    flat.zero_pruned()
    flat.module.steps.add_(3)  # type: ignore[operator,union-attr]  # a buffer
    flat.module.mean.add_(1.0)  # type: ignore[operator,union-attr]


def answer(server: FedMapServer, client: FedMapClient, seed: int = 0, samples: int = 10) -> bytes:
    client.receive(server.broadcast(client.have))
    move(client, seed)
    return client.update(samples, 0.5)


def bits(params: fs.FlatParameters) -> list[Tensor]:
    return [t.contiguous().view(torch.uint8) for t in params.to_state_dict().values() if t.dim()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
