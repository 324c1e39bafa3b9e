"""The round's hooks: criterion, masks of the caller's, snapshots, aborted rounds, order, arrays."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from ambient import OWN, not_under
from torch import Tensor

import fedmap_sparse as fs
from fedmap_sparse import codec
from fedmap_sparse.errors import RoundFailed
from fedmap_sparse.federated import array_sections
from fedmap_sparse.schedule import Iterative, OneShot

from .rounds import answer, bits, client_of, model, move, same, server_of, sgd


def test_magnitude_as_a_criterion_changes_nothing() -> None:
    seen = []

    def magnitude(values: Tensor, mask: fs.Mask, layout: fs.FlatLayout) -> Tensor:
        seen.append((values.numel(), mask.nnz, layout.eligible))
        return values.abs()

    servers = [server_of(Iterative(0.8, 0, 2), criterion=c) for c in (None, magnitude)]
    for _ in range(3):
        for s in servers:
            s.begin_round()
        assert servers[0].broadcast() == servers[1].broadcast()
        update = answer(servers[0], client_of())
        for s in servers:
            s.aggregate([(0, update)])
    assert [a == b for a, b, _ in seen] == [True] * 3


@not_under("meta", reason=OWN)
@pytest.mark.parametrize("signed", [False, True])
def test_a_criterion_ranks_as_it_likes(signed: bool) -> None:
    def last(values: Tensor, mask: fs.Mask, layout: fs.FlatLayout) -> Tensor:
        scores = torch.arange(values.numel(), dtype=torch.float32)
        return scores - 100 if signed else scores

    server = server_of(OneShot(0.75, 0), criterion=last)
    server.begin_round()
    kept = server.layout.mask_dict(server.mask)
    assert not kept["a.weight"].any()
    assert kept["b.weight"].view(-1).tolist() == [i >= 15 for i in range(100)]


@pytest.mark.parametrize(
    "scores",
    [lambda v: v[1:], lambda v: v * float("nan"), lambda v: "high"],
    ids=["too few", "NaN", "text"],
)
def test_a_broken_criterion_changes_nothing(scores: Any) -> None:
    server = server_of(OneShot(0.75, 0), criterion=lambda v, m, k: scores(v))
    before = bits(server.params)
    with pytest.raises((ValueError, TypeError), match="criterion: expected"):
        server.begin_round()
    assert same(before, bits(server.params))
    server.criterion = None
    server.begin_round()


def test_set_mask_prunes_to_the_callers_mask() -> None:
    server, client = server_of(), client_of()
    server.begin_round()
    half = fs.ops.magnitude_mask(server.params.prunable, 170, within=server.mask)
    with pytest.raises(RuntimeError, match="no round under way"):
        server.set_mask(half)
    server.aggregate([(0, answer(server, client))])
    half = fs.ops.magnitude_mask(server.params.prunable, 170, within=server.mask)
    server.set_mask(half)
    assert (server.mask, server.epoch) == (half, 1)
    assert not server.params.prunable[~half.to_bool()].any()
    with pytest.raises(ValueError, match="subset"):
        server.set_mask(server.layout.initial_mask())
    server.begin_round()
    data = server.broadcast(client.have)
    assert codec.inspect(data).sections[0].name in ("DELTA", "VALUES", "MASK")
    client.receive(data)
    assert client.params.mask == half


def test_a_snapshot_shows_the_model_and_arms_no_update() -> None:
    server, client = server_of(OneShot(0.5, 1), lr=0.1), client_of(optimizer=sgd)
    server.begin_round()
    server.aggregate([(0, answer(server, client))])
    before, mask = bits(server.params), server.mask
    data = server.snapshot(client.have)
    assert server.mask == mask
    assert same(before, bits(server.params))
    message = client.receive(data)
    assert message.meta == {"snapshot": True}
    assert torch.equal(client.params.values, server.params.values)
    with pytest.raises(RuntimeError, match="of a broadcast"):
        client.update(5)
    server.begin_round()
    sent = codec.decode(server.broadcast(), server.layout)
    assert codec.decode(data, server.layout).broadcast_digest != sent.broadcast_digest
    client.receive(server.broadcast(client.have))
    assert server.aggregate([(0, client.update(5))]).accepted == (0,)
    assert client_of().receive(server.snapshot()).mask == server.mask


def test_abort_round_leaves_the_server_as_it_was() -> None:
    server = server_of(OneShot(0.5, 0), dtype="bfloat16")
    before, mask = bits(server.params), server.mask
    server.begin_round()
    first = server.broadcast()
    update = answer(server, client_of())
    server.add(0, update)
    server.abort_round()
    server.abort_round()
    assert (server.mask, server.epoch, server.round) == (mask, 0, 0)
    assert same(before, bits(server.params))
    with pytest.raises(RuntimeError, match="begin_round"):
        server.add(0, update)
    server.begin_round()
    assert server.broadcast() == first
    assert server.add(0, update) is None
    assert server.close_round().accepted == (0,)


def test_weights_written_into_the_model_are_taken_up() -> None:
    server = server_of()
    torch.manual_seed(9)
    pretrained = {name: torch.randn(p.shape) for name, p in model().named_parameters()}
    server.params.module.load_state_dict(pretrained, strict=False)
    server.begin_round()
    got = fs.decode(server.broadcast(), server.layout).to_state_dict()
    assert torch.equal(got["a.weight"], pretrained["a.weight"])
    with torch.no_grad():
        server.params.module.b.weight.data.fill_(2.0)
    server.aggregate([(0, answer(server, client_of()))])
    server.params.module.b.weight.data.fill_(3.0)
    got = fs.decode(server.snapshot(), server.layout).to_state_dict()
    assert got["b.weight"].unique().tolist() == [3.0]


def test_the_order_of_the_sum_may_be_given() -> None:
    base = server_of()
    base.begin_round()
    updates = [(f"node{i}", answer(base, client_of(), i, samples=3 + i)) for i in range(5)]
    results = []
    for order in (["node3", "node1", "node0", "node4", "node2"], None):
        server = server_of()
        server.begin_round()
        result = server.aggregate(reversed(updates), order=order)
        assert list(result.accepted) == (order or [f"node{i}" for i in range(5)])
        results.append(server)
    renamed = server_of()
    renamed.begin_round()
    places = ["node3", "node1", "node0", "node4", "node2"]
    renamed.aggregate([(places.index(c), d) for c, d in updates])
    assert same(bits(renamed.params), bits(results[0].params))
    server = server_of()
    server.begin_round()
    for order, says in ((["node1"], "node0"), (["node0"] * 2, "twice")):
        with pytest.raises(ValueError, match=says):
            server.aggregate(updates, order=order)


def test_add_from_several_threads_loses_nobody() -> None:
    server = server_of()
    server.begin_round()
    updates = [(i, answer(server, client_of(), i)) for i in range(16)]
    plain = server_of()
    plain.begin_round()
    plain.aggregate(updates)
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda u: server.add(*u), updates * 2))
    assert sum(reason is None for reason in said) == 16
    result = server.close_round()
    assert sorted(result.accepted) == list(range(16))
    torch.testing.assert_close(server.params.values, plain.params.values)


def test_an_update_that_comes_after_the_round_is_told_so() -> None:
    server = server_of()
    server.begin_round()
    update = answer(server, client_of())
    stream = server._streaming("test")
    stream.close()
    assert "before the round ended" in (stream.offer(0, update) or "")


def test_update_twice_gives_the_same_bytes_and_spends_its_error_once() -> None:
    server = server_of(min_updates=2)
    client, plain = client_of(dtype="int8"), client_of(dtype="int8")
    for r in range(3):
        server.begin_round()
        for c in (client, plain):
            c.receive(server.broadcast(c.have))
            move(c, r)
        first = client.update(4)
        assert client.update(4) == first == plain.update(4)
        if r == 1:  # the round fails, and is repeated from the same broadcast
            with pytest.raises(RoundFailed):
                server.aggregate([(0, first)])
            client.receive(server.broadcast(client.have))
            move(client, r)
            assert client.update(4) == first
            restarted = client_of(dtype="int8")
            restarted.from_bytes(client.to_bytes())
            restarted.receive(server.broadcast(restarted.have))
            move(restarted, r)
            assert restarted.update(4) == first
        server.aggregate([(0, first), (1, first)])


def test_apply_mean_is_the_mean_of_arrays_under_the_same_rules() -> None:
    server, plain = server_of(OneShot(0.5, 0)), server_of(OneShot(0.5, 0))
    for s in (server, plain):
        s.begin_round()
    total, updates = torch.zeros(()), []
    for i in range(3):
        client = client_of()
        client.receive(server.broadcast())
        move(client, i)
        updates.append((i, client.update(4)))
        total = total + client.update_array().double()
    table = array_sections(server.layout, server.mask)
    assert [(s.name, s.kind) for s in table] == [
        ("survivors", "survivors"), ("tail", "tail"), ("mean", "buffer"), ("causal", "buffer"),
    ]  # fmt: skip
    assert table[-1].stop == total.numel()
    mean = (total / 3).float()
    assert server.apply_mean(mean, 12, 3).accepted == (0, 1, 2)
    plain.aggregate(updates)
    assert torch.equal(server.params.values, plain.params.values)
    assert server.params.module.mean.tolist() == [1.0] * 3
    assert server.params.module.steps.item() == 0
    assert server.round == 1


def test_apply_mean_refuses_by_name_and_changes_nothing() -> None:
    server = server_of(model_dtype=torch.float16, min_updates=2)
    with pytest.raises(RuntimeError, match="begin_round"):
        server.apply_mean(torch.zeros(1), 1, 2)
    server.begin_round()
    client = client_of()
    client.receive(server.broadcast())
    good = client.update_array()
    before = bits(server.params)

    def with_at(index: int, value: float) -> Tensor:
        bad = good.clone()
        bad[index] = value
        return bad

    for array, samples, clients, error, says in (
        (good[1:], 1, 2, ValueError, "array: expected shape"),
        (good.double(), 1, 2, TypeError, "float32"),
        (None, 1, 2, TypeError, "array"),
        (with_at(250, 1e6), 1, 2, ValueError, r"b\.weight"),
        (with_at(341, float("nan")), 1, 2, ValueError, r"a\.bias"),
        (with_at(-12, 1e6), 1, 2, ValueError, "mean"),
        (with_at(-1, float("inf")), 1, 2, ValueError, "causal"),
        (good, 0, 2, ValueError, "num_samples"),
        (good, 1, 0, ValueError, "clients"),
        (good, 1, 1, RoundFailed, "at least 2 clients"),
    ):
        with pytest.raises(error, match=says):
            server.apply_mean(array, samples, clients)  # type: ignore[arg-type]
        assert same(before, bits(server.params))
        assert server.round == 0
    server.apply_mean(good, 5, ["a", "b"])
