"""Robust aggregators beside plain references, and what they hold off."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.errors import RoundFailed
from fedmap_sparse.federated import robust
from fedmap_sparse.federated.arrays import array_sections
from fedmap_sparse.schedule import OneShot

from .rounds import answer, client_of, server_of

COUNTS = [1, 2, 3, 4, 5, 8, 10, 11, 16, 23]


def vectors(count: int, size: int = 70_001, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=g)
    made = [start + 0.1 * torch.randn(size, generator=g) for _ in range(count)]
    for v in made:  # ties
        v[:100] = v[:100].round()
    return made, start


def numpy_of(made: list[Tensor]) -> Any:
    return np.stack([v.numpy() for v in made]).astype(np.float64)


@pytest.mark.parametrize("count", COUNTS)
def test_median_is_numpys(count: int) -> None:
    made, start = vectors(count)
    got = robust.Median()(made, [1] * count, start)
    wanted = np.median(numpy_of(made), axis=0).astype(np.float32)
    assert np.array_equal(got.numpy(), wanted)


@pytest.mark.parametrize("count", [c for c in COUNTS if c >= 3])
@pytest.mark.parametrize("trim", [0, 1, 0.25])
def test_trimmed_mean_is_numpys(count: int, trim: float) -> None:
    made, start = vectors(count)
    got = robust.TrimmedMean(trim)(made, [1] * count, start)
    cut = int(trim * count) if isinstance(trim, float) else trim
    kept = np.sort(numpy_of(made), axis=0)[cut : count - cut]
    total = np.zeros(kept.shape[1])
    for row in kept:
        total += row
    assert np.array_equal(got.numpy(), (total / len(kept)).astype(np.float32))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_norm_bound_cuts_to_a_multiple_of_the_median_norm(count: int) -> None:
    made, start = vectors(count)
    made[0] = start + 50 * (made[0] - start)
    weights = list(range(1, count + 1))
    got = robust.NormBound(times=1.5)(made, weights, start)
    deltas = numpy_of(made) - start.double().numpy()
    norms = np.linalg.norm(deltas, axis=1)
    bound = 1.5 * np.sort(norms)[(count - 1) // 2]
    factors = np.minimum(1, bound / norms) * np.array(weights) / sum(weights)
    wanted = start.double().numpy() + factors @ deltas
    np.testing.assert_allclose(got.double().numpy(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_clipped_mean_cuts_to_a_norm(count: int) -> None:
    made, start = vectors(count)
    made[0] = start + 50 * (made[0] - start)
    weights = list(range(1, count + 1))
    kept = [v.clone() for v in made]
    deltas = numpy_of(made) - start.double().numpy()
    norms = np.linalg.norm(deltas, axis=1)
    for bound in (float(norms.min()) / 2, float(norms.max()) / 2, 1e9):
        got = robust.ClippedMean(bound)(made, weights, start)
        factors = np.minimum(1, bound / norms) * np.array(weights) / sum(weights)
        wanted = start.double().numpy() + factors @ deltas
        np.testing.assert_allclose(got.double().numpy(), wanted, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(made, kept))


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_keeps_no_vector_for_the_clipped_mean(stream: bool) -> None:
    rule = robust.ClippedMean(0.05)
    server = server_of(OneShot(0.5, 0), aggregator=rule)
    server.begin_round()
    held: list[Tensor] = []
    updates = []
    for i in range(5):
        client = client_of()
        updates.append((i, answer(server, client, i)))
        held.append(client.update_array())
    first = client_of()
    first.receive(server.broadcast())
    start = first.update_array()
    expected = rule(held, [10] * 5, start)
    if stream:
        for client_id, data in updates:
            assert server.add(client_id, data, weight=10) is None
            assert server._open is not None
            assert server._open.aggregation is not None
            assert not server._open.aggregation._vectors
        server.close_round()
    else:
        server.aggregate(updates, weights=dict.fromkeys(range(5), 10))
    parts = {s.name: expected[s.start : s.stop] for s in array_sections(server.layout, server.mask)}
    found = ops.pack(server.params.prunable.detach(), server.mask)
    assert torch.equal(found, parts["survivors"])
    assert torch.equal(server.params.tail.detach(), parts["tail"])
    assert torch.equal(server.params.module.mean, parts["mean"])
    assert float((expected - start).norm()) < 0.05 < float((held[0] - start).norm())


def test_geometric_median_has_the_least_sum_of_distances() -> None:
    made, start = vectors(9, 500)
    made[0] = start + 1000
    got = robust.GeometricMedian(steps=50)(made, [1] * 9, start)

    def cost(point: Tensor) -> float:
        return sum(float((point.double() - v.double()).norm()) for v in made)

    g = torch.Generator().manual_seed(1)
    assert cost(got) < cost(torch.stack(made).mean(0))
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(5):
            assert cost(got) <= cost(got + size * torch.randn(500, generator=g)) + 1e-6
    same = [start.clone() for _ in range(4)]
    assert torch.equal(robust.GeometricMedian()(same, [1] * 4, start), start)


def test_multi_krum_averages_those_with_the_nearest_neighbours() -> None:
    made, start = vectors(7, 300)
    made[2] = start + 5
    made[5] = start - 7
    got = robust.MultiKrum(hostile=2)(made, [1] * 7, start)
    x = numpy_of(made)
    d = ((x[:, None] - x[None]) ** 2).sum(-1)
    scores = [np.sort(np.delete(d[i], i))[: 7 - 2 - 2].sum() for i in range(7)]
    chosen = sorted(np.argsort(scores, kind="stable")[:5])
    assert set(chosen) == {0, 1, 3, 4, 6}
    np.testing.assert_allclose(got.numpy(), x[chosen].mean(0), rtol=1e-5, atol=1e-6)
    one = robust.MultiKrum(hostile=2, keep=1)(made, [1] * 7, start)
    np.testing.assert_allclose(one.numpy(), x[int(np.argmin(scores))], rtol=1e-6, atol=1e-6)


ALL = {
    "clipped": robust.ClippedMean(2.0),
    "norm": robust.NormBound(),
    "median": robust.Median(),
    "trimmed": robust.TrimmedMean(2),
    "geometric": robust.GeometricMedian(),
    "krum": robust.MultiKrum(hostile=2),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("stream", [False, True])
def test_two_of_ten_hostile_clients_do_not_own_a_pruned_round(name: str, stream: bool) -> None:
    honest, attacked = (
        server_of(OneShot(0.5, 0), aggregator=ALL[name], min_updates=5) for _ in range(2)
    )
    for server, hostile in ((honest, 0), (attacked, 2)):
        server.begin_round()
        before = server.params.values.clone()
        updates = []
        for i in range(10):
            client = client_of()
            data = answer(server, client, i)
            if i < hostile:
                with torch.no_grad():
                    client.params.values.sub_(1000 * torch.sign(client.params.values))
                    client.params.zero_pruned()
                data = client.update(10)
            updates.append((i, data))
        if stream:
            for client_id, data in updates:
                assert server.add(client_id, data) is None
            result = server.close_round()
        else:
            result = server.aggregate(updates)
        assert len(result.accepted) == 10
        pruned = ~server.mask.to_bool()
        assert not server.params.prunable[pruned].view(torch.int32).any()
        assert float((server.params.values - before).abs().max()) < 0.2
        assert server.params.module.causal[0, 1] == -math.inf
        # The norm bound cuts a hostile client's whole difference, its buffers' too.
        assert server.params.module.mean.tolist() == pytest.approx([1.0] * 3, abs=0.21)


def test_too_few_clients_fail_the_round_and_change_nothing() -> None:
    server = server_of(aggregator=robust.MultiKrum(hostile=1))
    server.begin_round()
    updates = [(i, answer(server, client_of(), i)) for i in range(4)]
    with pytest.raises(RoundFailed, match="at least 5 usable updates, got 4"):
        server.aggregate(updates)
    assert server.round == 0
    for rule in ALL.values():
        if rule.least > 1:
            with pytest.raises(ValueError, match=f"at least {rule.least} clients"):
                rule([torch.zeros(2)], [1], torch.zeros(2))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: robust.NormBound(times=0), "times"),
        (lambda: robust.ClippedMean(math.nan), "norm"),
        (lambda: robust.ClippedMean(0.0), "norm"),
        (lambda: robust.TrimmedMean(0.5), "trim"),
        (lambda: robust.TrimmedMean(-1), "trim"),
        (lambda: robust.GeometricMedian(steps=0), "steps"),
        (lambda: robust.GeometricMedian(smoothing=0), "smoothing"),
        (lambda: robust.MultiKrum(hostile=-1), "hostile"),
        (lambda: robust.MultiKrum(keep=0), "keep"),
    ],
)
def test_options_that_cannot_be(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"{says}: expected"):
        make()
