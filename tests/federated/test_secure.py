"""Secure aggregation over fixed-point vectors: masks, a client that drops out, the mean, the bytes.

The protocol here is SecAgg+'s (Bell et al. 2020) in small: pairwise masks, a mask of each client's
own, and Shamir's shares of what unmasks them. Who is honest but curious sees nothing else.
"""

from __future__ import annotations

import hashlib
import random

import pytest
import torch
from torch import Tensor

import fedmap_sparse as fs
from fedmap_sparse import codec
from fedmap_sparse.codec import Message
from fedmap_sparse.errors import FormatError
from fedmap_sparse.experiments import models
from fedmap_sparse.federated import FedMapClient
from fedmap_sparse.federated.secure import FixedPoint
from fedmap_sparse.schedule import OneShot

from .rounds import client_of, move, server_of

PRIME = 2**521 - 1  # of Shamir's shares, and of a toy key agreement
BASE = 3


def masked(seed: int, numel: int) -> Tensor:
    """int32 of the whole range, from 256 bits."""
    data = hashlib.shake_256(seed.to_bytes(66, "little")).digest(4 * numel)
    return torch.frombuffer(bytearray(data), dtype=torch.int32)


def shares(secret: int, count: int, threshold: int, rng: random.Random) -> list[tuple[int, int]]:
    terms = [secret, *(rng.randrange(PRIME) for _ in range(threshold - 1))]
    return [
        (x, sum(t * pow(x, i, PRIME) for i, t in enumerate(terms)) % PRIME)
        for x in range(1, count + 1)
    ]


def combined(points: list[tuple[int, int]]) -> int:
    total = 0
    for x, y in points:
        for other, _ in points:
            if other != x:
                y = y * other * pow(other - x, -1, PRIME) % PRIME
        total += y
    return total % PRIME


class Party:
    """A client of the protocol."""

    def __init__(self, place: int, count: int, threshold: int) -> None:
        rng = random.Random(place)
        self.place, self._secret, self._own = place, rng.randrange(PRIME), rng.randrange(2**256)
        self.public = pow(BASE, self._secret, PRIME)
        self.shares_of_own = shares(self._own, count, threshold, rng)
        self.shares_of_secret = shares(self._secret, count, threshold, rng)

    def mask(self, vector: Tensor, publics: list[int]) -> Tensor:
        total = vector + masked(self._own, len(vector))
        for other, public in enumerate(publics):
            if other != self.place:
                pair = masked(pow(public, self._secret, PRIME), len(vector))
                total = total + pair if self.place < other else total - pair
        return total


def secure_sum(vectors: list[Tensor], dropped: set[int], threshold: int) -> Tensor:
    """What a server learns of vectors of which some were never sent, after keys were exchanged."""
    count, numel = len(vectors), len(vectors[0])
    parties = [Party(i, count, threshold) for i in range(count)]
    publics = [p.public for p in parties]
    alive = [p for p in parties if p.place not in dropped]
    total = torch.zeros(numel, dtype=torch.int32)
    for party in alive:
        sent = party.mask(vectors[party.place], publics)
        assert not torch.equal(sent, vectors[party.place])
        total = total + sent
    helpers = [p.place for p in alive[:threshold]]
    for party in alive:
        own = combined([party.shares_of_own[h] for h in helpers])
        total = total - masked(own, numel)
    for place in dropped:
        secret = combined([parties[place].shares_of_secret[h] for h in helpers])
        for party in alive:
            pair = masked(pow(party.public, secret, PRIME), numel)
            total = total - pair if party.place < place else total + pair
    return total


def trained(server: fs.FedMapServer, count: int) -> list[tuple[FedMapClient, Message]]:
    found = []
    for i in range(count):
        client = client_of()
        message = client.receive(server.broadcast(client.have))
        move(client, i)
        found.append((client, message))
    return found


