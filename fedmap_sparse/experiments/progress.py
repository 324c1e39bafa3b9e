"""What a run shows while it runs: a bar on a terminal, elsewhere one line per round."""

from __future__ import annotations

import sys
from typing import Any

from fedmap_sparse._text import printable, say
from fedmap_sparse.experiments.folder import Record
from fedmap_sparse.experiments.report import human_bytes


class Observer:
    """Is told how a run goes; this one does nothing.

    Attributes:
        begun: set by the run once its folder is ready, so that it can be resumed.
    """

    begun = False

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
