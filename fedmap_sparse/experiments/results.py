"""Finished runs, read back and put together: methods over seeds, side by side in settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from fedmap_sparse import _files
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import options
from fedmap_sparse.experiments.config import Config, build
from fedmap_sparse.experiments.folder import FROM_PYTHON, Record, RunFolder
from fedmap_sparse.experiments.options import Value

#: Options that say where and how fast a run is, not what it computes but for rounding.
_PLACE = frozenset(
    {"name", "out", "threads", "processes", "device", "layout", "tensorboard", "baseline", "seed"}
)
#: Options that are as another one unless given.
_FOLLOWING = {"data_seed": "seed", "model_seed": "seed", "uplink_dtype": "dtype"}
#: Options that a seed's randomness hangs on: runs that differ in one have no common draws.
_SETTING = frozenset(
    f.name for f in fields(Config) if f.metadata["group"] in ("data and model", "federation")
) - {"server_optimizer", "server_lr", "server_momentum", "min_updates", "attempts"}
#: Options that a dense arm has no use for.
PRUNING = frozenset(f.name for f in fields(Config) if f.metadata["group"] == "pruning")

Options = dict[str, Value]


@dataclass(frozen=True)
class Run:
    """One finished run: its folder, options, and result by arm.

    Attributes:
        python: what came from Python instead of options; empty if nothing did.
    """

    path: Path
    config: Config
    summary: dict[str, dict[str, Any]]
    python: str

    @cached_property
    def records(self) -> list[Record]:
        """What metrics.jsonl holds.

        Raises:
            ConfigError: it is missing or damaged.
        """
        path = RunFolder(self.path).metrics
        try:
            text = _files.read_regular(path, 1 << 30).decode()
            return [json.loads(line) for line in text.splitlines()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not the rounds of a run: {error}") from error


@dataclass
class Method:
    """One arm under one set of options, over seeds.

    Attributes:
        runs: by seed.
        label: the arm and the options that tell it from others of its setting.
        place: in its setting, from 0: the same colour in every picture.
    """

    arm: str
    options: Options
    runs: dict[int, Run] = field(default_factory=dict)
    label: str = ""
    place: int = 0

    @property
    def seeds(self) -> list[int]:
        """In ascending order."""
        return sorted(self.runs)

    def of(self, key: str, seeds: Iterable[int] | None = None) -> list[float]:
        """A figure of the summary for each seed: `accuracy`, or `clients.worst`."""
        chosen = self.seeds if seeds is None else seeds
        return [_figure(self.runs[seed].summary[self.arm], key) for seed in chosen]

    def has(self, key: str) -> bool:
        """Whether every run has that figure."""
        return all(_figure(run.summary[self.arm], key) is not None for run in self.runs.values())

    def records(self, seed: int) -> list[Record]:
        """The rounds of one seed."""
        return [r for r in self.runs[seed].records if r["arm"] == self.arm]


@dataclass
class Setting:
    """Methods over the same data, clients and model: those whose seeds can be paired."""

    options: Options
    methods: list[Method] = field(default_factory=list)
    label: str = ""

    def reference(self, method: Method) -> Method | None:
        """What a method is compared with: dense FedAvg, the one with its own options if there is.

        Where the setting has no dense arm, the first method; None for the reference itself.
        """
        dense = [m for m in self.methods if m.arm == "dense"]
        own = dense_options(method.options)
        found = next((m for m in dense if dense_options(m.options) == own), None)
        if found is None or (found is method and len(dense) > 1):
            found = dense[0] if dense else self.methods[0]
        return None if found is method else found


def dense_options(chosen: Mapping[str, Value]) -> Options:
    """Options without those that a dense arm has no use for."""
    return {k: v for k, v in chosen.items() if k not in PRUNING}


def find(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs in these folders and their sub-folders, and a line for each other one.

    Raises:
        ConfigError: a path that is no folder.
    """
    found: dict[Path, Run] = {}
    notes = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path}: expected a folder of runs, got none")
        for config in sorted(path.rglob("config.toml")):
            if config.parent.resolve() in found:
                continue
            try:
                found[config.parent.resolve()] = read(config.parent)
            except ConfigError as error:
                notes.append(str(error))
    return list(found.values()), notes