@pytest.mark.parametrize("dropped", [set(), {1}])
def test_the_mean_is_the_plain_one_within_half_a_step(dropped: set[int]) -> None:
    fixed = FixedPoint(clip=2.0, total=5)
    server = server_of(OneShot(target=0.7, at=0), record=fixed.record())
    server.begin_round()
    clients = trained(server, 5)
    vectors = [FixedPoint.of(m.meta).encode(c.update_array(), m) for c, m in clients]
    assert [cut for _, cut in vectors] == [0] * 5
    total = secure_sum([v for v, _ in vectors], dropped, threshold=3)
    left = [i for i in range(5) if i not in dropped]
    received = codec.decode(server.broadcast(), server.layout)
    mean = fixed.decode(total, received, weights=len(left))
    plain = sum(clients[i][0].update_array().double() for i in left) / len(left)
    half_a_step = 0.5 / fixed.scale
    assert float((mean.double() - plain).abs().max()) <= half_a_step + 2.0**-23
    result = server.apply_mean(mean, num_samples=len(left), clients=left)
    assert result.accepted == tuple(left)
    pruned = server.params.prunable[(~server.mask).to_bool()]
    assert not bool(pruned.view(torch.int32).any())  # +0.0, all of them


def test_a_sum_that_lacks_a_mask_is_no_mean() -> None:
    """What the test above would say if unmasking did nothing."""
    vectors = [torch.full((50,), i, dtype=torch.int32) for i in range(4)]
    expected = torch.full((50,), 6, dtype=torch.int32)
    assert torch.equal(secure_sum(vectors, set(), 3), expected)
    assert torch.equal(secure_sum(vectors, {3}, 3), expected - 3)
    party = Party(0, 4, 3)
    assert not torch.equal(masked(party.shares_of_own[0][1], 50), masked(party._own, 50))


def test_weights_count() -> None:
    fixed = FixedPoint(clip=2.0, total=100)
    server = server_of(record=fixed.record())
    server.begin_round()
    clients = trained(server, 2)
    weights = [7, 90]
    total = sum(fixed.encode(c.update_array(), m, w)[0] for (c, m), w in zip(clients, weights))
    mean = fixed.decode(total, clients[0][1], weights=97)
    plain = sum(w * c.update_array().double() for (c, _), w in zip(clients, weights)) / 97
    assert float((mean.double() - plain).abs().max()) <= 0.5 / fixed.scale + 2.0**-23


def test_bytes_beside_dense_and_beside_the_coded_update(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Dense SecAgg+ has an int32 for every weight; ours for survivors; a coded update is for all to
    see."""
    torch.manual_seed(0)
    module = models.build("mlp", (1, 8, 8), 10)
    server = fs.FedMapServer(fs.flatten(module), OneShot(target=0.9, at=0))
    client = FedMapClient(fs.flatten(models.build("mlp", (1, 8, 8), 10)))
    server.begin_round()
    message = client.receive(server.broadcast())
    vector, _ = FixedPoint(1.0, 10).encode(client.update_array(), message)
    dense = 4 * sum(p.numel() for p in module.parameters())
    coded = len(client.update(10))
    with capsys.disabled():
        print(f"\n  SecAgg+ dense {dense} B, packed {vector.nbytes} B; coded update {coded} B")
    assert vector.nbytes < 0.12 * dense
    assert coded < vector.nbytes + 500


def test_bad_input_is_named() -> None:
    fixed = FixedPoint(clip=1.0, total=4)
    server = server_of(record=fixed.record())
    server.begin_round()
    ((client, message),) = trained(server, 1)
    array = client.update_array()
    with pytest.raises(ValueError, match="vector: expected shape"):
        fixed.encode(array[:-1], message)
    with pytest.raises(ValueError, match="weight: expected 1 to total=4, got 5"):
        fixed.encode(array, message, weight=5)
    with pytest.raises(ValueError, match="weights: expected 1 to total=4, got 0"):
        fixed.decode(torch.zeros(len(array), dtype=torch.int32), message, weights=0)
    with pytest.raises(FormatError, match="record: expected fixed_clip and fixed_total"):
        FixedPoint.of({"fixed_clip": 1.0})
    with pytest.raises(FormatError, match="clip: expected a finite number above 0"):
        FixedPoint.of({"fixed_clip": 0.0, "fixed_total": 3})
    with pytest.raises(ValueError, match="clip"):
        FixedPoint(float("inf"), 3)
    with pytest.raises(ValueError, match="total"):
        FixedPoint(1.0, 0)
    with pytest.raises(ValueError, match="record: expected other names"):
        server_of(record={"lr": 1.0})
