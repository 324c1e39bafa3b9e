"""HMAC envelopes: who sent what, to whom, in which round."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from typing import Any

import pytest

from fedmap_sparse import codec
from fedmap_sparse.errors import AuthenticationError
from fedmap_sparse.federated import FedMapServer

from .rounds import answer, bits, client_of, move, same, server_of

KEYS = {client: bytes([i]) * 32 for i, client in enumerate([0, 1, 2])}


def member(client: int | str, **options: Any) -> Any:
    return client_of(key=KEYS[client], client_id=client, **options)


def sealed_answer(server: FedMapServer, client: Any, seed: int = 0) -> bytes:
    client.receive(server.broadcast(client.have, client=client.client_id))
    move(client, seed)
    return client.update(10)


@pytest.mark.parametrize("client", [0, 7, (1 << 64) - 1, "clinic", "Übung"])
def test_the_envelope_is_what_the_document_says(client: int | str) -> None:
    key, message = secrets.token_bytes(40), b"any message"
    data = codec.seal(message, key, client, 9, "broadcast")
    name = client.to_bytes(8, "little") if isinstance(client, int) else client.encode()
    head = b"\x89FEDMAC\n" + struct.pack(
        "<HBBHHQQ", 1, 1, isinstance(client, str), len(name), 0, 9, len(message)
    )
    body = head + name + message
    assert data == body + hmac.new(key, body, hashlib.sha256).digest()
    assert codec.unseal(data, key, client, 9, "broadcast") == message


def test_anything_else_is_refused() -> None:
    key = KEYS[1]
    data = codec.seal(b"message", key, 1, 9, "update")
    for wrong in (
        (KEYS[2], 1, 9, "update"),
        (key, 2, 9, "update"),
        (key, "1", 9, "update"),
        (key, 1, 8, "update"),
        (key, 1, 9, "broadcast"),
    ):
        with pytest.raises(AuthenticationError):
            codec.unseal(data, *wrong)
    for at in range(8 * len(data)):
        bad = bytearray(data)
        bad[at // 8] ^= 1 << at % 8
        with pytest.raises(AuthenticationError):
            codec.unseal(bad, key, 1, 9, "update")
    for size in range(len(data)):
        with pytest.raises(AuthenticationError):
            codec.unseal(data[:size], key, 1, 9, "update")
    with pytest.raises(AuthenticationError):
        codec.unseal(data + b"\0", key, 1, 9, "update")


@pytest.mark.parametrize(
    ("key", "client", "at_round", "error"),
    [
        (b"short", 1, 0, ValueError),
        ("text" * 9, 1, 0, TypeError),
        (KEYS[1], -1, 0, ValueError),
        (KEYS[1], 1 << 64, 0, ValueError),
        (KEYS[1], "x" * 70_000, 0, ValueError),
        (KEYS[1], 1.5, 0, TypeError),
        (KEYS[1], 1, -1, ValueError),
        (KEYS[1], 1, 1.5, TypeError),
    ],
)
def test_seal_says_what_it_wants(key: Any, client: Any, at_round: Any, error: Any) -> None:
    with pytest.raises(error, match="expected"):
        codec.seal(b"", key, client, at_round, "update")


def test_a_round_in_envelopes_is_the_round_without() -> None:
    server, plain = server_of(keys=KEYS), server_of()
    for r in range(2):
        server.begin_round()
        plain.begin_round()
        sealed = [(i, sealed_answer(server, member(i), r + i)) for i in KEYS]
        bare = [(i, answer(plain, client_of(), r + i)) for i in KEYS]
        # The message inside is the same.
        inside = [codec.unseal(d, KEYS[i], i, r, "update") for i, d in sealed]
        assert [codec.inspect(m).survivors for m in inside] == [server.mask.nnz] * 3
        assert server.aggregate(sealed).accepted == plain.aggregate(bare).accepted
    assert same(bits(server.params), bits(plain.params))


@pytest.mark.parametrize("stream", [False, True])
def test_impostors_and_replays_are_refused_and_harm_nobody(stream: bool) -> None:
    server = server_of(keys=KEYS)
    server.begin_round()
    old = sealed_answer(server, member(0), 5)
    server.aggregate([(0, old)])
    server.begin_round()
    good = [(i, sealed_answer(server, member(i), i)) for i in (0, 1)]
    bare = bytes(codec.unseal(good[1][1], KEYS[1], 1, 1, "update"))
    bad = [(2, good[1][1]), (1, bare), (0, old), (9, good[0][1]), (2, b""), (1, None)]
    if stream:
        for client, data in [*bad, *good]:
            said = server.add(client, data)  # type: ignore[arg-type]
            assert (said is None) is ((client, data) in good)
        result = server.close_round()
    else:
        result = server.aggregate([*bad, *good])  # type: ignore[list-item]
    assert result.accepted == (0, 1)
    assert result.refused.keys() == {2, 9}


def test_a_client_with_a_key_takes_its_servers_messages_alone() -> None:
    server = server_of(keys=KEYS, lr=0.1)
    server.begin_round()
    client = member(1)
    with pytest.raises(ValueError, match="client: expected one of those with a key"):
        server.broadcast()
    bare = codec.unseal(server.broadcast(client=1), KEYS[1], 1, 0, "broadcast")
    late = codec.seal(bare, KEYS[1], 1, 7, "broadcast")
    update = codec.seal(bare, KEYS[1], 1, 0, "update")
    before = bits(client.params)
    for bad in (bytes(bare), server.broadcast(client=2), late, update, b""):
        with pytest.raises(AuthenticationError):
            client.receive(bad)
        assert same(before, bits(client.params))
        assert client.have is None
    client.receive(server.snapshot(client=1))
    client.receive(server.broadcast(client.have, client=1))
    assert server.aggregate([(1, client.update(3))]).accepted == (1,)


def test_options_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="expected both or none"):
        client_of(key=KEYS[0])
    with pytest.raises(ValueError, match="at least 32 bytes"):
        server_of(keys={0: b"k"})
