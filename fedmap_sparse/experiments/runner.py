"""One experiment from options to figures: FedMap, and dense FedAvg beside it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from fedmap_sparse._files import write_atomically
from fedmap_sparse._text import printable, shown
from fedmap_sparse.errors import ConfigError, RoundFailed
from fedmap_sparse.experiments import baselines, hardening, models, report
from fedmap_sparse.experiments import partition as partitions
from fedmap_sparse.experiments.arm import Arm
from fedmap_sparse.experiments.config import Config, build
from fedmap_sparse.experiments.data import Dataset, load
from fedmap_sparse.experiments.folder import Found, RunFolder
from fedmap_sparse.experiments.journal import Journal
from fedmap_sparse.experiments.lean import no_compiler
from fedmap_sparse.experiments.partition import Index
from fedmap_sparse.experiments.progress import Observer, TensorBoard
from fedmap_sparse.experiments.setting import prepared, threads_of

#: Options that may differ from those of the run that is gone on with.
_FREE = {"name", "out", "processes", "tensorboard"}

MakeModel = nn.Module | Callable[[], nn.Module]
Parts = Sequence[ArrayLike]


def run(
    config: Config,
    *,
    model: MakeModel | None = None,
    data: Dataset | None = None,
    parts: Parts | None = None,
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
        parts: for each of `config.clients` the indices of its training samples, one client per
            site or device say, instead of `config.partition`.
        resume: go on with the run in the folder; start it if there is none.
        overwrite: replace the run in the folder.
        observer: is told of each round, sees the model, and may stop an arm.

    Returns:
        What summary.json holds: for each arm ("fedmap", "dense") `accuracy` and `loss` on test,
        `validation_accuracy`, `density`, `survivors`, `prunable`, `uplink_bytes`,
        `downlink_bytes`, `seconds`, `rounds`, `seed`, `phases` (seconds by phase), and
        `overhead`, the share of the time that was not forward, backward or evaluation.

    Raises:
        ConfigError: options that cannot be, a folder that holds a run, another run's checkpoint.
        DataError: data that are missing or malformed.
        RoundFailed: a round with fewer usable updates than `config.min_updates`, in each of its
            `config.attempts` draws. A resumed run goes on with further draws.
        OSError: a file of the folder that cannot be written; what was written before stands.
    """
    watch = Observer() if observer is None else observer
    hardening.check(config)
    python = _from_python(model, data, parts)
    budget = torch.get_num_threads()
    dataset = load(config.dataset or "", config.data) if data is None else data
    device = _device(config.device)
    shares = partition(config, dataset, parts)
    folder = RunFolder(config.folder)
    board = TensorBoard(folder.path / "tensorboard") if config.tensorboard else None
    with _random_state(), no_compiler():
        template = _template(config, dataset, model).to(device)
        with folder.open(resume=resume, overwrite=overwrite) as found:
            threads = threads_of(config, device, own_model=model is not None)
            config = _agreed(config, dataset, python, found, threads)
            folder.write_config(config, python)
            watch.begun = True
            with _threads(config.threads):
                title = config.model if model is None else type(template).__name__
                opening = report.opening(config, dataset, template, title)
                watch.begin([*opening, *found.notes])
                journal = Journal(folder, config, dataset, python, found.state)
                arms = baselines.arms(config)
                left = len(arms) * config.rounds - len(journal.records)
                summary = {}
                with prepared(
                    config,
                    template,
                    dataset,
                    shares,
                    device,
                    own_model=model is not None,
                    rounds=left,
                    budget=budget,
                ) as setting:
                    for name, schedule in arms.items():
                        arm = Arm(name, config, schedule, setting)
                        summary[name] = _play(arm, journal, watch, board)
            return _finish(folder, journal, summary, watch)


def _play(arm: Arm, journal: Journal, watch: Observer, board: TensorBoard | None) -> dict[str, Any]:
    """The rounds of an arm that are left; its summary."""
    journal.start(arm)
    watch.arm(arm.name, journal.of(arm.name), arm.config.rounds)
    saving = 0.0
    watch.stop = False
    while arm.round < arm.config.rounds and not watch.stop:
        try:
            saving += journal.before(arm)
            record = arm.play(saving)
        except RoundFailed:
            journal.failed(arm)
            raise
        start = perf_counter()
        journal.add(arm, record)
        saving = perf_counter() - start
        if board is not None:
            board.add(record)
        watch.module = arm.server.params.module
        watch.round(record)
    journal.end(arm)
    return arm.summary(journal.of(arm.name))


