"""Checks of rounds across ranks, for distributed_worker.py."""

from typing import Any

import torch
import torch.distributed as dist
from distributed_training import batch, checksum, network
from torch.nn.functional import cross_entropy

import fedmap_sparse as fs
from fedmap_sparse.engines.in_process import InProcessEngine
from fedmap_sparse.engines.ranks import RanksEngine
from fedmap_sparse.federated import RoundFailed


def train(name: Any, client: fs.FedMapClient, message: Any) -> tuple[int, float]:
    rng = torch.Generator().manual_seed(1000 * message.round + name)
    for _ in range(2):
        x, y = batch(rng)
        loss = cross_entropy(client.params.module(x), y)
        loss.backward()
        assert client.optimizer is not None
        client.optimizer.step()
        client.optimizer.zero_grad()
    return 10 + name, loss.item()


def make_server(**options: Any) -> fs.FedMapServer:
    schedule = fs.schedule.Iterative(0.9, start=1, end=4)
    return fs.FedMapServer(fs.flatten(network()), schedule, lr=0.05, **options)


def make_client(**options: Any) -> fs.FedMapClient:
    return fs.FedMapClient(
        fs.flatten(network()),
        optimizer=lambda p, m, lr: fs.optim.MaskedSGD(p, m, lr=lr or 0.1, momentum=0.9),
        **options,
    )


def state_of(server: fs.FedMapServer) -> str:
    return checksum(server.params.values, server.mask.words)


def rounds(dtype: str) -> dict[str, Any]:
    """The in-process engine's rounds, one by one; clients on the ranks by id modulo R."""
    rank, world = dist.get_rank(), dist.get_world_size()
    draw: dict[str, Any] = {"cohort": 4, "dropout": 0.2, "seed": 3}
    mine = {i: make_client(dtype=dtype) for i in range(rank, 6, world)}
    server = make_server() if rank == 0 else None
    engine = RanksEngine(server, mine, train, **draw)
    alone = InProcessEngine(
        make_server(), {i: make_client(dtype=dtype) for i in range(6)}, train, **draw
    )
    same, bits = [], []
    for _ in range(7):
        same.append(engine.round() == alone.round())
        if server is not None:
            bits.append(state_of(server) == state_of(alone.server))
    return {"rounds": all(same), "bits": all(bits), "pruned": alone.server.epoch >= 3}


def round_that_fails() -> dict[str, Any]:
    """Too few updates: every rank is told, and the server can go on."""
    rank = dist.get_rank()
    server = make_server(min_updates=100) if rank == 0 else None
    engine = RanksEngine(server, {rank: make_client()}, train)
    before = None if server is None else state_of(server)
    for _ in range(2):
        try:
            engine.round()
        except RoundFailed as error:
            message = str(error)
        else:
            return {"raises": False}
    return {
        "says_why": "at least 100 usable updates" in message,
        "unchanged": server is None or state_of(server) == before,
    }


def refused_setups() -> dict[str, Any]:
    """(what is wrong): (server, ids) of this rank."""
    rank = dist.get_rank()
    server = make_server()
    cases: dict[str, tuple[fs.FedMapServer | None, list[int]]] = {
        "server": (None, [rank]),
        "server_everywhere": (server, [rank]),
        "clients": (server if rank == 0 else None, [7]),
        "clients_none": (server if rank == 0 else None, []),
    }
    found = {}
    for name, (on_rank, ids) in cases.items():
        try:
            RanksEngine(on_rank, {i: make_client() for i in ids}, train)
        except ValueError as error:
            found[name] = str(error).startswith(name.split("_")[0])
        else:
            found[name] = False
    return found
