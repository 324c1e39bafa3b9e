"""A pytest plugin of the steps that run tests: each test's end as a line of a file, and constants.

It serves pytest-xdist's workers too, where the constants matter; the lines are the controller's.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

#: The environment variable with `settings` and `lines`, as JSON.
GIVEN = "FEDMAP_SPARSE_GPU_RUN"
#: What is kept of a failure's text, in characters.
_TEXT = 700


def pytest_configure(config: Any) -> None:
    given = json.loads(os.environ[GIVEN])
    tuning = importlib.import_module("fedmap_sparse.triton_kernels._tuning")
    for name, value in given["settings"].items():
        setattr(tuning, name, tuple(value) if isinstance(value, list) else value)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Lines(Path(given["lines"])))


class _Lines:
    def __init__(self, path: Path) -> None:
        self.path = path

    def tell(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def ended(self, report: Any, seconds: float) -> None:
        text = str(report.longrepr)[-_TEXT:] if report.failed else ""
        self.tell(test=report.nodeid, outcome=report.outcome, seconds=seconds, text=text)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.ended(report, round(report.duration, 2))

    def pytest_collectreport(self, report: Any) -> None:
        if not report.passed:
            self.ended(report, 0.0)

    def pytest_collection_finish(self, session: Any) -> None:
        if session.items:
            self.tell(collected=len(session.items))

    @pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which may be missing
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.tell(collected=len(ids))
