"""What the steps share: the device or its stand-in, the clock, the deadline, the results' file."""

from __future__ import annotations

import contextlib
import importlib
import json
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fedmap_sparse.bench.timing import QUEUE_CYCLES, flush

#: Elements of a workload: on a device 105 MB of float32, which no L2 cache holds.
SIZE, DRY_SIZE, COMPILE_SIZE = 26_214_400, 4096, 65536


class Skip(Exception):
    """Why a step has nothing to do here."""


class Bench:
    """One step's view of the machine."""

    def __init__(self, name: str, out: Path, limit: float, dry: bool, arch: str | None) -> None:
        self.name, self.out, self.dry, self.arch = name, out, dry, arch
        self.real = not dry and arch is None
        self.deadline = time.monotonic() + limit
        self.device = torch.device("cuda" if self.real else "cpu")
        self.n = SIZE if self.real else DRY_SIZE if dry else COMPILE_SIZE
        self.found: dict[str, Any] = {"dry": not self.real}
        if self.real and not torch.cuda.is_available():
            raise Skip("torch finds no CUDA device; --dry-run goes through the steps without one")

    def left(self) -> float:
        """Seconds until this step has to be done."""
        return self.deadline - time.monotonic()

    def note(self, **more: Any) -> None:
        """Keep these results, in the file too."""
        self.found.update(more)
        path = self.out / f"{self.name}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1) + "\n")
        part.replace(path)

    def earlier(self, step: str) -> dict[str, Any]:
        """What another step of this run found; empty if it did not get so far."""
        path = self.out / f"{step}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    @contextlib.contextmanager
    def launches(self) -> Iterator[None]:
        """Inside, kernels go to the device, or to what stands in for it."""
        if self.real:
            yield
        elif self.dry:
            with without_launches():
                yield
        else:
            from gpucheck.driver import compile_only

            assert self.arch is not None
            with compile_only(int(self.arch) if self.arch.isdigit() else self.arch):
                yield

    def clock(self, run: Callable[[], object], repeats: int = 15) -> list[float]:
        """Microseconds of the device's own time, one per repeat; of a stand-in one zero.

        Launches are queued while the device idles, and its L2 was filled by reads before.
        """
        with self.launches():
            run()  # compiles
        if not self.real:
            return [0.0]
        run()
        torch.cuda.synchronize()
        pairs = []
        for _ in range(repeats):
            flush()
            torch.cuda._sleep(QUEUE_CYCLES)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [1000 * start.elapsed_time(end) for start, end in pairs]

    def median(self, run: Callable[[], object], **how: Any) -> float:
        return round(statistics.median(self.clock(run, **how)), 2)


def by_profiler(run: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Mean microseconds of each kernel in one run."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return {
        event.key: round(event.self_device_time_total / repeats, 2)
        for event in watched.key_averages()
        if event.self_device_time_total > 0
    }


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Launchers run, kernels do not: what a dry run can show of a workload."""
    from fedmap_sparse import triton_kernels

    with contextlib.ExitStack() as stack:
        for found in pkgutil.iter_modules(triton_kernels.__path__):
            module = importlib.import_module(f"fedmap_sparse.triton_kernels.{found.name}")
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch"))
        yield


@contextlib.contextmanager
def tuned(settings: dict[str, Any]) -> Iterator[None]:
    """Constants of `triton_kernels/_tuning.py` at other values."""
    tuning = importlib.import_module("fedmap_sparse.triton_kernels._tuning")
    before = {name: getattr(tuning, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(tuning, name, tuple(value) if isinstance(value, list) else value)
        yield
    finally:
        for name, value in before.items():
            setattr(tuning, name, value)
