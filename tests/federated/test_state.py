"""State of servers and clients: it travels as bytes, and what comes from outside is checked."""

from __future__ import annotations

import copy
import hashlib
import pickle
import struct
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmap_sparse.errors import StateError
from fedmap_sparse.federated import FedMapServer
from fedmap_sparse.federated.server_optim import FedAdam
from fedmap_sparse.schedule import Iterative, OneShot

from .rounds import answer, bits, client_of, same, server_of, sgd


def test_a_state_without_an_optimizer_gives_a_client_without_one() -> None:
    server = server_of(lr=0.1)
    client = client_of(optimizer=sgd, keep_optimizer=True, dtype="int8")
    fresh = client.state_dict()
    server.begin_round()
    client.receive(server.broadcast())
    client.params.module.a(torch.ones(2, 12)).sum().backward()
    assert client.optimizer is not None
    client.optimizer.step()
    server.aggregate([(0, client.update(3))])
    client.load_state_dict(fresh)
    assert client.optimizer is None
    assert client.have is None
    assert client.state_dict()["residual"] is None
    with pytest.raises(RuntimeError, match="of a broadcast"):
        client.update(3)
    server.begin_round()
    client.receive(server.broadcast(client.have))
    assert not any(t.any() for t in _packed_state(client.optimizer))


def _packed_state(optimizer: Any) -> list[Tensor]:
    found = [t for state in optimizer.state.values() for t in state.values()]
    return [t for t in found if isinstance(t, Tensor) and t.numel() > 1]


def test_server_and_client_travel_as_bytes_and_go_on_with_the_same_bits() -> None:
    def make() -> tuple[FedMapServer, Any]:
        options = {"optimizer": sgd, "keep_optimizer": True, "dtype": "int8"}
        server = server_of(Iterative(0.7, 0, 4), lr=0.1, server_optimizer=FedAdam())
        return server, client_of(**options)

    def play(server: FedMapServer, client: Any, rounds: range) -> None:
        for r in rounds:
            server.begin_round()
            client.receive(server.broadcast(client.have))
            torch.manual_seed(r)
            client.optimizer.zero_grad()
            client.params.module.a(torch.randn(4, 12)).square().sum().backward()
            client.optimizer.step()
            server.aggregate([(0, client.update(3))])

    whole, half, resumed = make(), make(), make()
    play(*whole, range(6))
    play(*half, range(3))
    resumed[0].from_bytes(half[0].to_bytes())
    resumed[1].from_bytes(half[1].to_bytes())
    play(*resumed, range(3, 6))
    assert same(bits(whole[0].params), bits(resumed[0].params))
    assert whole[0].mask == resumed[0].mask


def test_a_servers_lock_is_made_anew_in_a_copy() -> None:
    lock = server_of()._lock
    for again in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
        with lock, again:
            assert again is not lock


