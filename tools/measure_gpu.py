#!/usr/bin/env python
"""Everything to be measured on a borrowed GPU, in one command of five to eight minutes.

    python tools/measure_gpu.py --out build/gpu-run            on a machine with a GPU
    python tools/measure_gpu.py --out build/gpu-dry --dry-run  the same steps without one, tiny

Each step is a process of its own with a time limit. It writes OUT/STEP.json after each piece, so a
step that fails, hangs or is killed leaves what it had, and the next one starts. What is most worth
knowing comes first; limits grow with --minutes, and below five much is left out. What a step does
not need the later ones share. OUT/run.json says how each step ended.
`benchmarks/gpu_report.py --run OUT` makes a page of it.

Needed: torch with CUDA, triton, pytest. The C++ extension, whose bytes some contracts compare, is
built if pybind11 and a compiler are there. What can be carried to a machine without a network:

    python -m pip install --target build/carry pybind11 setuptools pytest-xdist
    python tools/measure_gpu.py --out build/gpu-dry --compile 90       (then carry build/triton)

The first fills build/carry, to be carried too: without pytest-xdist tests go one after another. The
second fills a Triton cache for sm_90, under the triton that will be used there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: What a failed step's record keeps of its output, in characters.
_TAIL = 4000
#: Of its limit, the seconds in which a step ought to have ended by itself.
_GRACE = 1.5
#: Minutes that the limits are planned for.
_MINUTES = 8.0


@dataclass(frozen=True)
class Step:
    """One process: its name, its time limit in seconds on a device, and what it is for."""

    name: str
    limit: float
    what: str
    #: For tests: what to run instead of this file with --step.
    command: tuple[str, ...] = ()


#: By what they are worth. Without the first, which mostly has nothing to do, their limits add up to
#: eight minutes: a run that is killed at each of them ends in time.
STEPS = (
    Step("build", 60, "the C++ extension, whose bytes some contracts compare"),
    Step("machine", 24, "card, clocks, L2 fetch size, bandwidth of copies and of reads"),
    Step("contracts", 120, "tests/gpu, and selections under stress"),
    Step("baseline", 64, "device time and kernels of every workload"),
    Step("ties", 36, "selections of inputs with ties"),
    Step("sweeps", 20, "each constant of _tuning.py, one after another"),
    Step("waits", 36, "host time of a call, numbers that ops fetch, captures without a warm-up"),
    Step("graphs", 16, "direct launches beside replays of a CUDA graph, of a local step too"),
    Step("peers", 50, "fedmap-sparse bench beside its peers"),
    Step("scale", 20, "10^9 parameters in bfloat16: prune, pack, encode, decode, step"),
    Step("experiment", 40, "fedmap-sparse run device=cuda"),
    Step("chunks", 12, "the entropy coder's masks in chunks of other lengths"),
    Step("winners", 16, "contracts with the fastest values"),
    Step("large", 12, "more than 2^31 elements: the contracts, and times"),
    Step("counters", 14, "ncu, one launch per kernel, where it is allowed"),
)


def write(path: Path, data: Any) -> None:
    """A file that is never seen half written."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)


def command_of(step: Step, out: Path, mode: Sequence[str], limit: float) -> list[str]:
    if step.command:
        return list(step.command)
    file = str(Path(__file__).resolve())
    return [
        sys.executable,
        file,
        "--step",
        step.name,
        "--out",
        str(out),
        "--until",
        str(time.time() + max(1.0, limit - _GRACE)),
        *mode,
    ]


def play(step: Step, out: Path, mode: Sequence[str], limit: float) -> dict[str, Any]:
    """Run one step to its end or its limit; what it wrote stays whatever happens."""
    start = time.monotonic()
    log = out / f"{step.name}.log"
    with log.open("w") as file:
        # A group of its own, so that what the step started ends with it.
        process = subprocess.Popen(
            command_of(step, out, mode, limit), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    state = {0: "done", 3: "skipped", None: "timed out"}.get(code, "failed")
    record: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - start, 1)}
    if state != "done":
        record["output"] = log.read_text(errors="replace")[-_TAIL:]
    return record


def git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """The commit that is measured: COMMIT, for a copy that is not a checkout of it, or git's."""
    if given := os.environ.get("COMMIT"):
        return given
    known = git("rev-parse", "HEAD") or "unknown"
    return known + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def conduct(
    steps: Sequence[Step], out: Path, mode: Sequence[str] = (), minutes: float = _MINUTES
) -> dict[str, Any]:
    """Play the steps in turn; each has its share of the time that those before it left."""
    out.mkdir(parents=True, exist_ok=True)
    planned = min(60.0, sum(step.limit for step in steps) / _MINUTES) * minutes
    end = time.monotonic() + planned
    run: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "mode": list(mode),
        "minutes": minutes,
        "steps": {},
    }
    write(out / "run.json", run)
    for at, step in enumerate(steps):
        share = step.limit / sum(other.limit for other in steps[at:])
        limit = share * (end - time.monotonic())
        if limit <= _GRACE:
            record: dict[str, Any] = {"state": "skipped", "seconds": 0.0, "output": "no time left"}
        else:
            print(f"{step.name}: {step.what}", flush=True)
            try:
                record = play(step, out, mode, limit)
            except Exception as error:  # such as a full disk: the next step may still go
                record = {
                    "state": "failed",
                    "seconds": 0.0,
                    "output": f"{type(error).__name__}: {error}",
                }
        run["steps"][step.name] = record
        write(out / "run.json", run)
        print(f"{step.name}: {record['state']} after {record['seconds']:.0f} s", flush=True)
    return run


def main() -> int:
    """0 if every step was done or had nothing to do, 1 otherwise."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description="Measure the kernels on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the JSON files")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: nothing is timed")
    parser.add_argument(
        "--compile", metavar="ARCH", help="fill build/triton for an architecture, as 90"
    )
    parser.add_argument("--steps", default=",".join(names), help=f"default: {','.join(names)}")
    parser.add_argument("--minutes", type=float, default=_MINUTES,
                        help="of all steps, whose limits grow with it; default 8")  # fmt: skip
    parser.add_argument("--step", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    mode = ["--dry-run"] * given.dry_run + (["--compile", given.compile] if given.compile else [])
    if given.step:
        sys.path[:0] = [str(ROOT / part) for part in ("", "tools", "tests/gpu_free", "build/carry")]
        from gpu_run import steps

        until = given.until or time.time() + 60
        return steps.run(given.step, given.out, until, given.dry_run, given.compile)
    wanted = given.steps.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"--steps: expected any of {', '.join(names)}, got {', '.join(unknown)}")
    chosen = [step for step in STEPS if step.name in wanted]
    if given.compile:
        chosen = [step for step in chosen if step.name in ("baseline", "sweeps")]
    run = conduct(chosen, given.out.resolve(), mode, given.minutes)
    return int(any(record["state"] in ("failed", "timed out") for record in run["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
