"""What a run shows while it runs: a bar on a terminal, elsewhere one line per round."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from fedmap_sparse import _command
from fedmap_sparse._text import printable, say
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments.folder import Record
from fedmap_sparse.experiments.report import human_bytes


class Observer:
    """Is told how a run goes; this one does nothing.

    Attributes:
        begun: set by the run once its folder is ready, so that it can be resumed.
        module: set by the run before each `round`: the global model, to look at and not to change.
        stop: set it to end the arm after the round that was told last; the other arms and the
            summary follow. `resume` goes on with an arm that was stopped.
    """

    begun = False
    module: nn.Module | None = None
    stop = False

    def begin(self, lines: list[str]) -> None:
        """What will be run."""

    def arm(self, name: str, records: list[Record], rounds: int) -> None:
        """An arm starts, or goes on after the rounds of `records`."""

    def round(self, record: Record) -> None:
        """A round has ended, and is in the checkpoint."""

    def end(self, lines: list[str]) -> None:
        """Everything is written."""

    def close(self) -> None:
        """No more is to come, for whatever reason; may be called twice."""


class Lines(Observer):
    """One line per round, for logs."""

    def __init__(self) -> None:
        self._rounds = 0
        self._starving: set[tuple[str, str]] = set()

    def begin(self, lines: list[str]) -> None:
        say(*lines)

    def arm(self, name: str, records: list[Record], rounds: int) -> None:
        self._rounds = rounds
        if records:
            say(f"{name}: going on after {len(records)} of {rounds} rounds")

    def round(self, record: Record) -> None:
        say(self.line(record), *self._new_starving(record))

    def line(self, record: Record) -> str:
        """A round in one line."""
        sent = human_bytes(record["uplink_bytes"] + record["downlink_bytes"])
        return (
            f"{record['arm']:<6}  {record['round'] + 1:>3}/{self._rounds} rounds  "
            f"accuracy {record['accuracy']:.2%}  density {record['density']:.2%}  "
            f"{sent}  {record['seconds']['total']:.1f} s{_troubles(record)}"
        )

    def _new_starving(self, record: Record) -> list[str]:
        """A warning for each layer that starves since this round."""
        new = {
            k: v for k, v in record["starving"].items() if (record["arm"], k) not in self._starving
        }
        self._starving |= {(record["arm"], name) for name in new}
        return [f"warning: {record['arm']}, round {record['round']}: {v}" for v in new.values()]

    def end(self, lines: list[str]) -> None:
        say(*lines)


class Bar(Lines):
    """A bar an arm, with accuracy, density and bytes so far."""

    def __init__(self) -> None:
        super().__init__()
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description:<6}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} rounds"),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._task: Any = None
        self._sent = 0

    def arm(self, name: str, records: list[Record], rounds: int) -> None:
        self._progress.start()
        self._task = self._progress.add_task(name, total=rounds, state="")
        self._sent = 0
        for record in records:
            self.round(record)

    def round(self, record: Record) -> None:
        self._sent += record["uplink_bytes"] + record["downlink_bytes"]
        state = (
            f"accuracy {record['accuracy']:.2%}  density {record['density']:.2%}  "
            f"{human_bytes(self._sent)}"
        )
        self._progress.update(self._task, advance=1, state=state)
        lines = self._new_starving(record)
        if troubles := _troubles(record):
            lines.append(f"{record['arm']}, round {record['round']}:{troubles}")
        for line in lines:
            self._progress.console.print(printable(line), highlight=False, markup=False)

    def end(self, lines: list[str]) -> None:
        self.close()
        super().end(lines)

    def close(self) -> None:
        self._progress.stop()


class TensorBoard:
    """Writes a run's records for TensorBoard, with its own writer; one folder for each arm.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            with _command.held():
                from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "tensorboard: not installed; pip install 'fedmap-sparse[tensorboard]'"
            ) from error
        self._make = SummaryWriter
        self._folder = folder
        self._writers: dict[str, Any] = {}

    def add(self, record: Record) -> None:
        """Write every number of a record; its rounds are the steps."""
        arm = record["arm"]
        if arm not in self._writers:
            self._writers[arm] = self._make(str(self._folder / arm))
        for name, value in _numbers(record).items():
            self._writers[arm].add_scalar(name, value, record["round"])
        self._writers[arm].flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _numbers(record: Record) -> dict[str, float]:
    """The numbers of a record and of its dicts, by name."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        inside = {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else None
        flat |= inside or {name: value}
    return {k: v for k, v in flat.items() if isinstance(v, int | float) and k != "round"}


def observer() -> Observer:
    """Bars on a terminal where rich is installed, else lines."""
    if sys.stdout.isatty():
        try:
            return Bar()
        except ImportError:
            pass
    return Lines()


def _troubles(record: Record) -> str:
    parts = [] if record.get("epsilon") is None else [f"  epsilon {record['epsilon']:.3g}"]
    parts += [f"  refused {client}: {reason}" for client, reason in record["refused"].items()]
    if record["attempts"] > 1:
        parts.append(f"  drawn {record['attempts']} times, as too few answered")
    if record["dropped"]:
        parts.append(f"  no answer from {', '.join(map(str, record['dropped']))}")
    return "".join(parts)
