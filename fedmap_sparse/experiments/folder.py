"""The output folder of a run: its files, its lock, and what a run may go on from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmap_sparse._files import write_atomically
from fedmap_sparse.errors import CheckpointError, ConfigError, StateError
from fedmap_sparse.experiments import checkpoint, options, saved
from fedmap_sparse.experiments.config import Config, is_complete
from fedmap_sparse.experiments.lock import Lock

Record = dict[str, Any]

#: The first words of config.toml where the model or the data came from Python.
FROM_PYTHON = "# from Python, whatever is said below: "


@dataclass
class Found:
    """What an earlier process left of a run.

    Attributes:
        state: what the checkpoint holds; None if no round had ended.
        options: of the run, complete or as config.toml has them; None if there is no run.
        python: what came from Python ("model Net, data mine"); empty for a run from options alone.
        notes: lines for the user, such as that the last checkpoint is damaged.
    """

    state: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    python: str = ""
    notes: list[str] = field(default_factory=list)


class RunFolder:
    """Names, reads and writes the files of a run.

    Attributes:
        config: the options: config.toml.
        metrics: one JSON object for each arm and round, one per line: metrics.jsonl.
        summary: the result of each arm: summary.json.
        curves: curves.png.
        checkpoint, previous: everything a run needs to go on, after the last round and the one
            before it.
        broadcast: FedMap's last broadcast, self-contained: broadcast.fedmap.
        model, dense: the final models, dense state dicts, FedMap's with zeros.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.checkpoint = path / "checkpoint.safetensors"
        self.previous = path / "checkpoint.previous.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self.broadcast = path / "broadcast.fedmap"
        self.model = path / "model.safetensors"
        self.dense = path / "model-dense.safetensors"
        self._lock = path / ".lock"
        self._sound = True  # false while `checkpoint` is known to be damaged

    @property
    def _files(self) -> list[Path]:
        """A run's files, in the order they are removed: without its options nothing goes on."""
        found = [p for p in vars(self).values() if isinstance(p, Path)]
        paths = [p for p in found if p not in (self.path, self._lock)]
        return [*paths, *(p.with_name(f".{p.name}.partial") for p in paths)]

    @contextmanager
    def open(self, *, resume: bool, overwrite: bool) -> Iterator[Found]:
        """Hold the folder for one run, and give what to go on from.

        With `overwrite` the files of an earlier run are removed, and nothing else in the folder.

        Raises:
            ConfigError: another run is at work in the folder; or it holds something and neither
                option was given, or both were; or it cannot be written; or its run is damaged.
        """
        if resume and overwrite:
            raise ConfigError("--resume goes on with a run, --overwrite removes it: give one")
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"{self.path}: expected a folder, got a file")
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self._lock)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror}") from error
        except ValueError as error:  # NUL, or a name that the file system cannot encode
            raise ConfigError(f"{self.path}: not a path: {error}") from error
        try:
            if not resume and not overwrite and self._holds_something():
                raise ConfigError(
                    f"{self.path} exists: --resume goes on with it, --overwrite replaces it, "
                    "name=... or --out DIR puts the run elsewhere"
                )
            if overwrite:
                self._clear()
            found = self.find() if resume else Found()
            if not lock.sure:
                found.notes.append(f"note: {self.path} has no locks; start no second run in it")
            yield found
        finally:
            lock.release()

    def _holds_something(self) -> bool:
        return any(path != self._lock for path in self.path.iterdir())

    def _clear(self) -> None:
        try:
            for path in self._files:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be replaced: {error.strerror}") from error

    def find(self) -> Found:
        """The run in the folder, if there is one to resume; nothing is changed.

        Raises:
            ConfigError: checkpoints that are damaged, or a config.toml that no run wrote.
        """
        found = Found()
        try:
            found.state = self._load(found.notes)
            text = self._config_text()
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from error
        values = options.parse(text, self.config) if text.strip() else {}
        if is_complete(values):
            found.options = values
            if (first := text.splitlines()[0]).startswith(FROM_PYTHON):
                found.python = first.removeprefix(FROM_PYTHON)
        if found.state is not None:
            found.python = found.state["python"]
            if found.options is None:
                found.options = found.state["config"]
                found.notes.append(
                    f"note: {self.config} lacks the run's options; they are the checkpoint's"
                )
        elif text.strip() and found.options is None:
            raise ConfigError(
                f"{self.config}: not the options of a run, so there is none to go on with; "
                "--overwrite replaces it"
            )
        return found

    def _config_text(self) -> str:
        try:
            return options.read_text(self.config)
        except FileNotFoundError:
            return ""

    def _load(self, notes: list[str]) -> dict[str, Any] | None:
        troubles = []
        for path in (self.checkpoint, self.previous):
            if not path.exists():
                continue
            try:
                state: dict[str, Any] = checkpoint.load(path)
                saved.check(state)
            except CheckpointError as error:
                troubles.append(str(error))
                continue
            except StateError as error:
                troubles.append(f"{path}: not a run's checkpoint: {error}")
                continue
            if path == self.previous:
                why = troubles[0] if troubles else f"{self.checkpoint} is missing"
                notes.append(f"note: {why}; going on from the one before, {self.previous.name}")
            self._sound = not troubles
            return state
        if troubles:
            raise ConfigError(f"{'; '.join(troubles)}; --overwrite starts anew")
        return None

    def save(self, state: dict[str, Any]) -> None:
        """The checkpoint. The one before is kept, unless it is damaged: then its predecessor is."""
        checkpoint.save(self.checkpoint, state, keep=self.previous if self._sound else None)
        self._sound = True

    def write_config(self, config: Config, python: str) -> None:
        """config.toml, unless it is there: a run that goes on leaves it alone."""
        if not self._config_text().strip():
            head = f"{FROM_PYTHON}{python}\n\n" if python else ""
            write_atomically(self.config, (head + config.to_toml()).encode())

    def write_metrics(self, records: Sequence[Record]) -> None:
        """metrics.jsonl."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(self.metrics, text.encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """summary.json."""
        write_atomically(self.summary, (json.dumps(summary, indent=2) + "\n").encode())
