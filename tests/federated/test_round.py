"""The round: server and client over bytes, with dropouts, late joiners and bad messages."""

import copy
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.codec import FormatError
from fedmap_sparse.federated import FedMapClient, FedMapServer, NeedsMask, RoundFailed
from fedmap_sparse.federated.server_optim import FedAdam, FedAvgM
from fedmap_sparse.optim import MaskedSGD
from fedmap_sparse.schedule import Dense, Iterative, OneShot


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


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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


def test_bad_updates_are_refused_with_a_reason_and_leave_no_trace():
    server, reference = make_server(OneShot(0.5, 1)), make_server(OneShot(0.5, 1))
    for s in (server, reference):
        s.begin_round()
    stale = answer(server, make_client(5), 5)
    good = [(i, answer(server, make_client(i), i)) for i in range(2)]
    for s in (server, reference):
        s.aggregate(good)
        s.begin_round()
    good = [(i, answer(server, make_client(i), i)) for i in range(2)]
    poisoned = make_client(6)
    poisoned.receive(server.broadcast())
    poisoned.params.prunable[int(server.mask.to_bool().nonzero()[0])] = float("nan")
    buffered = make_client(7)
    buffered.receive(server.broadcast())
    buffered.params.module[1].running_var[0] = float("inf")
    foreign_server = FedMapServer(fs.flatten(nn.Linear(4, 4)), Dense())
    foreign_server.begin_round()
    foreign = FedMapClient(fs.flatten(nn.Linear(4, 4)))
    foreign.receive(foreign_server.broadcast())
    flipped = bytearray(good[0][1])
    flipped[700] ^= 4
    bad = {
        10: (stale, "answer to the broadcast"),
        11: (good[0][1][:-1], "bytes"),
        12: (bytes(flipped), "CRC"),
        13: (poisoned.update(9), "finite"),
        14: (buffered.update(9), "finite"),
        15: (foreign.update(9), "layout"),
        16: (b"", "128"),
        17: (server.broadcast(), "answer to the broadcast"),
    }
    result = server.aggregate(good + [(i, data) for i, (data, _) in bad.items()])
    reference.aggregate(good)
    assert result.accepted == (0, 1)
    assert result.refused.keys() == bad.keys()
    for i, (_, says) in bad.items():
        assert says in result.refused[i], (i, result.refused[i])
    assert same(bits(server), bits(reference))
    assert server.round == 2


@pytest.mark.parametrize("reverse", [False, True])
def test_two_different_updates_of_one_client_are_both_refused(reverse):
    server = make_server()
    server.begin_round()
    client = make_client(0)
    twice = [(0, answer(server, client, 0))]
    train(client, 9)
    twice.append((0, client.update(10)))
    other = (1, answer(server, make_client(1), 1))
    result = server.aggregate([*(reversed(twice) if reverse else twice), other])
    assert result.accepted == (1,)
    assert "2 that differ" in result.refused[0]


def test_the_same_update_twice_counts_once():
    server = make_server()
    server.begin_round()
    update = (0, answer(server, make_client(0), 0))
    assert server.aggregate([update, update]).accepted == (0,)


def test_a_failed_round_moves_nothing_and_takes_the_same_bytes_again():
    server = make_server(min_updates=2)
    server.begin_round()
    update = answer(server, make_client(0), 0)
    before = bits(server)
    with pytest.raises(RoundFailed, match="expected at least 2 usable updates, got 1") as caught:
        server.aggregate([(0, update), (1, b"?")])
    assert caught.value.refused.keys() == {1}
    assert same(bits(server), before)
    assert server.round == 0
    assert server.aggregate([(0, update), (1, answer(server, make_client(1), 1))]).round == 0
    empty = make_server()
    empty.begin_round()
    with pytest.raises(RoundFailed, match="at least 1 usable updates, got 0"):
        empty.aggregate([])


def test_an_infinite_mean_fails_the_round():
    server = make_server(Dense(), server_optimizer=FedAvgM(lr=1e30))
    server.begin_round()
    client = make_client(0)
    client.receive(server.broadcast())
    client.params.prunable[0] = 3e38
    before = bits(server)
    with pytest.raises(RoundFailed, match="finite"):
        server.aggregate([(0, client.update(1))])
    assert same(bits(server), before)


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lossy_broadcast_is_adopted_by_the_server(dtype):
    server = make_server(dtype=dtype)
    for r in range(3):
        server.begin_round()
        clients = [make_client(i, dtype=dtype) for i in range(3)]
        updates = [(i, answer(server, c, 10 * r + i)) for i, c in enumerate(clients)]
        fresh = make_client(9)
        fresh.receive(server.broadcast())
        assert torch.equal(fresh.params.values, server.params.values)
        server.aggregate(updates)


def test_a_bfloat16_client_joins_a_float32_server():
    server = make_server(OneShot(0.5, 0))
    server.begin_round()
    torch.manual_seed(3)
    half = FedMapClient(fs.flatten(net().to(torch.bfloat16)), dtype="bfloat16")
    half.receive(server.broadcast())
    assert half.params.values.dtype == torch.bfloat16
    assert torch.equal(half.params.values, server.params.values.to(torch.bfloat16))
    update = half.update(3)
    full = answer(server, make_client(1), 1)
    assert len(update) < 0.6 * len(full)
    assert server.aggregate([(0, update), (1, full)]).accepted == (0, 1)


