"""What the arms of an experiment have in common: model, samples, measures, worker processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.engines.workers import Bench, Workers
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import hardening, measures, models
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.data import Dataset, Split
from fedmap_sparse.experiments.lean import keep_memory, leave_compiler
from fedmap_sparse.experiments.partition import Index, noisy
from fedmap_sparse.experiments.shares import Shares, placed
from fedmap_sparse.experiments.training import make_client
from fedmap_sparse.flat import flatten


@dataclass(frozen=True)
class MakeBench:
    """What a worker process trains with, made there.

    Attributes:
        template: the model; its weights come with each broadcast.
        classes: how many there are.
    """

    config: Config
    template: nn.Module
    shares: Shares
    classes: int

    def __call__(self) -> Bench:
        leave_compiler()
        keep_memory()
        phases = Phases()
        client = make_client(self.config, flatten(self.template))
        train = hardening.training(self.config, self.shares, self.classes, phases)
        return Bench(client, train, phases)


@dataclass(frozen=True)
class Setting:
    """One for all arms of a run.

    Attributes:
        template: the model with its initial weights.
        shares: the samples that each client trains on.
        classes: how many there are.
        validation: on the device, in the model's layout.
        test: as it was loaded.
        clients: accuracy for each client.
        device: where everything is computed.
        nhwc: whether images are NHWC in memory.
        at_once: batches that are evaluated at a time.
        workers: the processes that train clients, if there may be several.
    """

    template: nn.Module
    shares: Shares
    classes: int
    validation: Split
    test: Split
    clients: measures.ClientAccuracy
    device: torch.device
    nhwc: bool
    at_once: int
    workers: Workers | None


@contextmanager
def prepared(
    config: Config,
    template: nn.Module,
    dataset: Dataset,
    parts: Sequence[Index],
    device: torch.device,
    *,
    own_model: bool,
    rounds: int,
    budget: int,
) -> Iterator[Setting]:
    """The setting of a run; its worker processes, if any, are ended at the end.

    Args:
        own_model: the model came from Python.
        rounds: how many are left, of all arms together.
        budget: threads that all processes may have together.
    """
    nhwc = config.layout == "nhwc"
    if config.layout is None and not own_model and device.type == "cpu":
        nhwc = config.model in models.NHWC
    assert config.data_seed is not None
    labels = dataset.train.labels.numpy()
    stay, held = measures.hold_out(parts, labels, config.holdout, config.data_seed)
    train = dataset.train
    if config.label_noise:
        wrong = noisy(labels, stay, config.label_noise, dataset.classes, config.data_seed)
        train = Split(train.images, torch.from_numpy(wrong))
    processes = processes_of(config, device, budget, own_model=own_model)
    shares = Shares(train, stay, device, nhwc=nhwc, shared=processes > 1)
    workers = None
    if processes > 1:
        make = MakeBench(config, copy.deepcopy(template), shares, dataset.classes)
        planned = rounds * config.cohort if config.processes is None else None
        assert config.threads is not None
        workers = Workers(
            make, processes, threads=config.threads, shared=shares.shared, planned=planned
        )
    try:
        yield Setting(
            template,
            shares,
            dataset.classes,
            placed(dataset.validation, device, nhwc),
            dataset.test,
            measures.ClientAccuracy(dataset.train, stay, held, dataset.classes, device),
            device,
            nhwc,
            1 if own_model else processes,
            workers,
        )
    finally:
        if workers is not None:
            workers.close()


def processes_of(config: Config, device: torch.device, budget: int, *, own_model: bool) -> int:
    """How many clients train at once: one where hostile ones look at what the others send.

    Raises:
        ConfigError: several processes where there can be one only.
    """
    given = config.processes
    if device.type != "cpu" or os.name != "posix" or config.attackers:
        if given not in (None, 1):
            why = "with attackers" if config.attackers else f"on {device}"
            raise ConfigError(f"processes: expected 1 {why}, got {given}")
        return 1
    if given is None:
        assert config.threads is not None
        given = 1 if own_model else max(1, budget // config.threads)
    return min(given, config.cohort)


def threads_of(config: Config, device: torch.device, *, own_model: bool) -> int:
    """Threads that a client trains with, unless the options say: 1 where clients can train in
    parallel, so that bits depend neither on the number of cores nor on `processes`."""
    alone = device.type != "cpu" or os.name != "posix" or (own_model and config.processes is None)
    return torch.get_num_threads() if alone else 1
