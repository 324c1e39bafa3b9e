"""What a caller waits for: numbers that ops fetch, host time, captures without a warm-up."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_run.bench import Bench

_ROOT = Path(__file__).resolve().parents[2]
_PARTS = ("", "tools", "tests/gpu_free")
#: Ops that are captured in a process that has compiled none of their kernels.
CAPTURED = ("select", "select of 8", "pack", "unpack", "extract", "deposit", "masked_sgd")


def calls(n: int, device: torch.device, by: str) -> dict[str, Callable[[], Any]]:
    """Every op as users call it. Masks are made from Booleans: no selection compiles before."""
    from fedmap_sparse import Mask, ops

    values, other = torch.randn(n, device=device), torch.randn(n, device=device)
    parent = Mask.from_bool(torch.rand(n, device=device) < 0.5)
    child = Mask.from_bool(parent.to_bool() & (torch.rand(n, device=device) < 0.2))
    bits = Mask.from_bool(torch.rand(parent.nnz, device=device) < 0.2)
    packed = torch.randn(child.nnz, device=device)
    momentum, pruned = torch.zeros_like(packed), values * child.to_bool()
    parts = [torch.randn(n // 8, device=device) for _ in range(8)]
    keep = n // 10
    return {
        "select": lambda: ops.magnitude_mask(values, keep, backend=by),
        "select within": lambda: ops.magnitude_mask(values, keep, within=parent, backend=by),
        "select of 8": lambda: ops.magnitude_mask(parts, keep, backend=by),
        "pack": lambda: ops.pack(values, child, backend=by),
        "unpack": lambda: ops.unpack(packed, child, backend=by),
        "extract": lambda: ops.extract(child, parent, backend=by),
        "deposit": lambda: ops.deposit(bits, parent, backend=by),
        "masked_sgd": lambda: ops.masked_sgd_(
            pruned, child, other, lr=0.1, momentum=0.9, momentum_buffer=momentum, backend=by
        ),
        "weighted_mean of 10": lambda: ops.weighted_mean([values] * 10, [1.0] * 10, backend=by),
        "cast": lambda: ops.cast(values, torch.bfloat16, backend=by),
        "quantize_int8": lambda: ops.quantize_int8(values, backend=by),
        "digest": child.digest,
    }


@contextlib.contextmanager
def fetched(device: torch.device) -> Iterator[list[str]]:
    """What waits for the device inside, by torch's own watch; on a CPU nothing does."""
    seen: list[str] = []
    if device.type != "cuda":
        yield seen
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seen += [
        f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
    ]


def host_us(run: Callable[[], object], repeats: int = 50) -> float:
    """Median microseconds until a call returns, the device busy with those before."""
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return round(statistics.median(times), 1)


def waits(bench: Bench) -> None:
    """Captures first, each in a process of its own; then what each op fetches, and host time."""
    captures: dict[str, str] = {}
    by = "triton" if bench.real else "reference"
    for name in CAPTURED:
        if bench.left() < 5:
            bench.note(left_out=f"from the capture of {name} on: no time left")
            break
        captures[name] = elsewhere(name, bench.left()) if bench.real else attempt(name, False)
        bench.note(captures=captures)
    syncs: dict[str, list[str]] = {}
    host: dict[str, float] = {}
    for name, run in calls(1 << 20 if bench.real else 5000, bench.device, by).items():
        run()  # compiles
        with fetched(bench.device) as seen:
            run()
        syncs[name] = seen
        if bench.real:
            host[name] = host_us(run)
        bench.note(syncs=syncs, host_us=host)


def elsewhere(name: str, seconds: float) -> str:
    """`attempt` in a fresh process: a capture that fails may leave its context of no use."""
    path = os.pathsep.join(str(_ROOT / part) for part in _PARTS)
    code = (
        f"import json\nfrom gpu_run import waits\nprint(json.dumps(waits.attempt({name!r}, True)))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, timeout=max(5.0, seconds), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "no end in time"
    if done.returncode:
        return f"ended with {done.returncode}: {done.stderr[-300:]}"
    return str(json.loads(done.stdout.splitlines()[-1]))


def attempt(name: str, real: bool) -> str:
    """Capture one op that has not run before, replay it, and compare with a call, unless it works
    in place."""
    device = torch.device("cuda" if real else "cpu")
    run = calls(100_000, device, "triton" if real else "reference")[name]
    try:
        out, replay = captured(run, real)
    except Exception as error:  # which is what is to be known
        return f"refused: {type(error).__name__}: {str(error)[:200]}"
    replay()
    got = flat(out)
    if got != flat(run()):
        return "replayed, other values"
    return "replayed"


def captured(run: Callable[[], Any], real: bool) -> tuple[Any, Callable[[], None]]:
    """What a call gives, and its replay: a CUDA graph's, or on a stand-in the call itself."""
    if not real:
        return run(), lambda: None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return out, graph.replay


def flat(out: Any) -> list[Any]:
    """The values in a result, to be compared; nothing for an op in place."""
    if isinstance(out, Tensor):
        return [out.cpu().tolist()]
    if isinstance(out, list | tuple):
        return [part for each in out for part in flat(each)]
    return [] if out is None else [out.words.cpu().tolist()]