def test_values_beyond_the_wires_range_are_an_error_and_change_nothing():
    server = make_server(dtype="float16")
    state = bits(server)
    held = server.params.prunable[7].clone()
    server.params.prunable[7] = 1e6
    with pytest.raises(ValueError, match=r"0\.weight: expected finite weights within 65504"):
        server.begin_round()
    server.params.prunable[7] = held
    assert same(bits(server), state)
    server.begin_round()
    client = make_client(0, dtype="float16")
    good = make_server()
    good.begin_round()
    client.receive(good.broadcast())
    client.params.prunable[0] = 1e6
    with pytest.raises(ValueError, match="range of float16"):
        client.update(1)


def test_order_of_calls():
    server, client = make_server(), make_client()
    for call in (server.broadcast, lambda: server.aggregate([]), server.close_round):
        with pytest.raises(RuntimeError, match=r"begin_round\(\) first"):
            call()
    with pytest.raises(RuntimeError, match=r"receive\(\) first"):
        client.update(1)
    server.begin_round()
    first = server.broadcast()
    server.begin_round()
    assert server.broadcast() == first
    client.receive(first)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        client.update(0)
    server.add(0, client.update(1))
    with pytest.raises(RuntimeError, match="no stream under way"):
        server.aggregate([])
    server.close_round()
    server.begin_round()
    with pytest.raises(TypeError, match="all ints or all strings"):
        server.aggregate([(0, b""), ("a", b"")])
    with pytest.raises(ValueError, match="float32, float16, bfloat16, int8, got 'float64'"):
        make_server(dtype="float64")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_server(min_updates=0)


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


def play(rounds, server, clients, samples=10):
    sizes = []
    for r in range(rounds):
        server.begin_round()
        updates = [(i, answer(server, c, 10 * r + i, samples)) for i, c in enumerate(clients)]
        sizes.append(sum(len(data) for _, data in updates))
        server.aggregate(updates)
    return sizes


def test_entropy_coding_saves_bytes_and_changes_no_bit():
    coded, raw = (
        make_server(Iterative(0.5, 1, 3)),
        make_server(Iterative(0.5, 1, 3), coding="raw"),
    )
    small = play(4, coded, [make_client(i) for i in range(2)])
    large = play(4, raw, [make_client(i, coding="raw") for i in range(2)])
    assert same(bits(coded), bits(raw))
    assert all(a <= b for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_delta_uplink_is_the_difference_from_the_broadcast(dtype):
    server = make_server(OneShot(0.5, 0))
    server.begin_round()
    clients = [make_client(i, dtype=dtype, delta=True) for i in range(3)]
    updates, values = [], []
    for i, client in enumerate(clients):
        updates.append((i, answer(server, client, i, samples=1)))
        values.append(fs.ops.pack(client.params.prunable, server.mask))
    start = fs.ops.pack(server.params.prunable, server.mask)
    largest = max(float((v - start).abs().max()) for v in values)
    server.aggregate(updates)
    mean = fs.ops.pack(server.params.prunable, server.mask)
    step = {"float32": 1e-7, "bfloat16": largest / 256, "int8": largest / 127}[dtype]
    torch.testing.assert_close(mean, torch.stack(values).mean(0), rtol=0, atol=step)


def test_int8_updates_keep_their_error_and_make_it_good():
    server = make_server(Iterative(0.6, 2, 2))
    client = make_client(0, dtype="int8", optimizer=None)
    saved = None
    for r in range(4):
        server.begin_round()
        client.receive(server.broadcast(client.have))
        nnz = server.mask.nnz
        before = client.state_dict()["residual"]
        assert before.numel() == nnz  # it followed the mask
        if r == 2:
            dense = fs.ops.pack(fs.ops.unpack(saved["residual"], saved["mask_of"]), server.mask)
            assert torch.equal(before, dense)
        client.params.prunable.add_(torch.randn(client.params.prunable.numel()) * 0.01)
        client.params.zero_pruned()
        wanted = fs.ops.pack(client.params.prunable, server.mask) + before
        data = client.update(1)
        after = client.state_dict()["residual"]
        sent = fs.decode(data, server.layout, mask=server.mask).packed
        torch.testing.assert_close(sent + after, wanted, rtol=0, atol=1e-6)
        assert after.any()
        saved = {"residual": after, "mask_of": server.mask}
        restarted = make_client(5, dtype="int8", optimizer=None)
        restarted.load_state_dict(client.state_dict())
        assert torch.equal(restarted.state_dict()["residual"], after)
        assert server.aggregate([(0, data)]).accepted == (0,)


def test_int8_broadcast_is_adopted_by_the_server():
    server = make_server(Iterative(0.6, 1, 3), dtype="int8")
    clients = [make_client(i, dtype="int8", delta=True) for i in range(2)]
    for r in range(4):
        server.begin_round()
        updates = []
        for i, c in enumerate(clients):
            c.receive(server.broadcast(c.have))
            assert torch.equal(c.params.values, server.params.values)
            train(c, 10 * r + i)
            updates.append((i, c.update(3)))
        assert server.aggregate(updates).accepted == (0, 1)


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
