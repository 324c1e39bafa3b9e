"""Rounds by what is on the wire: bfloat16, int8, differences, entropy coding."""

import pytest
import torch

import fedmap_sparse as fs
from fedmap_sparse.federated import FedMapClient
from fedmap_sparse.schedule import Iterative, OneShot

from .rounds import same
from .trained import answer, bits, make_client, make_server, net, train


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
