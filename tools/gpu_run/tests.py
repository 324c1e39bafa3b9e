"""Tests as a part of a step: in eight processes where pytest-xdist is installed, ended in time."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_run import watch
from gpu_run.bench import Bench

_ROOT = Path(__file__).resolve().parents[2]
#: Most of a test's time on a GPU is a compiler's, of one core, and the host of the H200 has 16.
_WORKERS = 8
#: Nothing of tests/conftest.py: it wants further packages.
_FIXED = ("-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "gpu_run.watch", "--tb=short",
          f"--confcutdir={_ROOT / 'tests' / 'gpu'}")  # fmt: skip
#: How many of the longest tests are told.
_LONGEST = 8


def run_tests(
    bench: Bench,
    *arguments: str,
    settings: dict[str, Any] | None = None,
    seconds: float | None = None,
    workers: int | None = None,
) -> str:
    """How many tests passed and failed, with constants at `settings`; RuntimeError for a failure.

    They are killed after `seconds` (the step's time); what ended before is kept, and noted as it
    comes.
    """
    lines = bench.out / f"{bench.name}.tests"
    lines.write_text("")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "tools"), *sys.path]),
        watch.GIVEN: json.dumps({"settings": settings or {}, "lines": str(lines)}),
    }
    spread: list[str] = []
    if workers is None:
        workers = min(_WORKERS, os.cpu_count() or 1) if bench.real else 1
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        spread = [f"-n{workers}", "--maxschedchunk=1"]
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *_FIXED, *spread, *arguments],
        cwd=_ROOT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + (bench.left() - 1 if seconds is None else seconds)
    code: int | None = None
    try:
        while code is None and time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(1.0)
            note(bench, lines)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()
    line = note(bench, lines) + ("" if code is not None else ", then no time left")
    bench.note(tests=line, code=code)
    if bench.found["failures"] or code not in (0, 5, None):  # 5: there was none
        raise RuntimeError(f"tests: {line}")
    return line


def note(bench: Bench, lines: Path) -> str:
    """Keep what the tests told so far; returns it as a line."""
    # The last line may be half written.
    told = [json.loads(line) for line in lines.read_text().splitlines(True) if line[-1:] == "\n"]
    tests = {row["test"]: row for row in told if "test" in row}
    counts = Counter(row["outcome"] for row in tests.values())
    longest = sorted(tests.values(), key=lambda row: -row["seconds"])[:_LONGEST]
    bench.note(
        collected=max((row["collected"] for row in told if "collected" in row), default=0),
        failures={name: r["text"] for name, r in tests.items() if r["outcome"] == "failed"},
        longest={row["test"]: row["seconds"] for row in longest},
    )
    return ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "no tests"
