"""Server, clients and training of an arm's method, over the same loop with the same messages.

Most methods are options that go together (`presets`) around FedMap's own server and clients. Two
have their own, as their masks are not FedMap's: `regrow` and `topk`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fedmap_sparse.codec import Coding
from fedmap_sparse.codec.container import MAX_INTEGER
from fedmap_sparse.engines.workers import Train
from fedmap_sparse.experiments import hardening, regrow, topk, training
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.data import Split
from fedmap_sparse.federated import ClientId, Criterion, FedMapClient, FedMapServer
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.schedule import Schedule

#: Methods with clients of their own, which train in the engine's process, one after another.
OF_THEIR_OWN = ("feddst", "stc")


def make_server(
    method: str,
    config: Config,
    schedule: Schedule,
    params: FlatParameters,
    criterion: Criterion | None,
) -> FedMapServer:
    """The server of a method; `schedule` and `criterion` are for those that prune as FedMap."""
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "min_updates": config.min_updates,
        "coding": cast(Coding, config.coding),
        "max_samples": MAX_INTEGER,  # the clients are our own: a mean by their true samples
    }
    if method == "stc":
        assert config.update_density is not None
        return topk.TopKServer(params, config.update_density, **common)
    common["dtype"] = config.dtype
    if method == "feddst":
        assert config.target is not None
        return regrow.RegrowServer(params, config.target, _plan(config), **common)
    return FedMapServer(
        params,
        schedule,
        server_optimizer=config.make_server_optimizer(),
        criterion=criterion,
        aggregator=config.make_aggregator(),
        privacy=hardening.central(config),
        **common,
    )


def make_client(method: str, config: Config, local: FlatParameters) -> FedMapClient:
    """A client of a method's server. Clients may share `local`."""
    if method not in OF_THEIR_OWN:
        return training.make_client(config, local)
    common: dict[str, Any] = {
        "optimizer": training.make_optimizer(config),
        "coding": cast(Coding, config.coding),
        "prox_mu": config.prox_mu,
    }
    if method == "stc":
        assert config.update_density is not None
        return topk.TopKClient(local, config.update_density, **common)
    return regrow.RegrowClient(local, dtype=config.uplink_dtype or config.dtype, **common)


def make_train(
    method: str, config: Config, train: Train, samples: Mapping[ClientId, Split]
) -> Train:
    """Local training with what the method does before it."""
    if method != "feddst":
        return train
    return regrow.Regrowing(train, samples, _plan(config), config.batch_size)


def _plan(config: Config) -> regrow.Plan:
    assert config.regrow is not None
    assert config.regrow_every is not None
    return regrow.Plan(config.regrow, config.regrow_every, max(1, config.rounds // 2))
