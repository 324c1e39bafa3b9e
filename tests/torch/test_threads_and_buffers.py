"""Several threads, buffers that are used again, and copies of a round under way."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ambient import not_under
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedAdamW


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 10))


def parties(n, **options):
    server = fs.FedMapServer(fs.flatten(net()), fs.schedule.OneShot(0.5, at=0))

    def make(f, m, lr):
        return MaskedAdamW(f, m, lr=0.01)

    clients = [fs.FedMapClient(fs.flatten(net()), optimizer=make, **options) for _ in range(n)]
    server.begin_round()
    return server, clients


def train(client, seed):
    drawn = torch.Generator().manual_seed(seed)
    for p in client.params.module.parameters():
        p.grad = torch.randn(p.shape, generator=drawn)
    client.optimizer.step()


@not_under(
    "float64",
    "bfloat16",
    reason="the default dtype is every thread's: the gradients of this test's own would be others",
)
def test_clients_in_threads_are_as_clients_one_by_one():
    found = []
    for workers in (1, 6):
        server, clients = parties(6)
        data = server.broadcast(None)

        def answer(i, clients=clients, data=data):
            clients[i].receive(data)
            train(clients[i], i)
            return i, clients[i].update(10 + i)

        with ThreadPoolExecutor(workers) as pool:
            server.aggregate(list(pool.map(answer, range(6))))
        found.append(server.params.values.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "options", [{}, {"delta": True, "coding": "raw"}, {"dtype": "int8"}], ids=str
)
@pytest.mark.parametrize("kind", [bytearray, lambda b: memoryview(bytearray(b))])
def test_a_round_in_one_buffer_that_is_overwritten(kind, options):
    def play(through):
        server, clients = parties(3, **options)
        buffer = through(server.broadcast(None))
        for c in clients:
            c.receive(buffer)
        wipe(buffer)
        for i, c in enumerate(clients):
            train(c, i)
            buffer = through(c.update(10))
            server.add(i, buffer)
            wipe(buffer)
        server.close_round()
        return server.params.values

    def wipe(buffer):
        if not isinstance(buffer, bytes):
            buffer[:] = bytes(len(buffer))

    assert torch.equal(play(kind), play(bytes))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_round_under_way_is_copied(twin_of, streamed):
    server, clients = parties(2, delta=True)
    data = server.broadcast(None)
    for i, c in enumerate(clients):
        c._make_optimizer = None if twin_of is not copy.deepcopy else c._make_optimizer
        c.receive(data)
        if c.optimizer is not None:
            train(c, i)
    if streamed:
        server.add(0, clients[0].update(1))
    both = [(server, clients), twin_of((server, clients))]
    for a_server, some in both:
        if not streamed:
            a_server.add(0, some[0].update(1))
        a_server.add(1, some[1].update(1))
        a_server.close_round()
    assert torch.equal(both[0][0].params.values, both[1][0].params.values)
    assert both[0][0].params.values.data_ptr() != both[1][0].params.values.data_ptr()
