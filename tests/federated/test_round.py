"""The round: server and client over bytes, with dropouts, late joiners and what both keep."""

import copy
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fedmap_sparse as fs
from fedmap_sparse.codec import FormatError
from fedmap_sparse.federated import FedMapClient, NeedsMask
from fedmap_sparse.federated.server_optim import FedAdam, FedAvgM
from fedmap_sparse.optim import MaskedSGD
from fedmap_sparse.schedule import Dense, Iterative, OneShot

from .rounds import same
from .trained import answer, bits, make_client, make_server, net, train


def test_server_and_clients_agree_over_20_rounds_with_dropouts_and_late_joiners():
    server = make_server()
    clients = {i: make_client(i) for i in range(4)}
    rng = random.Random(3)
    kinds = set()
    previous = server.mask
    for r in range(20):
        if r in (7, 13):
            clients[len(clients)] = make_client(r)
        server.begin_round()
        assert server.mask <= previous
        previous = server.mask
        updates = []
        for i in rng.sample(sorted(clients), 3):
            message = server.broadcast(clients[i].have)
            kinds.add(fs.codec.inspect(message).sections[0].name)
            clients[i].receive(message)
            assert clients[i].have == server.mask.digest()
            assert clients[i].params.mask == server.mask
            assert torch.equal(clients[i].params.values, server.params.values)
            train(clients[i], 100 * r + i)
            if rng.random() < 0.8:  # else it drops out and may lag several rounds behind
                updates.append((i, clients[i].update(5 + i)))
        if not updates:
            continue
        result = server.aggregate(updates)
        assert result.round == r or r > result.round
        assert result.uplink_bytes == sum(len(b) for _, b in updates)
        gone = server.params.prunable[~server.mask.to_bool()]
        assert gone.view(torch.int32).eq(0).all()
    eligible = server.layout.eligible
    assert server.mask.nnz == server.schedule.keep(20, eligible) == eligible - round(0.9 * eligible)
    assert {"VALUES", "DELTA"} <= kinds


def test_any_order_of_arrival_gives_the_same_bits():
    results = []
    for shuffle in (1, 2, 3):
        server = make_server(OneShot(0.8, 0))
        server.begin_round()
        updates = [(i, answer(server, make_client(i), i, samples=3 + i)) for i in range(6)]
        random.Random(shuffle).shuffle(updates)
        result = server.aggregate(updates)
        assert result.accepted == tuple(range(6))
        results.append(bits(server))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_streaming_in_the_same_order_gives_the_same_bits_and_one_update_a_client():
    servers = [make_server(OneShot(0.8, 0)) for _ in range(2)]
    for server in servers:
        server.begin_round()
    updates = [(i, answer(servers[0], make_client(i), i)) for i in range(4)]
    servers[0].aggregate(updates)
    for i, data in updates:
        assert servers[1].add(i, data) is None
    assert "second" in servers[1].add(2, updates[2][1])
    result = servers[1].close_round()
    assert result.accepted == (0, 1, 2, 3)
    assert result.refused == {}
    assert same(bits(servers[0]), bits(servers[1]))