def _finish(
    folder: RunFolder, journal: Journal, summary: dict[str, Any], watch: Observer
) -> dict[str, Any]:
    folder.write_summary(summary)
    lines = report.closing(summary)
    try:
        write_atomically(folder.curves, report.curves(journal.records))
    except ImportError:
        lines.append("no curves.png without matplotlib: pip install 'fedmap-sparse[plots]'")
    watch.end([*lines, f"everything is in {folder.path}"])
    return summary


def partition(config: Config, dataset: Dataset, parts: Parts | None = None) -> list[Index]:
    """Which training samples each client has; `parts` as in `run`.

    Raises:
        ConfigError: more clients (or shards) than samples, or not as many as groups or parts.
    """
    given = {"alpha": config.alpha, "shards": config.shards}
    options = {key: value for key, value in given.items() if value is not None}
    labels = dataset.train.labels.numpy()
    try:
        if parts is not None:
            return partitions.given(parts, config.clients, len(labels))
        if config.partition == partitions.GROUPS:
            if dataset.groups is None:
                raise ValueError("the data have no groups (g_train of an .npz)")
            return partitions.by_groups(dataset.groups, config.clients)
        share = partitions.PARTITIONS[config.partition]
        return share(labels, config.clients, seed=config.data_seed, **options)
    except ValueError as error:
        what = f"partition={config.partition}" if parts is None else "parts"
        raise ConfigError(f"{what}: {error}") from error


def _template(config: Config, dataset: Dataset, model: MakeModel | None) -> nn.Module:
    assert config.model_seed is not None
    torch.manual_seed(config.model_seed)
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    if model is not None:
        return model()
    try:
        return models.build(config.model, dataset.shape, dataset.classes)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def _agreed(config: Config, dataset: Dataset, python: str, found: Found, threads: int) -> Config:
    """The options with the number of threads settled; they must be those of the run that is there.

    Args:
        threads: where neither the options nor the run say.

    Raises:
        ConfigError: another option, other data, or a model that came from elsewhere.
    """
    if found.state is not None:
        before = build(found.state["config"]).to_dict()
    elif found.options is not None:
        before = build(found.options).to_dict()
    else:
        before = {}
    if config.threads is None:
        config = config.with_threads(int(before.get("threads", threads)))
    if found.options is None:
        return config
    now = config.to_dict()
    if found.state is None:  # no round has ended, so the number of threads is not settled
        before["threads"] = now["threads"]
    for key in sorted((now.keys() | before.keys()) - _FREE):
        if now.get(key) != before.get(key):
            raise ConfigError(
                f"--resume goes on with the options of the run in {config.folder}: {key} was "
                f"{before.get(key, 'not given')}, got {now.get(key, 'none')}"
            )
    if found.state is not None and found.state["data"] != dataset.digest:
        raise ConfigError(f"--resume: the data are not those of the run in {config.folder}")
    if python != found.python:
        raise ConfigError(
            f"--resume: the run in {config.folder} has {found.python or 'nothing'} from Python, "
            f"this one {python or 'nothing'}"
        )
    return config


@contextmanager
def _random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(name: str) -> torch.device:
    """The device, tried: torch makes empty tensors on some that cannot compute, such as meta."""
    try:
        device = torch.device(name)
        float(torch.ones(2, device=device).sum())
    # Devices that are not built in fail as they like, some with an import of their plug-in.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"device: expected one that torch has here, got {shown(name)}: {reason[:200]}"
        ) from error
    return torch.device("cpu") if device.type == "cpu" else device


def _from_python(model: MakeModel | None, data: Dataset | None, parts: Parts | None) -> str:
    """A note of what came from Python, which no option can say."""
    given = []
    if model is not None:
        given.append(f"model {getattr(model, '__name__', type(model).__name__)}")
    if data is not None:
        given.append(f"data {printable(data.name)}")
    if parts is not None:
        state = hashlib.sha256(repr([np.asarray(part).tolist() for part in parts]).encode())
        given.append(f"parts {state.hexdigest()[:16]}")
    return ", ".join(given)
