"""The output folder of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedmap_sparse.errors import CheckpointError, ConfigError
from fedmap_sparse.experiments import checkpoint

Record = dict[str, Any]


class RunFolder:
    """Names and writes the files of a run.

    Attributes:
        config: the options, complete: config.toml.
        metrics: one JSON object a line and round: metrics.jsonl.
        summary: the result of each arm: summary.json.
        curves: curves.png.
        checkpoint: everything a run needs to go on: checkpoint.safetensors.
        broadcast: FedMap's last broadcast, self-contained: broadcast.fedmap.
        model: FedMap's final model, a dense state dict with zeros: model.safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self.checkpoint = path / "checkpoint.safetensors"
        self.broadcast = path / "broadcast.fedmap"
        self.model = path / "model.safetensors"

    def open(self, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Make the folder ready, and give the state to go on from, if there is one.

        With `overwrite` the files of an earlier run are removed, and nothing else in the folder.

        Raises:
            ConfigError: the folder holds something, and neither option was given; or both were;
                or its checkpoint is damaged.
        """
        if resume and overwrite:
            raise ConfigError("--resume goes on with a run, --overwrite removes it: give one")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: expected a folder, got a file")
        if self.path.is_dir() and any(self.path.iterdir()) and not (resume or overwrite):
            raise ConfigError(
                f"{self.path} exists: --resume goes on with it, --overwrite replaces it, name=... "
                "or --out DIR puts the run elsewhere"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for file in vars(self).values():
                    if file != self.path:
                        file.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror}") from error
        if resume and self.checkpoint.exists():
            try:
                state: dict[str, Any] = checkpoint.load(self.checkpoint)
            except CheckpointError as error:
                raise ConfigError(str(error)) from error
            return state
        return None

    def write_metrics(self, records: list[Record]) -> None:
        """All of metrics.jsonl anew: at the start, so that it says what the checkpoint says."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        checkpoint.write_atomically(self.metrics, text.encode())

    def add_metrics(self, record: Record) -> None:
        """One more line of metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """summary.json."""
        checkpoint.write_atomically(self.summary, (json.dumps(summary, indent=2) + "\n").encode())