def test_what_a_client_gets_is_what_it_needs_and_no_more():
    server = make_server(Iterative(0.9, 1, 4))
    fresh, lagging, current = make_client(1), make_client(2), make_client(3)
    for r in range(5):
        server.begin_round()
        if r == 2:
            lagging.receive(server.broadcast(lagging.have))
        server.aggregate([(0, answer(server, current, r))])
    server.begin_round()
    full, delta, none = (
        fs.codec.inspect(server.broadcast(c.have)) for c in (fresh, lagging, current)
    )
    assert [s.name for s in full.sections][:2] == ["MASK", "VALUES"]
    assert [s.name for s in delta.sections][:2] == ["DELTA", "VALUES"]
    assert none.sections[0].name == "VALUES"
    sizes = [len(server.broadcast(c.have)) for c in (fresh, lagging, current)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    assert server.broadcast(b"?" * 16) == server.broadcast(None)
    for client in (fresh, lagging, current):
        client.receive(server.broadcast(client.have))
        assert client.params.mask == server.mask
    dense = make_server(Dense())
    dense.begin_round()
    names = {s.name for s in fs.codec.inspect(dense.broadcast(None)).sections}
    assert not names & {"MASK", "DELTA"}


def test_needs_mask_before_any_change():
    server = make_server(Iterative(0.9, 1, 3))
    client = make_client(1)
    for r in range(3):
        server.begin_round()
        server.aggregate([(0, answer(server, client, r))])
    server.begin_round()
    newcomer = make_client(2)
    values = newcomer.params.values.clone()
    with pytest.raises(NeedsMask) as caught:
        newcomer.receive(server.broadcast(client.have))
    assert caught.value.have is None
    assert torch.equal(newcomer.params.values, values)
    assert newcomer.have is None
    newcomer.receive(server.broadcast(caught.value.have))
    with pytest.raises(FormatError):
        newcomer.receive(server.broadcast()[:-64])
    assert newcomer.have == server.mask.digest()


@pytest.mark.parametrize("optimizer", [None, FedAvgM(), FedAdam(lr=0.03)])
def test_server_state_dict_continues_bit_for_bit(optimizer):
    def rounds(server, clients, numbers):
        for r in numbers:
            server.begin_round()
            server.aggregate([(i, answer(server, c, 10 * r + i)) for i, c in enumerate(clients)])

    schedule = Iterative(0.8, 1, 5)
    whole = make_server(schedule, server_optimizer=optimizer)
    rounds(whole, [make_client(i) for i in range(2)], range(6))
    half = make_server(schedule, server_optimizer=optimizer)
    rounds(half, [make_client(i) for i in range(2)], range(3))
    state = copy.deepcopy(half.state_dict())
    resumed = make_server(schedule, server_optimizer=optimizer)
    resumed.load_state_dict(state)
    rounds(resumed, [make_client(i) for i in range(2)], range(3, 6))
    assert same(bits(whole), bits(resumed))
    assert whole.mask == resumed.mask
    # a client that saw only round 0 is still known after the resume
    resumed.begin_round()
    state["mask"][0] ^= 1
    before = bits(resumed)
    with pytest.raises(ValueError, match="mask"):
        resumed.load_state_dict(state)
    assert same(bits(resumed), before)


def test_kept_optimizer_follows_mask_and_learning_rate_and_is_saved():
    rates = [0.1, 0.05, 0.02, 0.01]
    server = make_server(Iterative(0.9, 1, 3))
    server.lr = lambda r: rates[r]
    client = make_client(0, keep_optimizer=True)
    copied, saved = None, {}
    for r in range(4):
        server.begin_round()
        client.receive(server.broadcast(client.have))
        if r == 2:  # a client restarted from its saved state goes on in the same way
            copied = make_client(5, keep_optimizer=True)
            copied.load_state_dict(saved)
            copied.receive(server.broadcast(copied.have))
            train(copied, r)
        kept = client.optimizer
        assert kept.param_groups[0]["lr"] == rates[r]
        train(client, r)
        assert kept.mask == server.mask
        assert all(s["momentum_buffer"].any() for s in kept.state.values())
        if copied is not None:
            assert torch.equal(copied.params.values, client.params.values)
            copied = None
        saved = copy.deepcopy(client.state_dict())
        server.aggregate([(0, client.update(4))])
        assert client.optimizer is kept


def test_proximal_term_is_added_to_the_gradient():
    server = make_server(OneShot(0.5, 0))
    server.begin_round()
    kw = {"optimizer": lambda p, m, lr: MaskedSGD(p, m, lr=lr)}
    near, far = make_client(0, prox_mu=2.0, **kw), make_client(0, **kw)
    for client in (near, far):
        client.receive(server.broadcast())
    start = server.params.values.clone()
    for client in (near, far):
        train(client, 0, steps=1)
    assert torch.equal(near.params.values, far.params.values)  # no distance yet, no pull
    moved = near.params.values - start
    for client in (near, far):
        client.params.module.zero_grad()
        for p in client.params.parameters:
            p.grad = torch.zeros_like(p)
        client.optimizer.step()
    wanted = (start + moved) - 0.05 * 2.0 * ((start + moved) - start)
    torch.testing.assert_close(near.params.values, wanted, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="optimizer to add"):
        FedMapClient(fs.flatten(net()), prox_mu=1.0)


def test_server_optimizers_by_their_formulas():
    for optimizer in (FedAvgM(lr=0.5, momentum=0.8), FedAdam(lr=0.1, beta1=0.6, beta2=0.7)):
        server = make_server(Dense(), server_optimizer=optimizer)
        clients = [make_client(i) for i in range(2)]
        plain = make_server(Dense())
        model = server.params.values.clone()
        first = second = torch.zeros_like(model)
        for r in range(3):
            server.begin_round()
            plain.load_state_dict({**plain.state_dict(), **_model_of(server)})
            plain.begin_round()
            updates = [(i, answer(server, c, 10 * r + i)) for i, c in enumerate(clients)]
            server.aggregate(updates)
            plain.aggregate([(i, _readdress(b, plain)) for i, b in updates])
            delta = plain.params.values - model
            if isinstance(optimizer, FedAvgM):
                first = 0.8 * first + delta
                model = model + 0.5 * first
            else:
                first = 0.6 * first + 0.4 * delta
                second = 0.7 * second + 0.3 * delta**2
                model = model + 0.1 * first / (second.sqrt() + optimizer.tau)
            torch.testing.assert_close(server.params.values, model, rtol=1e-5, atol=1e-6)


def _model_of(server):
    model = server._held.model
    return {
        "values": model.values,
        "tail": model.tail,
        "round": server.round,
        "buffers": dict(server.params.buffers),
    }


def _readdress(data, server):
    """The same update: both servers' broadcasts are equal, so their digests are."""
    sent = fs.decode(server.broadcast(), server.layout)
    assert fs.decode(data, server.layout, mask=server.mask).answers == sent.broadcast_digest
    return data


def test_more_prunings_than_a_byte_counts():
    server = make_server(Iterative(0.9, 0, 299))
    client = FedMapClient(fs.flatten(net()))
    seen = []
    for r in range(300):
        server.begin_round()
        if r in (0, 3, 254, 255, 256, 257):
            seen.append(server.mask)
        client.receive(server.broadcast(client.have))
        server.aggregate([(0, client.update(1))])
    assert server.epoch > 256
    server.begin_round()
    for mask in seen:
        late = FedMapClient(fs.flatten(net()))
        late.load_state_dict({"mask": mask.words, "residual": None, "optimizer": None})
        message = server.broadcast(late.have)
        assert fs.codec.inspect(message).sections[0].name == "DELTA"
        late.receive(message)
        assert late.params.mask == server.mask


def test_dense_schedule_is_fedavg_with_everything_on_the_wire():
    server = make_server(Dense())
    clients = [make_client(i) for i in range(3)]
    server.begin_round()
    updates = [(i, answer(server, c, i, samples=i + 1)) for i, c in enumerate(clients)]
    server.aggregate(updates)
    values = [c.params.values.double() * (i + 1) for i, c in enumerate(clients)]
    mean = (values[0] + values[1] + values[2]) / 6
    assert torch.equal(server.params.values, mean.float())
    assert len(updates[0][1]) >= 4 * server.layout.eligible


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_server_of_a_hundred_clients_needs_the_memory_of_one():
    code = """
import re, sys, torch
from pathlib import Path
import fedmap_sparse as fs

def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

server = fs.FedMapServer(fs.flatten(torch.nn.Linear(2000, 1000)), fs.schedule.Dense())
client = fs.FedMapClient(fs.flatten(torch.nn.Linear(2000, 1000)))
for kind in ("stream", "list"):
    server.begin_round()
    client.receive(server.broadcast())
    update = client.update(1)
    if kind == "stream":
        server.add(0, update)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = peak()
        for i in range(1, 100):
            assert server.add(i, update) is None
        print(peak() - before)
        assert len(server.close_round().accepted) == 100
        continue
    for clients in (1, 10):
        received = [(i, bytes(bytearray(update))) for i in range(clients)]
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        assert len(server.aggregate(received).accepted) == clients
        print(peak() - before)
        server.begin_round()
        client.receive(server.broadcast())
        update = client.update(1)
"""
    # Freed blocks go back to the system, so that what is resident is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    streamed, one, ten = map(int, run.stdout.split())
    assert streamed < 1024  # KiB; an update's values take 7,812 in float32
    assert ten < one + 1024
