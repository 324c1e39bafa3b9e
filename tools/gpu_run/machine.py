"""The card: what it is, how fast it copies and reads, and how much it fetches at a time."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from typing import Any

import torch
import triton

from gpu_run.bench import Bench

#: CU_LIMIT_MAX_L2_FETCH_GRANULARITY of the driver API: bytes, a hint.
_L2_FETCH = 5


def l2_fetch(value: int | None = None) -> int | None:
    """The limit of the current context, set first if asked; None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if value is not None:
        driver.cuCtxSetLimit(_L2_FETCH, ctypes.c_size_t(value))
    got = ctypes.c_size_t()
    return int(got.value) if driver.cuCtxGetLimit(ctypes.byref(got), _L2_FETCH) == 0 else None


def smi() -> str:
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def versions() -> dict[str, str | None]:
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


def machine(bench: Bench) -> None:
    """Bandwidth at the sizes of float32 values and of what four of them take; then the clocks,
    whose program may take seconds to start."""
    bench.note(versions=versions())
    if bench.real:
        card = torch.cuda.get_device_properties(0)
        bench.note(
            card=card.name, memory=card.total_memory, multiprocessors=card.multi_processor_count,
            l2=card.L2_cache_size, capability=f"{card.major}.{card.minor}",
        )  # fmt: skip
    bandwidth: dict[str, Any] = {}
    for megabytes in (105, 420):
        count = (megabytes << 18) if bench.real else 1024
        sources = [torch.ones(count, device=bench.device) for _ in range(2)]
        target = torch.empty_like(sources[0])
        moved = 4 * count
        for name, run, factor in (
            ("copy", functools.partial(target.copy_, sources[0]), 2),
            ("read", functools.partial(torch.amax, sources[1]), 1),
        ):
            us = bench.median(run)
            rate = round(factor * moved / us / 1000, 1) if us else None
            bandwidth[f"{name} {megabytes} MB"] = {"us": us, "GB/s": rate}
            bench.note(bandwidth=bandwidth)
    bench.note(l2_fetch=l2_fetch() if bench.real else None, smi=smi())  # there is a context now
