"""Differential privacy in packed space: clip, noise, what stays untouched, epsilon."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor

import fedmap_sparse as fs
from fedmap_sparse import codec
from fedmap_sparse.federated import FedMapServer, privacy, robust
from fedmap_sparse.federated.privacy import Gaussian
from fedmap_sparse.schedule import OneShot

from .rounds import answer, bits, client_of, move, same, server_of

PRUNED = OneShot(target=0.7, at=0)
needs_accounting = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="dp-accounting is not installed"
)


def vector(server: FedMapServer) -> Tensor:
    """Survivors and tail."""
    params = server.params
    return torch.cat([fs.ops.pack(params.prunable.detach(), server.mask), params.tail.detach()])


def round_of(server: FedMapServer, size: float, samples: tuple[int, ...] = (10, 20, 30)) -> None:
    server.begin_round()
    updates = []
    for i, n in enumerate(samples):
        client = client_of()
        client.receive(server.broadcast(client.have))
        move(client, i, size)
        updates.append((i, client.update(n, 0.5)))
    result = server.aggregate(updates)
    assert result.accepted == tuple(range(len(samples)))
    assert result.loss is None if server.privacy else result.loss == 0.5


def test_without_noise_it_is_the_mean_of_clipped_differences() -> None:
    server = server_of(PRUNED, privacy=Gaussian(0.05, noise=0.0))
    server.begin_round()
    start = vector(server)
    differences, updates = [], []
    for i in range(3):
        client = client_of()
        client.receive(server.broadcast())
        move(client, i, 0.01 * (i + 1))
        updates.append((i, client.update(10 * (i + 1))))
        got = torch.cat([fs.ops.pack(client.params.prunable.detach(), server.mask),
                         client.params.tail.detach()])  # fmt: skip
        difference = got.double() - start.double()
        norm = float(difference.norm())
        differences.append(difference * min(1.0, 0.05 / norm))
    server.aggregate(updates)
    expected = start.double() + sum(differences) / 3
    torch.testing.assert_close(vector(server).double(), expected, rtol=0, atol=1e-7)


def test_noise_has_the_size_that_was_asked_for_and_depends_on_seed_and_round() -> None:
    def noised(noise: float, seed: int) -> list[Tensor]:
        server = server_of(PRUNED, privacy=Gaussian(0.5, noise, seed))
        found = []
        for _ in range(2):
            round_of(server, 1e-9)
            found.append(vector(server))
        return found

    plain, one, again, other = noised(0, 1), noised(2, 1), noised(2, 1), noised(2, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    first, second = (a - b for a, b in zip(one, plain))
    assert not torch.equal(one[0], other[0])
    size = 2 * 0.5 / 3
    moved = first[first != 0]
    assert float(moved.std()) == pytest.approx(size, rel=0.2)
    assert not torch.equal(second - first, first)


def test_what_is_pruned_and_what_is_padding_stays_plus_zero() -> None:
    server = server_of(PRUNED, privacy=Gaussian(0.5, noise=5.0, seed=3))
    for _ in range(3):
        round_of(server, 0.01)
        for values in (server.params.prunable[(~server.mask).to_bool()], gaps(server)):
            assert values.numel()
            assert not bool(values.contiguous().view(torch.int32).any())


def gaps(server: FedMapServer) -> Tensor:
    layout = server.layout
    inside = torch.zeros(layout.numel, dtype=torch.bool)
    for e in layout.entries:
        inside[e.offset : e.offset + e.numel] = True
    return server.params.values[~inside]


def test_buffers_stay_as_they_were() -> None:
    server = server_of(PRUNED, privacy=Gaussian(0.5, noise=1.0, seed=3))
    before = {name: b.clone() for name, b in server.params.buffers.items()}
    round_of(server, 0.01)
    assert all(torch.equal(before[name], b) for name, b in server.params.buffers.items())


def test_a_stream_gives_the_same_bits() -> None:
    servers = [server_of(PRUNED, privacy=Gaussian(0.05, 1.0, seed=9)) for _ in range(2)]
    for server in servers:
        server.begin_round()
    updates = [(i, answer(servers[0], client_of(), i)) for i in range(4)]
    servers[0].aggregate(updates)
    for client, data in updates:
        assert servers[1].add(client, data) is None
    servers[1].close_round()
    assert same(bits(servers[0].params), bits(servers[1].params))


def test_the_local_form_clips_and_noises_one_update() -> None:
    server = server_of(PRUNED)
    server.begin_round()
    client = client_of()
    message = client.receive(server.broadcast())
    start = client.update_array()
    move(client, 1, 1.0)
    norm = Gaussian(0.1, noise=0.0).privatize_(client.params, message)
    sent = client.update_array()
    end = message.mask.nnz + message.tail.numel()
    assert norm > 1
    assert float((sent[:end] - start[:end]).norm()) == pytest.approx(0.1, rel=1e-4)
    arrays = []
    for which in (0, 1):
        other = client_of()
        message = other.receive(server.broadcast())
        Gaussian(0.1, noise=3.0, seed=5).privatize_(other.params, message, which)
        arrays.append(other.update_array()[:end] - start[:end])
        assert not bool(other.params.prunable[(~message.mask).to_bool()].any())
        codec.decode(other.update(1), other.layout, mask=message.mask, base=message)
    moved = arrays[0][arrays[0] != 0]
    assert float(moved.std()) == pytest.approx(0.3, rel=0.2)
    assert not torch.equal(*arrays)


def test_bad_input_is_named() -> None:
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="max_norm: expected a finite number above 0"):
            Gaussian(bad, 1.0)
    with pytest.raises(ValueError, match="noise: expected a finite number of at least 0"):
        Gaussian(1.0, -1.0)
    with pytest.raises(ValueError, match="seed: expected 0 <= seed < 2"):
        Gaussian(1.0, 1.0, seed=-1)
    with pytest.raises(ValueError, match="privacy: expected no aggregator beside it"):
        server_of(privacy=Gaussian(1.0, 1.0), aggregator=robust.Median())
    assert "seed" not in repr(Gaussian(1.0, 1.0))
    assert Gaussian(1.0, 1.0).seed != Gaussian(1.0, 1.0).seed


def test_epsilon_refuses_what_cannot_be() -> None:
    for how in ({"noise": -1.0}, {"delta": 0.0}, {"delta": 1.0}, {"rounds": -1}):
        given = {"noise": 1.0, "rounds": 1, "delta": 1e-5, "clients": 10, **how}
        with pytest.raises(ValueError, match="expected noise"):
            privacy.epsilon(given.pop("noise"), given.pop("rounds"), **given)
    with pytest.raises(ValueError, match="cohort: expected 1 to 10 clients, got 11"):
        privacy.epsilon(1.0, 1, delta=1e-5, clients=10, cohort=11)
    assert privacy.epsilon(1.0, 0, delta=1e-5, clients=10) == 0.0
    assert privacy.epsilon(0.0, 1, delta=1e-5, clients=10) == math.inf


@needs_accounting
def test_epsilon_of_one_gaussian_is_near_the_exact_one() -> None:
    """Balle and Wang 2018: delta of a Gaussian with sensitivity 1 and standard deviation s."""
    from scipy.stats import norm

    for noise in (2.0, 8.0):
        found = privacy.epsilon(noise, 1, delta=1e-5, clients=10)
        s = noise / 2
        exact = norm.cdf(0.5 / s - found * s) - math.exp(found) * norm.cdf(-0.5 / s - found * s)
        assert exact <= 1e-5
        less = 0.7 * found
        assert norm.cdf(0.5 / s - less * s) - math.exp(less) * norm.cdf(-0.5 / s - less * s) > 1e-5


@needs_accounting
def test_epsilon_grows_with_rounds_and_shrinks_with_noise_and_sampling() -> None:
    def found(
        noise: float = 4.0, rounds: int = 10, cohort: int = 100, local: bool = False
    ) -> float:
        return privacy.epsilon(noise, rounds, delta=1e-6, clients=1000, cohort=cohort, local=local)

    assert found(rounds=20) > found() > found(noise=8.0)
    assert found(cohort=1000) > found()
    assert found(local=True) == found(cohort=1000)