def spoil(state: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    return {**state, name: value(state[name]) if callable(value) else value}


def nan(t: Tensor) -> Tensor:
    out = t.clone()
    out[0] = float("nan")
    return out


SERVER_STATES = {
    "round below 0": ("round", -1),
    "round that is a float": ("round", 1.0),
    "round that is True": ("round", True),
    "a round after which none can follow": ("round", 2**53),
    "layout": ("layout", "00" * 16),
    "NaN in values": ("values", nan),
    "float64 values": ("values", lambda t: t.double()),
    "values too short": ("values", lambda t: t[1:]),
    "values as a list": ("values", lambda t: t.tolist()),
    "infinity in the tail": ("tail", lambda t: t + float("inf")),
    "zeroed prune epochs": ("pruned_at", torch.zeros_like),
    "prune epochs beyond": ("pruned_at", lambda t: (t > 0).to(torch.uint8) * 9),
    "prune epochs of survivors": ("pruned_at", lambda t: torch.ones_like(t)),
    "shortened digests": ("digests", lambda d: d[1:]),
    "one digest alone": ("digests", lambda d: d[-1:]),
    "digests cut short": ("digests", lambda d: [x[:8] for x in d]),
    "digests that are no text": ("digests", lambda d: [1, 2, 3]),
    "another mask": ("mask", lambda w: w ^ 1),
    "a mask of another type": ("mask", lambda w: w.float()),
    "negative second moments": ("optimizer", lambda o: {**o, "second": o["second"] - 1}),
    "optimizer without a part": ("optimizer", lambda o: {"first": o["first"]}),
    "NaN in a buffer": ("buffers", lambda b: {**b, "mean": nan(b["mean"])}),
    "a buffer missing": ("buffers", lambda b: {"mean": b["mean"]}),
    "samples of 0": ("samples", 0),
    "samples beyond": ("samples", 2**53 + 1),
    "values without memory": ("values", lambda t: t.to("meta")),
    "sparse values": ("values", lambda t: t.to_sparse()),
    "epochs without memory": ("pruned_at", lambda t: t.to("meta")),
    "a mask without memory": ("mask", lambda t: t.to("meta")),
    "a buffer without memory": ("buffers", lambda b: {**b, "mean": b["mean"].to("meta")}),
    "a sparse buffer": ("buffers", lambda b: {**b, "mean": b["mean"].to_sparse()}),
    "a complex integer": ("buffers", lambda b: {**b, "steps": torch.tensor(0j)}),
    "a buffer of another kind": ("buffers", lambda b: {**b, "steps": b["steps"].to(torch.uint64)}),
    "optimizer with a number as name": ("optimizer", lambda o: {**o, 1: o["first"]}),
    "no state": ("values", None),
}


@pytest.mark.parametrize("case", SERVER_STATES)
def test_a_servers_state_from_outside_is_checked(case: str) -> None:
    server = server_of(Iterative(0.7, 0, 1), server_optimizer=FedAdam())
    for r in range(2):
        server.begin_round()
        server.aggregate([(0, answer(server, client_of(), r))])
    name, value = SERVER_STATES[case]
    before, state = bits(server.params), server.state_dict()
    bad = spoil(state, name, value)
    # Digests and epochs are compared with each other: either may be named.
    named = "digest|pruned_at" if name in ("digests", "pruned_at") else name
    with pytest.raises(StateError, match=named):
        server.load_state_dict(bad)
    assert same(before, bits(server.params))
    missing = {k: v for k, v in state.items() if k != name}
    if name != "samples":
        with pytest.raises(StateError, match=name):
            server.load_state_dict(missing)
    server.load_state_dict(state)
    assert same(before, bits(server.params))


def momentum(change: Any) -> Any:
    """A change of every momentum in an optimizer's state."""

    def changed(saved: dict[str, Any]) -> dict[str, Any]:
        own = {
            n: {**one, **{k: change(t) for k, t in one.items() if k == "momentum_buffer"}}
            for n, one in saved["state"].items()
        }
        return {**saved, "state": own}

    return changed


def group(**options: Any) -> Any:
    return lambda o: {**o, "param_groups": [{**o["param_groups"][0], **options}]}


def fewer(saved: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer whose mask keeps nothing."""
    none = {
        n: {**one, "mask": torch.zeros_like(one["mask"]), "momentum_buffer": torch.zeros(0)}
        if "mask" in one
        else one
        for n, one in saved["state"].items()
    }
    return {**saved, "state": none}


CLIENT_STATES = {
    "a mask of another size": ("mask", lambda w: w[1:]),
    "padding in the mask": ("mask", lambda w: torch.full_like(w, -1)),
    "a residual of another size": ("residual", lambda t: t[1:]),
    "NaN in the residual": ("residual", nan),
    "a round that is text": ("round", "3"),
    "an optimizer of nothing": ("optimizer", {}),
    "an optimizer with other groups": ("optimizer", lambda o: {**o, "param_groups": []}),
    "a momentum of NaN": ("optimizer", momentum(lambda t: t * float("nan"))),
    "an infinite momentum": ("optimizer", momentum(lambda t: t + float("inf"))),
    "a momentum beyond float32": ("optimizer", momentum(lambda t: t.double() + 1e300)),
    "a momentum without memory": ("optimizer", momentum(lambda t: t.to("meta"))),
    "a complex momentum": ("optimizer", momentum(lambda t: t.to(torch.complex64))),
    "a momentum as a list": ("optimizer", momentum(lambda t: t.tolist())),
    "a learning rate of 400 digits": ("optimizer", group(lr=10**400)),
    "a learning rate of NaN": ("optimizer", group(lr=float("nan"))),
    "a momentum's factor below 0": ("optimizer", group(momentum=-1.0)),
    "a momentum's factor of text": ("optimizer", group(momentum="much")),
    "an infinite decay": ("optimizer", group(weight_decay=float("inf"))),
    "a flag of text": ("optimizer", group(nesterov="x")),
    "an optimizer under another mask": ("optimizer", fewer),
    "a mask without memory": ("mask", lambda w: w.to("meta")),
    "a residual without memory": ("residual", lambda t: t.to("meta")),
    "an unspent error of nothing": ("unspent", {}),
    "an unspent error of a list": ("unspent", [1]),
}


@pytest.mark.parametrize("case", CLIENT_STATES)
def test_a_clients_state_from_outside_is_checked(case: str) -> None:
    server = server_of(OneShot(0.5, 0), lr=0.1)
    client = client_of(optimizer=sgd, keep_optimizer=True, dtype="int8")
    server.begin_round()
    client.receive(server.broadcast())
    client.params.module.a(torch.ones(2, 12)).sum().backward()
    assert client.optimizer is not None
    client.optimizer.step()
    client.update(3)
    name, value = CLIENT_STATES[case]
    state, optimizer, have = client.state_dict(), client.optimizer, client.have
    with pytest.raises(StateError, match=r"unspent|round" if name == "unspent" else name):
        client.load_state_dict(spoil(state, name, value))
    assert client.optimizer is optimizer
    assert client.have == have
    client.load_state_dict(state)


@pytest.mark.parametrize("state", [None, [], "text", 5, {}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    for owner in (server_of(), client_of()):
        with pytest.raises(StateError):
            owner.load_state_dict(state)


def test_state_bytes_are_refused_when_damaged() -> None:
    server = server_of()
    data = server.to_bytes()
    for at in range(0, len(data), 17):
        bad = bytearray(data)
        bad[at] ^= 0x10
        with pytest.raises(StateError):
            server.from_bytes(bad)
    for size in (0, 3, 63, len(data) - 1):
        with pytest.raises(StateError):
            server.from_bytes(data[:size])
    size = int.from_bytes(data[16:24], "little")
    for rest, text, says in (
        (b'{"round":7,"round":0}', 21, "a name that stands twice"),
        (b'{"round":NaN}', 13, "NaN, which is no JSON"),
        (data[70:] + b"x", size, "1 bytes after the last tensor"),
        (b"[" * 5000, 5000, "recursion"),
    ):
        head = data[:16] + struct.pack("<QQ", text, 70 + len(rest))
        digest = hashlib.blake2b(head + b"server" + rest, digest_size=32).digest()
        with pytest.raises(StateError, match=says):
            server.from_bytes(head + digest + b"server" + rest)
    with pytest.raises(StateError, match="one of a server, got one of a 'client'"):
        server.from_bytes(client_of().to_bytes())
    server.from_bytes(data)
