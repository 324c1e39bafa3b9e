"""What a client checks of a broadcast before it writes any of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedmap_sparse import codec
from fedmap_sparse.errors import FormatError
from fedmap_sparse.federated import FedMapClient, FedMapServer
from fedmap_sparse.schedule import OneShot

from .rounds import answer, bits, client_of, move, same, server_of, sgd

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def altered(server: FedMapServer, **changes: Any) -> bytes:
    """The server's broadcast with other contents under good checksums."""
    sent = codec.decode(server.broadcast(), server.layout)
    packed = changes.pop("packed", sent.packed)
    tail = changes.pop("tail", sent.tail)
    buffers = changes.pop("buffers", sent.buffers)
    stamp = {"round": sent.round, "epoch": sent.epoch, "meta": {"lr": 0.1}, **changes}
    return codec.compose(server.layout, sent.mask, packed, tail, buffers, **stamp).encode("full")


def spoiled(t: torch.Tensor, value: float) -> torch.Tensor:
    out = t.clone()
    out[1] = value
    return out


REFUSED: dict[str, Callable[[FedMapServer, codec.Message], bytes]] = {
    "an update": lambda s, m: altered(s, answers=b"a" * 16, num_samples=3),
    "samples in a broadcast": lambda s, m: altered(s, num_samples=3),
    "an older round": lambda s, m: altered(s, round=0),
    "an older epoch": lambda s, m: altered(s, epoch=0),
    "NaN in a weight": lambda s, m: altered(s, packed=spoiled(m.packed, float("nan"))),
    "infinity in the tail": lambda s, m: altered(s, tail=spoiled(m.tail, float("inf"))),
    "NaN in a buffer": lambda s, m: altered(
        s, buffers={**m.buffers, "mean": torch.full((3,), float("nan"))}
    ),
    "an integer beyond the buffer's": lambda s, m: altered(
        s, buffers={**m.buffers, "codes": torch.full((4,), 1 << 40)}
    ),
    "a learning rate of NaN": lambda s, m: altered(s, meta={"lr": float("nan")}),
    "a learning rate below 0": lambda s, m: altered(s, meta={"lr": -0.1}),
    "a learning rate that is text": lambda s, m: altered(s, meta={"lr": "0.1"}),
    "a snapshot that is no Boolean": lambda s, m: altered(s, meta={"snapshot": 1}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_receive_checks_everything_before_it_writes(case: str) -> None:
    server = server_of(OneShot(0.5, 1), lr=0.1)
    client = client_of(dtype="int8")
    for r in range(2):
        server.begin_round()
        server.aggregate([(0, answer(server, client, r))])
    server.begin_round()
    client.receive(server.broadcast(client.have))
    move(client, 3)
    before, state, update = bits(client.params), client.to_bytes(), client.update(3)
    bad = REFUSED[case](server, codec.decode(server.broadcast(), server.layout))
    with pytest.raises(FormatError):
        client.receive(bad)
    assert same(before, bits(client.params))
    assert client.update(3) == update
    fresh = client_of(dtype="int8")
    fresh.from_bytes(state)
    assert fresh.have == client.have


def step(client: FedMapClient) -> None:
    assert client.optimizer is not None
    client.optimizer.zero_grad()
    client.params.module.a(torch.ones(2, 12)).sum().backward()  # type: ignore[operator,union-attr]
    client.optimizer.step()


def test_a_kept_optimizer_ends_with_the_federation_that_it_served() -> None:
    """Of what the old one pruned it has no state."""
    old, new = server_of(OneShot(0.8, 0), lr=0.1), server_of(OneShot(0.2, 0), lr=0.1)
    client, fresh = (client_of(optimizer=sgd, keep_optimizer=True) for _ in range(2))
    old.begin_round()
    client.receive(old.broadcast())
    step(client)
    new.begin_round()
    for c in (client, fresh):
        c.receive(new.broadcast(c.have))
        step(c)
    assert same(bits(client.params), bits(fresh.params))


def test_a_kept_optimizer_whose_state_is_no_number_begins_anew() -> None:
    server = server_of(lr=0.1)
    client, fresh = (client_of(optimizer=sgd, keep_optimizer=True) for _ in range(2))
    server.begin_round()
    client.receive(server.broadcast())
    step(client)
    assert client.optimizer is not None
    client.optimizer.state[client.params.parameters[0]]["momentum_buffer"].fill_(float("nan"))
    assert client.state_dict()["optimizer"] is None  # a run that goes on does the same
    for c in (client, fresh):
        c.receive(server.broadcast(c.have))
        step(c)
    assert same(bits(client.params), bits(fresh.params))


def test_a_narrow_client_refuses_what_its_model_cannot_hold() -> None:
    server = server_of()
    with torch.no_grad():
        server.params.module.b.weight[1, 1] = 1e6
    server.begin_round()
    client = client_of(F16)
    before = bits(client.params)
    with pytest.raises(FormatError, match=r"b\.weight: expected finite values within 65504"):
        client.receive(server.broadcast())
    assert same(before, bits(client.params))
    assert client.have is None
