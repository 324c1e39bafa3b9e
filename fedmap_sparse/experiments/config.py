"""The options of an experiment: one table, from which files, command line and help are read."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

from fedmap_sparse import codec, schedule
from fedmap_sparse._text import shown
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import criteria, data, models, options, partition
from fedmap_sparse.experiments.options import Value, option
from fedmap_sparse.federated import Criterion, server_optim
from fedmap_sparse.federated.server_optim import ServerOptimizer
from fedmap_sparse.schedule import Schedule

_WIRE = (*codec.DTYPES, "int8")
_PRUNED = ("schedule", tuple(kind for kind in schedule.KINDS if kind != "dense"))
_GRADUAL = ("schedule", ("iterative", "cubic"))
_SERVER_STEP = ("server_optimizer", ("fedavgm", "fedadam"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every option of an experiment, checked and complete.

    Options that another one makes meaningless (`alpha` without a Dirichlet partition) are None,
    and so are `out` and `data` unless given; all else is filled in at construction.
    `fedmap-sparse run --help` lists them with their units.

    Raises:
        ConfigError: a wrong type, an impossible value, or two options that do not go together.
    """

    name: str = option("fedmap", "run", "name of the run; letters, digits, '.', '_' and '-'")
    out: str | None = option(None, "run", "output folder", default_text="runs/NAME")
    seed: int = option(
        0,
        "run",
        "of weights, partition, order of samples, cohorts and dropouts",
        least=0,
        most=2**64 - 1,
    )
    threads: int | None = option(
        None,
        "run",
        "threads of torch and of the kernels",
        least=1,
        most=1024,
        default_text="torch's choice",
    )
    device: str = option("cpu", "run", "where to train: cpu, cuda, cuda:1, ...")
    baseline: bool = option(True, "run", "run dense FedAvg too, with the same seeds")

    dataset: str | None = option(
        None,
        "data and model",
        f"one of {', '.join(data.NAMES)}, or the path of an .npz file; fashion-mnist is the full "
        "set where it is found, else the subset shipped with the package",
        default_text="fashion-mnist-subset",
    )
    data: str | None = option(
        None,
        "data and model",
        "folder with Fashion-MNIST's four IDX files; means dataset=fashion-mnist",
        default_text="Debian's folder, if there",
    )
    model: str = option("cnn", "data and model", "the network", choices=tuple(models.MODELS))

    clients: int = option(10, "federation", "number of clients", least=1)
    participation: float = option(
        1.0, "federation", "share of the clients in each round's cohort", above=0, most=1
    )
    dropout: float = option(
        0.0, "federation", "probability that a client does not answer", least=0, below=1
    )
    min_updates: int = option(
        1, "federation", "usable updates without which a round is drawn again", least=1
    )
    attempts: int = option(
        5, "federation", "draws of one round before the run fails", least=1, most=1000
    )
    partition: str = option(
        "iid", "federation", "how clients share the data", choices=tuple(partition.PARTITIONS)
    )
    alpha: float | None = option(
        None,
        "federation",
        "concentration: a small one gives each class to few clients",
        above=0,
        needs=("partition", ("dirichlet",)),
        fill=0.5,
    )
    shards: int | None = option(
        None,
        "federation",
        "shards of classes a client",
        least=1,
        needs=("partition", ("pathological",)),
        fill=2,
    )
    holdout: float = option(
        0.0,
        "federation",
        "share of its samples that each client holds out, to measure the global model on",
        least=0,
        most=0.5,
    )
    server_optimizer: str = option(
        "fedavg",
        "federation",
        "what the server does with the mean of the updates",
        choices=tuple(server_optim.KINDS),
    )
    server_lr: float | None = option(
        None,
        "federation",
        "the server's learning rate",
        above=0,
        needs=_SERVER_STEP,
        fill={"fedavgm": 1.0, "fedadam": 0.01},
    )
    server_momentum: float | None = option(
        None,
        "federation",
        "decay of the server's first moment",
        least=0,
        below=1,
        needs=_SERVER_STEP,
        fill=0.9,
    )

    dtype: str = option(
        "float32",
        "messages",
        "of values on the wire; the server adopts what clients decode",
        choices=_WIRE,
    )
    uplink_dtype: str | None = option(
        None,
        "messages",
        "of values in updates; with int8 a client makes its error good in its next update",
        choices=_WIRE,
        default_text="dtype",
    )
    delta: bool = option(
        False, "messages", "updates carry differences from the broadcast: better in few bits"
    )
    coding: str = option(
        "entropy",
        "messages",
        "entropy-code masks and values, of both arms, where that is smaller, or leave them raw",
        choices=("entropy", "raw"),
    )

    rounds: int = option(20, "training", "rounds of each arm", least=1)
    local_epochs: int = option(
        1, "training", "epochs of local training in a client's round", least=1
    )
    batch_size: int = option(32, "training", "samples a step", least=1)
    optimizer: str = option("sgd", "training", "of the clients", choices=("sgd", "adamw"))
    lr: float | None = option(
        None,
        "training",
        "learning rate of the first round",
        above=0,
        needs=("optimizer", ("sgd", "adamw")),
        fill={"sgd": 0.05, "adamw": 0.001},
    )
    lr_decay: float = option(
        1.0, "training", "factor on the learning rate after each round", above=0, most=1
    )
    momentum: float | None = option(
        None,
        "training",
        "of local steps",
        least=0,
        below=1,
        needs=("optimizer", ("sgd",)),
        fill=0.9,
    )
    weight_decay: float = option(0.0, "training", "of local steps, as in torch", least=0)
    prox_mu: float = option(0.0, "training", "FedProx's proximal term; 0 is off", least=0)
    keep_optimizer: bool = option(
        False, "training", "clients keep the optimizer's state from round to round"
    )

    schedule: str = option(
        "iterative", "pruning", "how sparsity grows to its target", choices=tuple(schedule.KINDS)
    )
    target: float | None = option(
        None,
        "pruning",
        "final sparsity: the share of prunable weights that are removed",
        least=0,
        most=1,
        needs=_PRUNED,
        fill=0.9,
    )
    prune_start: int | None = option(
        None,
        "pruning",
        "first round that prunes, counted from 0 (oneshot: the only one)",
        least=0,
        needs=_PRUNED,
        default_text="a tenth of the rounds",
    )
    prune_end: int | None = option(
        None,
        "pruning",
        "round from which sparsity is at its target",
        least=0,
        needs=_GRADUAL,
        default_text="six tenths of the rounds",
    )
    prune_every: int | None = option(
        None, "pruning", "rounds from one pruning to the next", least=1, needs=_GRADUAL, fill=1
    )
    criterion: str | None = option(
        None,
        "pruning",
        "what weights are ranked by; fan_in is magnitude × sqrt(inputs of an output)",
        choices=tuple(criteria.CRITERIA),
        needs=_PRUNED,
        fill="magnitude",
    )
    min_layer_density: float | None = option(
        None,
        "pruning",
        "share of each layer's weights that stay in any case; at most 1 - target",
        least=0,
        most=1,
        needs=_PRUNED,
        fill=0.0,
    )

    # Names of options that were not given but follow from others; no field, so not an option.
    _derived: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        options.check(self)
        open_ = [f.name for f in fields(self) if getattr(self, f.name) is None]
        if self.dataset is None:
            self._set("dataset", "fashion-mnist-subset" if self.data is None else "fashion-mnist")
        options.fill(self)
        if self.uplink_dtype is None:
            self._set("uplink_dtype", self.dtype)
        if self.prune_start is None and self.schedule in _PRUNED[1]:
            last = self.rounds - 1 if self.prune_end is None else self.prune_end
            self._set("prune_start", min(max(1, self.rounds // 10), last))
        if self.prune_end is None and self.schedule in _GRADUAL[1]:
            assert self.prune_start is not None
            self._set("prune_end", max(self.rounds * 6 // 10, self.prune_start))
        self._check_together()
        derived = frozenset(name for name in open_ if getattr(self, name) is not None)
        object.__setattr__(self, "_derived", derived)

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
        for key in ("prune_start", "prune_end"):
            value = getattr(self, key)
            if value is not None and value >= self.rounds:
                raise ConfigError(
                    f"{key}: expected a round before rounds={self.rounds}, got {value}"
                )
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
        if self.min_updates > self.cohort:
            raise ConfigError(
                f"min_updates: expected at most the {self.cohort} clients of a cohort, got "
                f"{self.min_updates}"
            )

    @property
    def folder(self) -> Path:
        """Where the outputs go."""
        return folder_of(self.to_dict())

    @property
    def cohort(self) -> int:
        """Clients a round: their share, rounded, at least one."""
        return max(1, round(self.participation * self.clients))

    def learning_rate(self, round: int) -> float:
        """The clients' learning rate in a round."""
        assert self.lr is not None
        return self.lr * self.lr_decay**round

    def make_schedule(self) -> Schedule:
        """The pruning schedule that these options name."""
        given = {
            "target": self.target,
            "start": self.prune_start,
            "at": self.prune_start,
            "end": self.prune_end,
            "every": self.prune_every,
        }
        kind = schedule.KINDS[self.schedule]
        return kind(**{f.name: given[f.name] for f in fields(kind)})

    def make_criterion(self) -> Criterion | None:
        """What these options rank weights by; None is magnitude alone."""
        if self.criterion is None:
            return None
        chosen = criteria.CRITERIA[self.criterion]
        least = self.min_layer_density
        return criteria.at_least(least, chosen) if least else chosen

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
    return all(f.name in values for f in fields(Config) if f.default is not None)


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