def read(path: Path) -> Run:
    """A finished run.

    Raises:
        ConfigError: it has not ended, or a file of it is damaged.
    """
    folder = RunFolder(path)
    if not folder.summary.exists():
        raise ConfigError(f"{path}: not finished, so it is left out")
    try:
        text = options.read_text(folder.config)
        config = build(options.parse(text, folder.config))
        summary = json.loads(_files.read_regular(folder.summary, 1 << 26))
        for arm in summary.values():
            for key in ("accuracy", "density", "uplink_bytes", "downlink_bytes"):
                float(arm[key])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: not the result of a run: {error}") from error
    first = text.splitlines()[0]
    python = first.removeprefix(FROM_PYTHON) if first.startswith(FROM_PYTHON) else ""
    return Run(path, config, summary, python)


def together(runs: Iterable[Run]) -> list[Setting]:
    """Runs as methods over seeds, by setting; of equal arms under equal seeds the first counts."""
    settings: dict[str, Setting] = {}
    methods: dict[str, Method] = {}
    for run in runs:
        chosen = _telling(run)
        common = {k: v for k, v in chosen.items() if k in _SETTING or k == "python"}
        setting = settings.setdefault(_key(common), Setting(common))
        for arm in run.summary:
            own = dense_options(chosen) if arm == "dense" else chosen
            key = _key({**own, "arm": arm})
            if key not in methods:
                methods[key] = Method(arm, own)
                setting.methods.append(methods[key])
            methods[key].runs.setdefault(run.config.seed, run)
    found = list(settings.values())
    for setting, label in zip(found, _labels([s.options for s in found]), strict=True):
        o = setting.options
        words = f"{o['model']} on {o['dataset']}, {o['clients']} clients, {o['partition']}"
        setting.label = f"{words}: {label}" if label else words
        _order_and_name(setting)
    return found


def _telling(run: Run) -> Options:
    """The options that say what a run computes, but for its seed."""
    given = run.config.to_dict()
    chosen = {
        k: v
        for k, v in given.items()
        if k not in _PLACE and not (k in _FOLLOWING and v == given[_FOLLOWING[k]])
    }
    return {**chosen, "python": run.python} if run.python else chosen


def _order_and_name(setting: Setting) -> None:
    """Dense FedAvg first, the plainest before others; the rest as they came."""
    plain = Config().to_dict()
    setting.methods.sort(
        key=lambda m: (
            m.arm != "dense",
            sum(plain.get(k) != v for k, v in m.options.items()) if m.arm == "dense" else 0,
        )
    )
    for place, method in enumerate(setting.methods):
        method.place = place
    for arm in dict.fromkeys(m.arm for m in setting.methods):
        own = [m for m in setting.methods if m.arm == arm]
        for method, label in zip(own, _labels([m.options for m in own]), strict=True):
            method.label = f"{arm} {label}".rstrip()


def _labels(sets: Sequence[Options]) -> list[str]:
    """The options of each set that are not the same in all, as key=value words."""
    keys = list(dict.fromkeys(key for one in sets for key in one))
    telling = [k for k in keys if len({_key({k: one.get(k)}) for one in sets}) > 1]
    return [" ".join(f"{k}={one[k]}" for k in telling if k in one) for one in sets]


def differing(one: Mapping[str, Value], other: Mapping[str, Value]) -> Iterator[str]:
    """Words for each option in which two sets differ."""
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            yield f"{key} {one.get(key, 'not given')} and {other.get(key, 'not given')}"


def _key(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)


def _figure(arm: Mapping[str, Any], key: str) -> Any:
    value: Any = arm
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) and part in value else None
    return value
