"""One experiment from options to figures: FedMap, and dense FedAvg beside it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from torch import nn

from fedmap_sparse.codec import Coding
from fedmap_sparse.engines.in_process import InProcessEngine, Round
from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import baselines, checkpoint, models, report
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.data import Dataset, Split, load
from fedmap_sparse.experiments.folder import Record, RunFolder
from fedmap_sparse.experiments.partition import PARTITIONS, Index
from fedmap_sparse.experiments.progress import Observer
from fedmap_sparse.experiments.training import LocalTraining, evaluate, make_optimizer, share_out
from fedmap_sparse.federated import ClientId, FedMapClient, FedMapServer
from fedmap_sparse.flat import flatten
from fedmap_sparse.schedule import Schedule

MakeModel = nn.Module | Callable[[], nn.Module]


def run(
    config: Config,
    *,
    model: MakeModel | None = None,
    data: Dataset | None = None,
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Run every arm of an experiment and write its folder (`config.folder`).

    The global model is evaluated on validation data after each round, and on test data once, at
    the end. All that is random depends on `config.seed`; the caller's random state and number of
    threads are as before afterwards. A run that was killed goes on with `resume=True` from the
    last round that ended, to the same bits as one that was not.

    Args:
        config: the options.
        model: instead of `config.model`: a module, or a function that makes one (called once, with
            torch seeded) of float32 [batch, channels, height, width] to logits [batch, classes].
        data: instead of `config.dataset`.
        resume: go on with the run in the folder; start it if there is none.
        overwrite: replace the run in the folder.
        observer: is told of each round, for a progress bar.

    Returns:
        What summary.json holds: for each arm ("fedmap", "dense") `accuracy` and `loss` on test,
        `validation_accuracy`, `density`, `survivors`, `prunable`, `uplink_bytes`,
        `downlink_bytes`, `seconds`, `rounds`, `seed`, `phases` (seconds by phase), and
        `overhead`, the share of the time that was not forward, backward or evaluation.

    Raises:
        ConfigError: options that cannot be, a folder that holds a run, another run's checkpoint.
        DataError: data that are missing or malformed.
        RoundFailed: a round with fewer usable updates than `config.min_updates`.
    """
    watch = Observer() if observer is None else observer
    dataset = load(config.dataset or "", config.data) if data is None else data
    device = _device(config.device)
    parts = partition(config, dataset)
    folder = RunFolder(config.folder)
    saved = folder.open(resume=resume, overwrite=overwrite)
    config = _agreed(config, dataset, saved)
    with _settings(config):
        template = _template(config, dataset, model).to(device)
        folder.config.write_text(_head(model, data) + config.to_toml(), encoding="utf-8")
        journal = _Journal(folder, config, dataset, saved)
        title = config.model if model is None else type(template).__name__
        watch.begin(report.opening(config, dataset, template, title))
        schedules = baselines.arms(config)
        first = next(iter(schedules))
        summary = {}
        for name, schedule in schedules.items():
            arm = Arm(name, config, schedule, template, dataset, parts, device)
            if name in journal.states:
                arm.engine.load_state_dict(journal.states[name])
            watch.arm(name, journal.of(name), config.rounds)
            saving = 0.0
            while arm.round < config.rounds:
                if name == first and arm.round == config.rounds - 1:
                    start = perf_counter()
                    checkpoint.write_atomically(folder.broadcast, arm.broadcast())
                    saving += perf_counter() - start
                record = arm.play(saving)
                start = perf_counter()
                journal.add(arm, record)
                saving = perf_counter() - start
                watch.round(record)
            summary[name] = arm.summary(journal.of(name), dataset)
            if name == first:
                arm.save_model(folder.model)
    folder.write_summary(summary)
    lines = report.closing(summary)
    try:
        report.curves(folder.curves, journal.records)
    except ImportError:
        lines.append("no curves.png without matplotlib: pip install 'fedmap-sparse[plots]'")
    watch.end([*lines, f"everything is in {folder.path}"])
    return summary


class _Journal:
    """What a run has done so far, in memory and on the disk."""

    def __init__(
        self, folder: RunFolder, config: Config, dataset: Dataset, saved: dict[str, Any] | None
    ) -> None:
        self.records: list[Record] = [] if saved is None else saved["records"]
        self.states: dict[str, Any] = {} if saved is None else saved["arms"]
        self._fixed = {"config": config.to_dict(), "data": dataset.digest}
        self._folder = folder
        folder.write_metrics(self.records)

    def of(self, name: str) -> list[Record]:
        """The rounds of an arm."""
        return [record for record in self.records if record["arm"] == name]

    def add(self, arm: Arm, record: Record) -> None:
        """A round has ended: from here on a run goes on after it."""
        self.records.append(record)
        self.states[arm.name] = arm.engine.state_dict()
        state = {**self._fixed, "records": self.records, "arms": self.states}
        checkpoint.save(self._folder.checkpoint, state)
        self._folder.add_metrics(record)


