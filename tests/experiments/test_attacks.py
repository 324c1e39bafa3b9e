"""Hostile clients and noise in experiments: what is sent, what the run says, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_runs import StopAfter, quick, records, same_results

import fedmap_sparse as fs
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import attacks, hardening
from fedmap_sparse.experiments.attacks import Attack, flipped, hostile_clients
from fedmap_sparse.experiments.config import build
from fedmap_sparse.experiments.data import Split
from fedmap_sparse.experiments.runner import run
from fedmap_sparse.federated import FedMapClient, FedMapServer, privacy, robust
from fedmap_sparse.schedule import OneShot


def sent(kind: str, *, honest: int = 3, hostile: int = 1, seed: int = 0) -> list[torch.Tensor]:
    """What each client has after its training, less the broadcast; the hostile ones last."""
    torch.manual_seed(1)
    module = torch.nn.Linear(30, 7)
    server = FedMapServer(fs.flatten(module), OneShot(target=0.5, at=0))
    server.begin_round()

    def train(name: Any, client: FedMapClient, message: Any) -> tuple[int, float | None]:
        g = torch.Generator().manual_seed(int(name))
        with torch.no_grad():
            for p in client.params.parameters:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
        client.params.zero_pruned()
        return 10, 1.0

    count = honest + hostile
    attack = Attack(kind, hostile_clients(count, hostile), train, seed)
    found = []
    for name in range(count):
        client = FedMapClient(fs.flatten(torch.nn.Linear(30, 7)))
        message = client.receive(server.broadcast())
        start = client.update_array()
        assert attack(name, client, message) == (10, 1.0)
        assert server.add(name, client.update(10)) is None
        found.append(client.update_array() - start)
        assert not bool(client.params.prunable[(~message.mask).to_bool()].any())
    server.close_round()
    return found


def test_attacks_do_what_they_say() -> None:
    honest = sent("labels")
    *others, last = honest
    for kind in attacks.ATTACKS:
        assert all(torch.equal(a, b) for a, b in zip(sent(kind)[:-1], others))
    torch.testing.assert_close(sent("sign")[-1], -10 * last, rtol=1e-4, atol=1e-5)
    noise = sent("noise")[-1]
    assert float(noise.norm()) == pytest.approx(100 * float(last.norm()), rel=0.3)
    assert torch.equal(noise, sent("noise")[-1])
    assert not torch.equal(noise, sent("noise", seed=1)[-1])
    stacked = torch.stack(others)
    little = stacked.mean(0) - 1.5 * stacked.std(0, correction=0)
    torch.testing.assert_close(sent("little")[-1], little, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sent("copy")[-1], others[0], rtol=0, atol=1e-7)
    assert float(sent("constant")[-1].max()) > 0.5


def test_attackers_without_honest_clients_before_them_send_their_own() -> None:
    alone = sent("labels", honest=0)
    for kind in ("little", "copy"):
        torch.testing.assert_close(sent(kind, honest=0)[0], alone[0], rtol=0, atol=1e-6)


def test_labels_are_flipped_for_the_hostile_alone() -> None:
    split = Split(torch.zeros(3, 1, 2, 2), torch.tensor([0, 4, 9]))
    found = flipped({0: split, 1: split}, frozenset({1}), classes=10)
    assert found[0].labels.tolist() == [0, 4, 9]
    assert found[1].labels.tolist() == [9, 5, 0]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"aggregator": "krum", "clients": 4}, "aggregator: krum needs a cohort of at least 5"),
        ({"aggregator": "trimmed", "hostile": 5}, "at least 11 clients, got 10"),
        ({"hostile": 1}, "hostile: goes with aggregator=trimmed or krum"),
        ({"norm_times": 2.0}, "norm_times: goes with aggregator=norm"),
        ({"aggregator": "norm", "norm_times": 2.0, "max_norm": 1.0}, "norm_times: expected it or"),
        ({"aggregator": "median", "max_norm": 1.0}, "max_norm: goes with aggregator=mean or norm"),
        ({"dp_noise": 1.0}, "dp_noise: expected max_norm beside it"),
        ({"dp_noise": 1.0, "max_norm": 1.0, "aggregator": "norm"}, "goes with aggregator=mean"),
        ({"dp_noise": -1.0}, "dp_noise: expected at least 0"),
        ({"dp_delta": 1.0}, "dp_delta: expected above 0 and below 1"),
        ({"dp_where": "server"}, "dp_where: expected one of central, local"),
        ({"attack": "signs"}, "did you mean sign"),
        ({"attackers": 2}, "attackers: goes with attack="),
        ({"attack": "sign", "attackers": 10}, "attackers: expected fewer than clients=10"),
        ({"aggregator": "average"}, "aggregator: expected one of mean, norm"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        build(options)


def test_options_make_their_rules() -> None:
    assert build({}).make_aggregator() is None
    assert build({"max_norm": 0.5}).make_aggregator() == robust.ClippedMean(0.5)
    assert build({"aggregator": "norm"}).make_aggregator() == robust.NormBound(times=2.0)
    assert build({"aggregator": "trimmed"}).make_aggregator() == robust.TrimmedMean(2)
    assert build({"aggregator": "krum", "hostile": 3}).make_aggregator() == robust.MultiKrum(3)
    assert build({"aggregator": "median"}).make_aggregator() == robust.Median()
    assert build({"attack": "sign"}).attackers == 2
    private = build({"dp_noise": 1.0, "max_norm": 0.5, "seed": 4})
    assert private.make_aggregator() is None
    central = hardening.central(private)
    assert central is not None
    assert (central.max_norm, central.noise) == (0.5, 1.0)
    assert central == hardening.central(private)
    assert hardening.central(build({"dp_noise": 1.0, "max_norm": 0.5, "dp_where": "local"})) is None


def test_a_run_under_attack_says_so_and_goes_on_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"clients": 6, "attack": "noise", "attackers": 1, "aggregator": "median"}
    with pytest.raises(KeyboardInterrupt):
        run(quick(tmp_path / "a", **options), observer=StopAfter(3))
    run(quick(tmp_path / "a", **options), resume=True)
    from fedmap_sparse.experiments.progress import Lines

    summary = run(quick(tmp_path / "b", **options), observer=Lines())
    same_results(tmp_path / "a", tmp_path / "b")
    assert summary["fedmap"]["hardening"] == {
        "aggregator": "Median(least=1)",
        "attack": "noise",
        "attackers": 1,
        "epsilon": None,
        "delta": None,
    }
    said = capsys.readouterr().out
    assert "attack    noise, by the last 1 of 6" in said
    assert "hostile clients" in said
    assert "aggregating a round" in said


@pytest.mark.parametrize("where", ["central", "local"])
def test_a_private_run_tells_epsilon_each_round(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an accountant in its place, as dp-accounting is an extra."""
    monkeypatch.setattr(hardening, "check", lambda config: None)
    monkeypatch.setattr(
        hardening.privacy,
        "epsilon",
        lambda noise, rounds, **how: rounds * (2 if how["local"] else 1),
    )
    from fedmap_sparse.experiments.progress import Lines

    config = quick(tmp_path, dp_noise=0.5, max_norm=0.3, dp_where=where, baseline=False)
    summary = run(config, observer=Lines())
    each = [r["epsilon"] for r in records(tmp_path)]
    assert each == [(2 if where == "local" else 1) * (r + 1) for r in range(4)]
    assert (
        json.loads((tmp_path / "summary.json").read_text())["fedmap"]["hardening"]["epsilon"]
        == each[-1]
    )
    assert summary["fedmap"]["accuracy"] < 0.9
    said = capsys.readouterr().out
    assert f"privacy   {where} noise of 0.5" in said
    assert f"epsilon {each[1]:.3g}" in said
    assert "epsilon at delta 1e-05" in said


def test_epsilon_of_a_run_is_the_accountants(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    how = {"clients": 6, "participation": 0.5, "dp_noise": 4.0, "max_norm": 0.3, "dp_delta": 1e-3}
    summary = run(quick(tmp_path, **how, baseline=False))
    expected = [
        privacy.epsilon(4.0, rounds, delta=1e-3, clients=6, cohort=3) for rounds in range(1, 5)
    ]
    assert [r["epsilon"] for r in records(tmp_path)] == expected
    assert 0 < expected[0] < expected[-1] == summary["fedmap"]["hardening"]["epsilon"]
    assert expected[-1] < privacy.epsilon(4.0, 4, delta=1e-3, clients=6)


def test_noise_wants_an_accountant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"dp_noise: wants dp-accounting: pip install"):
        run(quick(tmp_path, dp_noise=0.5, max_norm=0.3))
    assert not list(tmp_path.iterdir())
