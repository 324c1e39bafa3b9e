"""What the options on hostile clients and privacy make of a run, and what it says of them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import nn

from fedmap_sparse.codec import Message
from fedmap_sparse.engines.in_process import generator
from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.engines.workers import Train
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments.attacks import Attack, flipped, hostile_clients
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.data import Split
from fedmap_sparse.experiments.training import LocalTraining
from fedmap_sparse.federated import ClientId, FedMapClient, privacy
from fedmap_sparse.federated.privacy import Gaussian


def check(config: Config) -> None:
    """Raise ConfigError where a run would have to tell an epsilon that nothing can compute."""
    if config.dp_noise and find_spec("dp_accounting") is None:
        raise ConfigError("dp_noise: wants dp-accounting: pip install 'fedmap-sparse[privacy]'")


def _gaussian(config: Config, where: str) -> Gaussian | None:
    if not config.dp_noise or config.dp_where != where:
        return None
    assert config.max_norm is not None
    seed = int(generator(config.seed, 5).integers(2**63))
    return Gaussian(config.max_norm, config.dp_noise, seed)


def central(config: Config) -> Gaussian | None:
    """What the server clips and adds."""
    return _gaussian(config, "central")


def training(
    config: Config, samples: Mapping[ClientId, Split], classes: int, phases: Phases
) -> Train:
    """Local training, with noise and hostile clients where the options say so."""
    hostile = hostile_clients(config.clients, config.attackers or 0)
    if config.attack == "labels":
        samples = flipped(samples, hostile, classes)
    train: Train = LocalTraining(config, samples, phases)
    local = _gaussian(config, "local")
    if local is not None:
        train = _Private(train, local)
    return Attack(config.attack, hostile, train, config.seed) if hostile else train


class _Private:
    """Local training after which the client clips what it sends, and adds noise."""

    def __init__(self, train: Train, gaussian: Gaussian) -> None:
        self._train = train
        self._gaussian = gaussian

    def __call__(
        self, name: ClientId, client: FedMapClient, message: Message
    ) -> tuple[int, float | None]:
        found = self._train(name, client, message)
        self._gaussian.privatize_(client.params, message, int(name))
        return found


def epsilon(config: Config, rounds: int) -> float | None:
    """What so many rounds gave away; None without noise."""
    if not config.dp_noise:
        return None
    return privacy.epsilon(
        config.dp_noise,
        rounds,
        delta=config.dp_delta,
        clients=config.clients,
        cohort=config.cohort,
        local=config.dp_where == "local",
    )


def _rule(config: Config) -> str:
    rule = config.make_aggregator()
    return "mean" if rule is None else str(rule)


def summary(config: Config) -> dict[str, Any]:
    """For summary.json: the rule, the attack, and epsilon at the end."""
    return {
        "aggregator": _rule(config),
        "attack": config.attack,
        "attackers": config.attackers or 0,
        "epsilon": epsilon(config, config.rounds),
        "delta": config.dp_delta if config.dp_noise else None,
    }


def opening(config: Config) -> dict[str, str]:
    """Lines of what will be run; none for honest clients, the mean and no noise."""
    rows = {}
    if config.make_aggregator() is not None:
        rows["updates"] = _rule(config)
    if config.attackers:
        rows["attack"] = f"{config.attack}, by the last {config.attackers} of {config.clients}"
    if config.dp_noise:
        rows["privacy"] = (
            f"{config.dp_where} noise of {config.dp_noise:g} × max_norm={config.max_norm:g}, "
            f"epsilon {epsilon(config, config.rounds):.3g} at delta {config.dp_delta:g} after "
            f"{config.rounds} rounds"
        )
    return rows


def cautions(config: Config, model: nn.Module) -> list[str]:
    """Notes on what may surprise."""
    if not config.dp_noise:
        return []
    lines = []
    if config.dp_where == "central" and any(b.is_floating_point() for b in model.buffers()):
        lines.append("note: with central noise buffers (batch norm's) stay as they began")
    if config.dp_delta * config.clients > 1:
        lines.append(
            f"note: a delta of {config.dp_delta:g} is above 1 / clients: it promises nothing"
        )
    return lines


def rows(arms: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of the closing table, where there is something to say."""
    told = [arm["hardening"] for arm in arms.values()]
    found = []
    if told[0]["aggregator"] != "mean" or told[0]["attackers"]:
        found.append(["updates become", *(t["aggregator"].split("(")[0] for t in told)])
        found.append(
            ["aggregating a round", *(f"{_milliseconds(arm):.1f} ms" for arm in arms.values())]
        )
    if told[0]["attackers"]:
        found.append(["hostile clients", *(f"{t['attackers']}, {t['attack']}" for t in told)])
    if told[0]["epsilon"] is not None:
        label = f"epsilon at delta {told[0]['delta']:g}"
        found.append([label, *(f"{t['epsilon']:.3g}" for t in told)])
    return found


def _milliseconds(arm: Mapping[str, Any]) -> float:
    return 1000 * float(arm["phases"]["aggregate"]) / int(arm["rounds"])
