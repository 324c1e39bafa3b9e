"""The options of an experiment: one table, from which files, command line and help are read."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

from fedmap_sparse import schedule
from fedmap_sparse._text import shown
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import criteria, options, presets
from fedmap_sparse.experiments.options import Value
from fedmap_sparse.experiments.table import BOUNDED, GRADUAL, PRUNED, Table
from fedmap_sparse.federated import Aggregator, Criterion, robust, server_optim
from fedmap_sparse.federated.server_optim import ServerOptimizer
from fedmap_sparse.schedule import Dense, Schedule


@dataclass(frozen=True, kw_only=True)
class Config(Table):
    """Every option of an experiment, checked and complete.

    Options that another one makes meaningless (`alpha` without a Dirichlet partition) are None,
    and so are `out` and `data` unless given; all else is filled in at construction.
    `fedmap-sparse run --help` lists them with their units.

    Raises:
        ConfigError: a wrong type, an impossible value, or two options that do not go together.
    """

    # Names of options that were not given but follow from others; no field, so not an option.
    _derived: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        options.check(self)
        open_ = [f.name for f in fields(self) if getattr(self, f.name) is None]
        if self.dataset is None:
            self._set("dataset", "fashion-mnist-subset" if self.data is None else "fashion-mnist")
        preset = self._follow_method()
        options.fill(self)
        if self.uplink_dtype is None:
            self._set("uplink_dtype", self.dtype)
        for name in ("data_seed", "model_seed"):
            if getattr(self, name) is None:
                self._set(name, self.seed)
        if self.prune_start is None and self.schedule in PRUNED[1]:
            last = self.rounds - 1 if self.prune_end is None else self.prune_end
            self._set("prune_start", min(max(1, self.rounds // 10), last))
        if self.prune_end is None and self.schedule in GRADUAL[1]:
            assert self.prune_start is not None
            tenths = 8 if self.schedule == "adaptive" else 6
            self._set("prune_end", max(self.rounds * tenths // 10, self.prune_start))
        if self.hostile is None and self.aggregator in BOUNDED[1]:
            self._set("hostile", max(1, self.cohort // 5))
        if self.norm_times is None and self.aggregator == "norm" and self.max_norm is None:
            self._set("norm_times", 2.0)
        if self.attackers is None and self.attack != "none":
            self._set("attackers", max(1, self.clients // 5))
        self._check_together()
        self._check_private()
        derived = frozenset(name for name in open_ if getattr(self, name) is not None)
        object.__setattr__(self, "_derived", derived | preset)

    def _follow_method(self) -> frozenset[str]:
        """Set what the method sets; the names of what was not given as that."""
        followed = set()
        defaults = {f.name: f.default for f in fields(self)}
        for key, value in presets.preset(self.method, self.rounds).items():
            given = getattr(self, key)
            if given == defaults[key]:
                self._set(key, value)
                followed.add(key)
            elif key in presets.OWN and given != value:
                raise ConfigError(f"{key}: method={self.method} has {value}, got {given}")
        return frozenset(followed)

    def with_threads(self, threads: int) -> Config:
        """The same options with the number of threads settled."""
        other = copy.copy(self)
        object.__setattr__(other, "threads", threads)
        object.__setattr__(other, "_derived", self._derived | {"threads"})
        return other

    def _set(self, name: str, value: Value) -> None:
        object.__setattr__(self, name, value)

    def _check_together(self) -> None:
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", self.name):
            raise ConfigError(
                f"name: expected letters, digits, '.', '_' and '-', got {shown(self.name)}"
            )
        for key in ("prune_start", "prune_end", "warmup"):
            value = getattr(self, key)
            if value is not None and value >= self.rounds:
                raise ConfigError(
                    f"{key}: expected a round before rounds={self.rounds}, got {value}"
                )
        if self.lr_schedule == "cosine" and self.lr_decay != 1:
            raise ConfigError(f"lr_decay: goes with lr_schedule=decay, got {self.lr_decay}")
        start, end = self.prune_start, self.prune_end
        if start is not None and end is not None and end < start:
            raise ConfigError(
                f"prune_end: expected a round not before prune_start={start}, got {end}"
            )
        if self.min_layer_density:
            assert self.target is not None
            if self.min_layer_density > (most := float(1 - Decimal(str(self.target)))):
                raise ConfigError(
                    f"min_layer_density: expected at most {most:g}, the model's own density, got "
                    f"{self.min_layer_density}"
                )
        if self.criterion == "snip" and (self.schedule, self.prune_start) != ("oneshot", 0):
            raise ConfigError(
                "criterion: snip ranks before any training; it goes with schedule=oneshot and "
                f"prune_start=0, not with schedule={self.schedule} and prune_start={start}"
            )
        for key, value in presets.alone(self.method, self.criterion).items():
            if getattr(self, key) != value:
                word = "nothing" if value is None else options.toml(value)
                raise ConfigError(f"{key}: method={self.method} goes with {word} alone")
        if self.graphs:
            self._check_graphs()
        if self.min_updates > self.cohort:
            raise ConfigError(
                f"min_updates: expected at most the {self.cohort} clients of a cohort, got "
                f"{self.min_updates}"
            )

    def _check_graphs(self) -> None:
        if self.device.partition(":")[0] != "cuda":
            raise ConfigError(
                f"graphs: expected device=cuda beside it, for CUDA graphs, got device={self.device}"
            )
        # One optimizer serves all clients, and a graph would repeat the first one's anchor.
        for key in ("prox_mu", "keep_optimizer"):
            if given := getattr(self, key):
                raise ConfigError(
                    f"{key}: graphs=true goes without: a client's own state is not in the graph, "
                    f"got {options.toml(given)}"
                )

    def _check_private(self) -> None:
        aggregator = self.make_aggregator()
        if aggregator is not None and aggregator.least > self.cohort:
            raise ConfigError(
                f"aggregator: {self.aggregator} needs a cohort of at least {aggregator.least} "
                f"clients, got {self.cohort}"
            )
        if self.norm_times is not None and self.max_norm is not None:
            raise ConfigError("norm_times: expected it or max_norm, got both")
        if self.dp_noise and self.max_norm is None:
            raise ConfigError("dp_noise: expected max_norm beside it, got none")
        if self.dp_noise and self.aggregator != "mean":
            raise ConfigError(f"dp_noise: goes with aggregator=mean, not with {self.aggregator}")
        if self.attackers is not None and self.attackers >= self.clients:
            raise ConfigError(
                f"attackers: expected fewer than clients={self.clients}, got {self.attackers}"
            )

    @property
    def folder(self) -> Path:
        """Where the outputs go."""
        return folder_of(self.to_dict())

    @property
    def cohort(self) -> int:
        """Clients a round: their share, rounded, at least one."""
        return max(1, round(self.participation * self.clients))

    @property
    def arm(self) -> str:
        """The name of the arm that these options are about; "dense" for FedAvg."""
        dense = self.schedule == Dense.kind and self.method != "stc"
        return Dense.kind if dense else self.method

    @property
    def has_dense_arm(self) -> bool:
        """Whether dense FedAvg runs beside another method."""
        return self.baseline and self.arm != Dense.kind

    def learning_rate(self, round: int) -> float:
        """The clients' learning rate in a round."""
        assert self.lr is not None
        if round < self.warmup:
            return self.lr * (round + 1) / (self.warmup + 1)
        if self.lr_schedule == "cosine":
            done = (round - self.warmup) / (self.rounds - self.warmup)
            return self.lr * (1 + math.cos(math.pi * done)) / 2
        return self.lr * self.lr_decay**round

    def make_schedule(self) -> Schedule:
        """The pruning schedule that these options name."""
        given = {
            "target": self.target,
            "start": self.prune_start,
            "at": self.prune_start,
            "end": self.prune_end,
            "every": self.prune_every,
            "settled": self.settled,
            "margin": self.margin,
        }
        kind = schedule.KINDS[self.schedule]
        return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})

    def make_criterion(self, asked: Criterion | None = None) -> Criterion | None:
        """What these options rank weights by; None is magnitude alone.

        Args:
            asked: criterion=snip: what gives the clients' scores.
        """
        if self.criterion is None:
            return None
        chosen = asked if self.criterion == "snip" else criteria.CRITERIA[self.criterion]
        least = self.min_layer_density
        return criteria.at_least(least, chosen) if least else chosen

    def make_aggregator(self) -> Aggregator | None:
        """The rule that these options name, without noise; None is the mean by samples, which with
        a `max_norm` is that of differences cut to it."""
        if self.aggregator == "mean" and (self.max_norm is None or self.dp_noise):
            return None
        clips = self.max_norm is not None
        kind: Any = robust.ClippedMean if clips else robust.AGGREGATORS[self.aggregator]
        given = {
            "trim": self.hostile,
            "hostile": self.hostile,
            "times": self.norm_times,
            "norm": self.max_norm,
        }
        named = {f.name: given.get(f.name) for f in fields(kind)}
        found: Aggregator = kind(**{k: v for k, v in named.items() if v is not None})
        return found

    def make_server_optimizer(self) -> ServerOptimizer:
        """The server's rule that these options name."""
        given = {
            "lr": self.server_lr,
            "momentum": self.server_momentum,
            "beta1": self.server_momentum,
        }
        kind = server_optim.KINDS[self.server_optimizer]
        return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})

    def to_dict(self) -> dict[str, Value]:
        """The options that are not None."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {key: value for key, value in pairs if value is not None}

    def to_toml(self) -> str:
        """As a TOML file that `read_file` reads back, by groups.

        What follows from other options stands in a comment, so that the file goes well with
        another `rounds` or `optimizer`; so does `out`, so that no other run ends in this folder.
        """
        given = self.to_dict()
        parts = []
        for group, members in options.groups(Config).items():
            lines = [f"# {group}"]
            for f in members:
                if f.name in given:
                    note = "# " if f.name == "out" or f.name in self._derived else ""
                    lines.append(f"{note}{f.name} = {options.toml(given[f.name])}")
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"


def is_complete(values: Mapping[str, Any]) -> bool:
    """Whether options read from a file are all that a run writes (`Config.to_toml`)."""
    needed = (f.name for f in fields(Config) if f.default is not None)
    return all(name in values for name in needed if name not in presets.OWN)


def build(values: Mapping[str, Any]) -> Config:
    """A Config of these options, defaults elsewhere.

    Raises:
        ConfigError: an unknown name (the nearest known one is suggested), or as Config.
    """
    options.check_names(Config, values)
    return Config(**values)


def folder_of(values: Mapping[str, Any]) -> Path:
    """The output folder that these options name, complete or not."""
    return Path(values["out"]) if values.get("out") else Path("runs", values.get("name", "fedmap"))
