"""What a caller waits for: numbers that ops fetch, host time, captures without a warm-up."""

from __future__ import annotations

import contextlib
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu_run.bench import Bench
from gpu_run.extras import MARK, cuda_select

_ROOT = Path(__file__).resolve().parents[2]
_PARTS = ("", "tools", "tests/gpu_free")
#: Ops that are captured in a process that has compiled none of their kernels. A selection of a list
#: fetches the number of survivors of each tensor, which no capture allows.
CAPTURED = (
    f"select{MARK}",
    "select",
    "masked_sgd",
    "select within",
    "pack",
    "unpack",
    "extract",
    "deposit",
)
#: Such processes at a time: each takes 6 s on a GPU's host of 16 cores, most of it one import.
_AT_ONCE = 8
#: What torch warns of at each wait that it sees.
_SYNC = "called a synchronizing CUDA operation"


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
    work: dict[str, Callable[[], Any]] = {}
    for mark, form in ((MARK, "cuda"), ("", by)):
        if form == "cuda" and cuda_select()[1]:
            continue
        work |= {
            f"select{mark}": lambda b=form: ops.magnitude_mask(values, keep, backend=b),
            f"select within{mark}": lambda b=form: ops.magnitude_mask(
                values, keep, within=parent, backend=b
            ),
            f"select of 8{mark}": lambda b=form: ops.magnitude_mask(parts, keep, backend=b),
        }
    return work | {
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
    from ladder.syncs import watched

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with watched("warn"):
            yield seen
    seen += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if _SYNC in str(w.message)]


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
    """What each op fetches, and host time, on a machine with nothing else to do; then captures,
    each in a process of its own."""
    by = "triton" if bench.real else "reference"
    syncs: dict[str, list[str]] = {}
    host: dict[str, float] = {}
    found = calls(1 << 20 if bench.real else 5000, bench.device, by)
    for name, run in found.items():
        if bench.left() < 1:
            bench.note(left_out=f"from the host time of {name} on: no time left")
            break
        run()  # compiles
        with fetched(bench.device) as seen:
            run()
        syncs[name] = seen
        if bench.real:
            host[name] = host_us(run)
        bench.note(syncs=syncs, host_us=host)
    if bench.real:
        bench.note(parts_us={name: host_us(run) for name, run in parts(found["pack"]).items()})
        bench.note(profile={name: profiled(found[name]) for name in ("select", "masked_sgd")})
    captures: dict[str, str] = {}
    tried = [name for name in CAPTURED if name in found]

    def capture(name: str) -> None:
        if bench.left() < 2:
            captures[name] = "not tried: no time left"
        elif bench.real:
            captures[name] = elsewhere(name, bench.left() - 0.5)
        else:
            captures[name] = attempt(name, False)

    with ThreadPoolExecutor(_AT_ONCE if bench.real else 1) as pool:
        for _ in pool.map(capture, tried):
            bench.note(captures=captures)


def parts(pack: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """What a call's host time is made of: allocations, guards, the driver's own launch."""
    from triton.runtime import driver

    from fedmap_sparse.triton_kernels import _launch

    taken: list[tuple[Any, tuple[Any, ...]]] = []

    def spy(compiled: Any) -> Callable[..., object]:
        return lambda *given: taken.append((compiled, given)) or compiled.run(*given)

    with mock.patch.dict(_launch._compiled):
        for key, compiled in _launch._compiled.items():
            _launch._compiled[key] = SimpleNamespace(
                run=spy(compiled), function=compiled.function,
                packed_metadata=compiled.packed_metadata,
            )  # fmt: skip
        pack()
    kernel, given = taken[0]
    device, active = torch.device("cuda", torch.cuda.current_device()), driver.active
    some = torch.empty(1024, device=device)

    def guarded() -> None:
        with torch.cuda.device(device):
            pass

    return {
        "pack, all of it": pack,
        "its launch by the driver": lambda: kernel.run(*given),
        "torch.empty": lambda: torch.empty(1024, device=device),
        "torch.zeros": lambda: torch.zeros(1024, device=device),
        "a view": lambda: some.view(torch.int32),
        "data_ptr": some.data_ptr,
        "the current device": active.get_current_device,
        "its stream": lambda: active.get_current_stream(device.index),
        "a device guard": guarded,
    }


def profiled(run: Callable[[], object], repeats: int = 200) -> list[str]:
    """Where a call's Python goes: microseconds a call, and how often, by function."""
    watch = cProfile.Profile()
    torch.cuda.synchronize()
    with watch:
        for _ in range(repeats):
            run()
    torch.cuda.synchronize()
    rows = sorted(pstats.Stats(watch).stats.items(), key=lambda row: -row[1][2])  # type: ignore[attr-defined]  # not in the stubs
    return [
        f"{1e6 * own / repeats:.1f} us, {calls / repeats:g} x {Path(file).name}:{line} {name}"
        for (file, line, name), (_, calls, own, _, _) in rows[:20]
    ]


def elsewhere(name: str, seconds: float) -> str:
    """`attempt` in a fresh process: a capture that fails may leave its context of no use."""
    path = os.pathsep.join(str(_ROOT / part) for part in _PARTS)
    code = (
        f"import json\nfrom gpu_run import waits\nprint(json.dumps(waits.attempt({name!r}, True)))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, timeout=max(1.0, seconds), check=False,
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
        # The end of a broken capture raises again: the first error says why.
        first = error.__context__ or error
        return f"refused: {type(first).__name__}: {str(first)[:200]}"
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
