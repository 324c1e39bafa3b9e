"""What each step does. A step notes its results as they come and minds its deadline."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu_run.bench import Bench, Skip, by_profiler, tuned
from gpu_run.chunks import chunks
from gpu_run.counters import counters
from gpu_run.extras import MARK, cuda_select, each_extra, selections
from gpu_run.graphs import graphs
from gpu_run.machine import machine
from gpu_run.peers import peers
from gpu_run.split import split
from gpu_run.sweeps import sweeps
from gpu_run.tests import run_tests
from gpu_run.ties import ties
from gpu_run.waits import waits

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 3
#: What the step of this name runs instead of the contracts.
_LARGE = "more_than_2_to_the_31"
#: Files of tests/gpu, the most worth knowing first.
_WORTH = ("contracts", "select_cuda", "on_device", "private", "coding", "nccl")
#: Seconds of selections under stress, at most: 3000 a second on an H200.
_STRESS = 5.0


def build(bench: Bench) -> None:
    """In place, unless it is there; says what is missing otherwise."""
    from fedmap_sparse._backends import native

    if native is not None:
        bench.note(extension="there already", isa=native.isa())
        return
    missing = [
        name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None
    ]
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if missing or compiler is None:
        wanted = [*missing, *([] if compiler else ["a C++ compiler"])]
        bench.note(
            extension=f"not built: no {', no '.join(wanted)}; see the head of measure_gpu.py"
        )
        raise Skip(bench.found["extension"])
    if bench.dry:
        raise Skip("a dry run builds nothing")
    path = os.pathsep.join([str(ROOT / "build" / "carry"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=True)
    bench.note(extension="built here")


def contracts(bench: Bench) -> None:
    """The tests in order of worth, then stress, which has its time whatever became of them."""
    folder = ROOT / "tests" / "gpu"
    paths = [str(folder / f"test_{name}.py") for name in _WORTH]
    try:
        run_tests(bench, *paths, "-k", f"not {_LARGE}", seconds=bench.left() - _STRESS)
    finally:
        stress(bench)


def stress(bench: Bench) -> None:
    """Selections by the ten thousand beside another stream that writes: tickets and barriers hold.

    By each backend in turn.
    """
    from fedmap_sparse import ops

    values = torch.randn(70_000 if bench.real else 5000, device=bench.device)
    forms = ["triton"] if bench.real else ["reference"]
    if not cuda_select()[1]:
        forms.append("cuda")
    want = ops.magnitude_mask(values, values.numel() // 10, backend="reference").words.clone()
    wrong, rounds = torch.zeros((), dtype=torch.int64, device=bench.device), 0
    side = torch.cuda.Stream() if bench.real else None
    noise = torch.empty(1 << 26 if bench.real else 16, device=bench.device)
    end = time.monotonic() + min(_STRESS, bench.left() - 1)
    while time.monotonic() < end and rounds < (100_000 if bench.real else 2):
        form = forms[rounds // 500 % len(forms)]
        for _ in range(500 if bench.real else 1):
            got = ops.magnitude_mask(values, values.numel() // 10, backend=form).words
            wrong += (got != want).any()
            rounds += 1
        if side is not None:
            with torch.cuda.stream(side):
                for _ in range(20):
                    noise.mul_(1.0001)
        bench.note(stress={"selections": rounds, "wrong": int(wrong), "backends": forms})
    if int(wrong):
        raise RuntimeError(f"{int(wrong)} of {rounds} selections differ from the reference's")


def baseline(bench: Bench) -> None:
    """Medians of every workload, then its kernels by the profiler."""
    from ladder.catalogue import each_workload

    rows: dict[str, Any] = {}
    if why := cuda_select()[1]:
        bench.note(missing={f"select{MARK}": why})
    for make in (each_extra, each_workload):
        try:
            for workload in make(bench.n, bench.device):
                if bench.left() < 1.5:
                    bench.note(left_out=f"from {workload.name} on: no time left")
                    break
                rows[workload.name] = measured(bench, workload)
                bench.note(n=bench.n, workloads=rows)
        except Exception as error:  # in making one: those of the other kind may hold
            rows[f"more of {make.__name__}"] = {"error": repr(error)[:500]}
            bench.note(n=bench.n, workloads=rows)
    if any("error" in row for row in rows.values()):
        raise RuntimeError(f"failed: {[name for name, row in rows.items() if 'error' in row]}")


def measured(bench: Bench, workload: Any) -> dict[str, Any]:
    """Its median, its floor and its kernels; or its error, as the others may hold."""
    try:
        row: dict[str, Any] = {
            "floor_bytes": round(workload.floor * workload.numel),
            "us": bench.median(workload.run),
        }
        if bench.real:
            row["kernels_us"] = by_profiler(workload.run)
            if workload.name.startswith("message"):
                row |= split(row, workload.run, bench.device)
    except Exception as error:
        return {"error": repr(error)[:500]}
    return row


def winners(bench: Bench) -> None:
    """The contracts with every fastest value at once, and what a selection takes with them."""
    best = bench.earlier("sweeps").get("winners", {})
    n, drawn = bench.n, torch.randn(bench.n, device=bench.device)
    times: dict[str, float] = {}
    for mark, select in selections().items():
        # No constant of Triton's kernels touches those of CUDA C++.
        for which, settings in (("defaults", {}), ("winners", best))[: 1 if mark else 2]:
            with tuned(settings):
                times[which + mark] = bench.median(lambda s=select: s([drawn], [None], n, n // 10))
    bench.note(settings=best, select_us=times)
    run_tests(bench, str(ROOT / "tests" / "gpu" / "test_contracts.py"), settings=best)


def scale(bench: Bench) -> None:
    """A model of 10^9 parameters in bfloat16 through a round's kernels."""
    import fedmap_sparse as fs
    from fedmap_sparse import ops

    if bench.arch:
        raise Skip("runs whole ops")
    n = 10**9 if bench.real else 20_000
    backend = "triton" if bench.real else "reference"
    values = torch.randn(n, device=bench.device, dtype=torch.bfloat16)
    times: dict[str, float] = {}
    peak = torch.cuda.max_memory_allocated if bench.real else (lambda: 0)

    def note(name: str, run: Callable[[], Any]) -> Any:
        out = run()
        if bench.real:
            times[name] = bench.median(run, repeats=3)
        bench.note(n=n, us=times, peak_bytes=peak())
        return out

    if not cuda_select()[1]:
        note(f"select{MARK}", lambda: ops.magnitude_mask(values, n // 10, backend="cuda"))
    mask = note("select", lambda: ops.magnitude_mask(values, n // 10, backend=backend))
    packed = note("pack", lambda: ops.pack(values, mask, backend=backend))
    note("unpack", lambda: ops.unpack(packed, mask, backend=backend))
    momentum, master = torch.zeros(mask.nnz, device=bench.device), packed.float()
    gradient = torch.randn(n, device=bench.device, dtype=torch.bfloat16)
    note("masked_sgd", lambda: ops.masked_sgd_(
        values, mask, gradient, lr=0.01, momentum=0.9, momentum_buffer=momentum, master=master,
        backend=backend))  # fmt: skip
    coder = ops.entropy
    coded = note("encode_values", lambda: coder.encode_values(
        packed, 2 * packed.nbytes, backend="triton" if bench.real else "cpu"))  # fmt: skip
    note("decode_values", lambda: coder.decode_values(
        coded, mask.nnz, torch.bfloat16, device=values.device,
        backend="triton" if bench.real else "cpu"))  # fmt: skip
    small = fs.Mask.from_words(mask.words, n)
    bench.note(nnz=small.nnz, coded_bytes=coded.numel())


def large(bench: Bench) -> None:
    """Offsets of 64 bits: what ops take, then the contract."""
    if bench.arch:
        raise Skip("runs whole ops")
    times = _large_us(bench, (1 << 31) + 4999 if bench.real else 20_000)
    bench.note(us=times)
    run_tests(bench, str(ROOT / "tests" / "gpu" / "test_on_device.py"), "-k", _LARGE, workers=1)


def _large_us(bench: Bench, n: int) -> dict[str, float]:
    """In a function of its own, so that its tensors are gone when the contract wants the room."""
    from fedmap_sparse import ops

    by = "triton" if bench.real else "reference"
    values = torch.randn(n, device=bench.device, dtype=torch.bfloat16)
    mask = ops.magnitude_mask(values, n // 10, backend=by)
    packed = ops.pack(values, mask, backend=by)
    bench.note(n=n, kept=mask.nnz)
    if not bench.real:
        return {}
    work: dict[str, Callable[[], Any]] = {
        "select": lambda: ops.magnitude_mask(values, n // 10, backend=by),
        "pack": lambda: ops.pack(values, mask, backend=by),
        "unpack": lambda: ops.unpack(packed, mask, backend=by),
    }
    if not cuda_select()[1]:
        work[f"select{MARK}"] = lambda: ops.magnitude_mask(values, n // 10, backend="cuda")
    return {name: bench.median(run, repeats=3) for name, run in work.items()}


def experiment(bench: Bench) -> None:
    """The default experiment on the device, where its packages are; then with replayed steps."""
    needed = ("rich", "safetensors", "matplotlib")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise Skip(f"no {', no '.join(missing)}: python -m pip install fedmap-sparse[experiments]")
    device = "cuda" if bench.real else "cpu"
    rounds = 20 if bench.real else 1
    command = ["-m", "fedmap_sparse", "run", f"device={device}", f"rounds={rounds}"]
    if bench.dry:
        raise Skip(f"not in a dry run: {' '.join(command)}")
    arms = {"launched": _arms(bench, command, "experiment")}
    bench.note(command=command, arms=arms)
    try:
        arms["replayed"] = _arms(bench, [*command, "graphs=true"], "replayed")
    except (OSError, subprocess.SubprocessError) as error:  # what was launched holds
        arms["replayed"] = {"error": type(error).__name__}
    bench.note(arms=arms)


def _arms(bench: Bench, command: list[str], folder: str) -> dict[str, Any]:
    """Run it; of each arm its accuracy, and its seconds by phase."""
    # Where it writes is this machine's own affair, and in no result.
    out = bench.out / folder
    here = [sys.executable, *command, f"out={out}"]
    subprocess.run(here, cwd=ROOT, check=True, timeout=max(5.0, bench.left()))
    summary = json.loads((out / "summary.json").read_text())
    return {n: {key: arm[key] for key in ("accuracy", "phases")} for n, arm in summary.items()}


STEPS: dict[str, Callable[[Bench], None]] = {
    step.__name__: step
    for step in (
        build, machine, contracts, baseline, ties, sweeps, waits, graphs, peers, scale, experiment,
        chunks, winners, large, counters,
    )
}  # fmt: skip


def run(name: str, out: Path, until: float, dry: bool, arch: str | None) -> int:
    """The exit code of a step that has until that time: 0, 3 for nothing to do; a traceback and 1
    for a failure."""
    if (cache := ROOT / "build" / "triton").exists() or arch:
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache))
    try:
        bench = Bench(name, out, until - time.time(), dry, arch)
        STEPS[name](bench)
    except Skip as why:
        print(f"skipped: {why}")
        return SKIPPED
    return 0
