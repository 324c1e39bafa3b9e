"""What a round refuses: bad updates, calls out of order, means and values beyond the range."""

import pytest
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.federated import FedMapClient, FedMapServer, RoundFailed
from fedmap_sparse.federated.server_optim import FedAvgM
from fedmap_sparse.schedule import Dense, OneShot

from .rounds import same
from .trained import answer, bits, make_client, make_server, train


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
