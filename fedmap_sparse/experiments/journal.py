"""What a run has done so far, in memory and on the disk."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from fedmap_sparse._files import write_atomically
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments.arm import Arm
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.data import Dataset
from fedmap_sparse.experiments.folder import Record, RunFolder


class Journal:
    """Records and states of a run's arms, saved after each round.

    Args:
        python: what came from Python, as in `folder.Found`.
        saved: what the checkpoint held, or None for a run that starts.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        dataset: Dataset,
        python: str,
        saved: dict[str, Any] | None,
    ) -> None:
        self.records: list[Record] = [] if saved is None else saved["records"]
        self._states: dict[str, Any] = {} if saved is None else saved["arms"]
        self._fixed = {"config": config.to_dict(), "data": dataset.digest, "python": python}
        self._folder = folder
        self._first = ""
        folder.write_metrics(self.records)

    def of(self, name: str) -> list[Record]:
        """The rounds of an arm."""
        return [record for record in self.records if record["arm"] == name]

    def start(self, arm: Arm) -> None:
        """Bring an arm to where it was left; a new one stays as it is.

        Raises:
            ConfigError: the checkpoint is of another model.
        """
        self._first = self._first or arm.name
        if arm.name not in self._states:
            self._states[arm.name] = arm.engine.state_dict()
            return
        try:
            arm.engine.load_state_dict(self._states[arm.name])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._folder.checkpoint}: does not fit the run: {error}"
            ) from error

    def before(self, arm: Arm) -> float:
        """A round will begin; the last one's broadcast is kept. Seconds that it took."""
        if arm.name != self._first or arm.round != arm.config.rounds - 1:
            return 0.0
        start = perf_counter()
        write_atomically(self._folder.broadcast, arm.broadcast())
        return perf_counter() - start

    def add(self, arm: Arm, record: Record) -> None:
        """A round has ended: from here on a run goes on after it."""
        self.records.append(record)
        self._states[arm.name] = arm.engine.state_dict()
        self._save()
        self._folder.write_metrics(self.records)

    def failed(self, arm: Arm) -> None:
        """Every draw of a round failed: a run that goes on draws anew instead of the same again."""
        self._states[arm.name]["attempt"] = arm.engine.attempt
        self._save()

    def end(self, arm: Arm) -> None:
        """The last round of an arm has ended."""
        path = self._folder.model if arm.name == self._first else self._folder.dense
        write_atomically(path, arm.model())

    def _save(self) -> None:
        self._folder.save({**self._fixed, "records": self.records, "arms": self._states})