class Arm:
    """One federation: server, clients and engine, under one schedule.

    Clients share one module: their weights come with each broadcast.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        schedule: Schedule,
        template: nn.Module,
        dataset: Dataset,
        parts: list[Index],
        device: torch.device,
    ) -> None:
        self.name = name
        self.config = config
        self._validation = _to(dataset.validation, device)
        self._device = device
        coding = cast(Coding, config.coding)
        self.server = FedMapServer(
            flatten(copy.deepcopy(template)),
            schedule,
            dtype=config.dtype,
            lr=config.learning_rate,
            min_updates=config.min_updates,
            server_optimizer=config.make_server_optimizer(),
            coding=coding,
        )
        local = flatten(copy.deepcopy(template))
        make = make_optimizer(config)
        clients: dict[ClientId, FedMapClient] = {
            i: FedMapClient(
                local,
                optimizer=make,
                keep_optimizer=config.keep_optimizer,
                dtype=config.uplink_dtype or config.dtype,
                delta=config.delta,
                coding=coding,
                prox_mu=config.prox_mu,
            )
            for i in range(config.clients)
        }
        phases = Phases(torch.cuda.synchronize if device.type == "cuda" else None)
        train = LocalTraining(config, share_out(dataset.train, parts, device), phases)
        self.engine = InProcessEngine(
            self.server,
            clients,
            train,
            cohort=config.cohort,
            dropout=config.dropout,
            seed=config.seed,
            phases=phases,
        )

    @property
    def round(self) -> int:
        """How many rounds have ended."""
        return self.server.round

    def broadcast(self) -> bytes:
        """The next round's broadcast, with its whole mask."""
        self.server.begin_round()
        return self.server.broadcast()

    def play(self, saving: float) -> Record:
        """One round; `saving` is the seconds that writing the one before took."""
        start = perf_counter()
        phases = self.engine.phases
        phases.clear()
        done = self.engine.round()
        with phases("evaluate"):
            accuracy, loss = evaluate(self.server.params.module, self._validation)
        seconds = {**phases, "save": saving}
        seconds["total"] = perf_counter() - start + saving
        return self._record(done, accuracy, loss, seconds)

    def _record(
        self, done: Round, accuracy: float, loss: float | None, seconds: dict[str, float]
    ) -> Record:
        result = done.result
        return {
            "arm": self.name,
            "round": result.round,
            "accuracy": accuracy,
            "loss": loss,
            "train_loss": result.loss,
            "density": self.server.params.density,
            "keep": self.server.mask.nnz,
            "lr": self.config.learning_rate(result.round),
            "uplink_bytes": done.uplink_bytes,
            "downlink_bytes": done.downlink_bytes,
            "cohort": len(done.cohort),
            "dropped": list(done.dropped),
            "refused": {str(client): reason for client, reason in result.refused.items()},
            "seconds": seconds,
        }

    def summary(self, records: list[Record], dataset: Dataset) -> dict[str, Any]:
        """The arm's result; this is where test data are looked at."""
        accuracy, loss = evaluate(self.server.params.module, _to(dataset.test, self._device))
        phases = report.phases(records)
        return {
            "accuracy": accuracy,
            "loss": loss,
            "validation_accuracy": records[-1]["accuracy"],
            "density": self.server.params.density,
            "survivors": self.server.mask.nnz,
            "prunable": self.server.layout.eligible,
            "uplink_bytes": sum(r["uplink_bytes"] for r in records),
            "downlink_bytes": sum(r["downlink_bytes"] for r in records),
            "seconds": phases["total"],
            "rounds": len(records),
            "seed": self.config.seed,
            "phases": phases,
            "overhead": 1 - (phases["train"] + phases["evaluate"]) / phases["total"],
        }

    def save_model(self, path: Path) -> None:
        """The global model as a state dict, dense, with zeros where it is pruned."""
        from safetensors.torch import save

        state = {n: t.cpu().contiguous() for n, t in self.server.params.to_state_dict().items()}
        checkpoint.write_atomically(path, save(state))


def partition(config: Config, dataset: Dataset) -> list[Index]:
    """Which training samples each client has.

    Raises:
        ConfigError: more clients (or shards) than samples.
    """
    given = {"alpha": config.alpha, "shards": config.shards}
    options = {key: value for key, value in given.items() if value is not None}
    share = PARTITIONS[config.partition]
    try:
        return share(dataset.train.labels.numpy(), config.clients, seed=config.seed, **options)
    except ValueError as error:
        raise ConfigError(f"partition={config.partition}: {error}") from error


def _template(config: Config, dataset: Dataset, model: MakeModel | None) -> nn.Module:
    torch.manual_seed(config.seed)
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    if model is not None:
        return model()
    try:
        return models.build(config.model, dataset.shape, dataset.classes)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def _agreed(config: Config, dataset: Dataset, saved: dict[str, Any] | None) -> Config:
    """The options with the number of threads settled; they must be those of the checkpoint."""
    before = {} if saved is None else saved["config"]
    if config.threads is None:
        config = replace(config, threads=before.get("threads", torch.get_num_threads()))
    if saved is None:
        return config
    now = config.to_dict()
    for key in sorted((now.keys() | before.keys()) - {"name", "out"}):
        if now.get(key) != before.get(key):
            raise ConfigError(
                f"--resume goes on with the options of the run in {config.folder}: {key} was "
                f"{before.get(key, 'not given')}, got {now.get(key, 'none')}"
            )
    if saved["data"] != dataset.digest:
        raise ConfigError(f"--resume: the data are not those of the run in {config.folder}")
    return config


@contextmanager
def _settings(config: Config) -> Iterator[None]:
    # torch imports its compiler with the first optimizer: a second that no round should be charged.
    importlib.import_module("torch._dynamo")
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.set_num_threads(config.threads or threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: expected one that torch has here, got {name!r}: {reason}"
        ) from error
    return device


def _to(split: Split, device: torch.device) -> Split:
    return Split(split.images.to(device), split.labels.to(device))


def _head(model: MakeModel | None, data: Dataset | None) -> str:
    """What no option can say: that the model or the data came from Python."""
    given = []
    if model is not None:
        given.append(f"model {getattr(model, '__name__', type(model).__name__)}")
    if data is not None:
        given.append(f"data {data.name}")
    return f"# from Python, whatever is said below: {', '.join(given)}\n\n" if given else ""
