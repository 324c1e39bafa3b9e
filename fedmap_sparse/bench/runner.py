"""Checks, then times: settings to records."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

import fedmap_sparse
from fedmap_sparse import _checks
from fedmap_sparse._backends import native
from fedmap_sparse.bench import floors, inputs
from fedmap_sparse.bench.case import REGISTRY, Case, Setting, Trial
from fedmap_sparse.bench.timing import Contender, Plan, interleave, quantile

Record = dict[str, Any]

#: Input sets of a small setting; more would take longer to make than to measure.
MOST_SETS = 32


def registry() -> dict[str, Case]:
    """Every case by its op's name."""
    for module in ("cases", "latency", "messages", "models", "private", "robust", "steps"):
        import_module(f"fedmap_sparse.bench.{module}")  # which registers its cases
    return REGISTRY


@dataclass(frozen=True)
class Options:
    """What to measure; None leaves it to each case."""

    cases: Sequence[Case]
    sizes: Sequence[int]
    densities: Sequence[float] | None
    dtypes: Sequence[torch.dtype]
    device: torch.device
    inputs: str
    plan: Plan
    most_sets: int = MOST_SETS


@dataclass(frozen=True)
class Refused:
    """A setting that was not timed, and why."""

    op: str
    setting: Setting
    reason: str

    def as_dict(self) -> dict[str, Any]:
        s = self.setting
        return {
            "op": self.op,
            "n": s.n,
            "density": s.density,
            "dtype": _checks.short(s.dtype),
            "inputs": s.inputs,
            "reason": self.reason,
        }


#: Packages that serve GPUs alone.
_CUDA_ONLY = ("cupy",)


def absent(options: Options) -> Iterator[str]:
    """A line for each case that will lack peers, as packages that they need are not installed."""
    for one in options.cases:
        needed = [n for n in one.peers_from if options.device.type != "cpu" or n not in _CUDA_ONLY]
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            yield f"{one.op}: not timed beside {', '.join(missing)}, not installed here"


def run(options: Options) -> Iterator[Record | Refused]:
    """Measure each case at each setting that it has."""
    for one in options.cases:
        for setting in settings(one, options):
            yield measure(one, setting, options.plan, options.most_sets)


def settings(one: Case, options: Options) -> list[Setting]:
    sizes = options.sizes if one.fixed_n is None else [one.fixed_n]
    return [
        Setting(n, density, dtype, options.device, one.fixed_inputs or options.inputs)
        for n in sizes
        for dtype in options.dtypes
        if dtype in one.dtypes
        for density in options.densities or one.densities
        if options.device.type in one.devices
    ]


def measure(
    one: Case, setting: Setting, plan: Plan, most_sets: int = MOST_SETS, *, peers: bool = True
) -> Record | Refused:
    """One record; or the reason why there is none: what fails its check is not timed.

    `peers=False` leaves them out.
    """
    try:
        trial = one.build(setting)
        trial.check()
    except Exception as error:  # any failure to give the right result is a refusal, by its text
        return Refused(one.op, setting, f"{type(error).__name__}: {error}")
    trials = [trial, *_more_sets(one, setting, trial, most_sets)]
    cuda = setting.device.type == "cuda"
    floor_runs = [floors.device_copy(t.nbytes, setting.device) if cuda else t.floor for t in trials]
    ours = Contender("ours", [t.ours for t in trials], calls=trial.calls)
    floor = Contender("floor", floor_runs, calls=trial.calls)
    others = [
        Contender(
            name,
            [t.peers[name].run for t in trials],
            [r for t in trials if (r := t.peers[name].reset) is not None],
            trial.calls,
        )
        for name in (trial.peers if peers else ())
    ]
    interleave([ours, floor, *others], plan, setting.device)
    return _record(one, setting, trial, ours, floor, others)


def _more_sets(one: Case, setting: Setting, trial: Trial, most: int) -> list[Trial]:
    """Further inputs, so that no set is still in the last-level cache when its turn comes."""
    if one.group == "latency":
        return []
    wanted = math.ceil(4 * floors.last_level_cache(setting.device) / max(trial.nbytes, 1))
    return [one.build(replace(setting, seed=10 * i)) for i in range(1, min(wanted, most))]


def _record(
    one: Case,
    setting: Setting,
    trial: Trial,
    ours: Contender,
    floor: Contender,
    peers: Sequence[Contender],
) -> Record:
    median, base = ours.quantile(0.5), floor.quantile(0.5)
    record: Record = {
        "op": one.op,
        "n": setting.n,
        "density": setting.density,
        "dtype": _checks.short(setting.dtype),
        "device": setting.device.type,
        "threads": torch.get_num_threads(),
        "inputs": setting.inputs,
        "median_s": median,
        "p20_s": ours.quantile(0.2),
        "p80_s": ours.quantile(0.8),
        "bytes": trial.nbytes,
        "gbps": trial.nbytes / median / 1e9,
        "floor_s": base,
        "ratio_to_floor": median / base,
        "peers": {
            peer.name: {
                "median_s": peer.quantile(0.5),
                "speedup": peer.quantile(0.5) / median,
            }
            for peer in peers
        },
    }
    if ours.call_samples:
        record["call_s"] = quantile(ours.call_samples, 0.5)
        for peer in peers:
            record["peers"][peer.name]["call_s"] = quantile(peer.call_samples, 0.5)
    if trial.sizes:
        record["payload_bytes"] = trial.sizes["ours"]
        for peer in peers:
            record["peers"][peer.name]["payload_bytes"] = trial.sizes[peer.name]
    if trial.clients is not None:
        record["clients"] = trial.clients
    if trial.state_bytes is not None:
        record["state_bytes"] = trial.state_bytes
    return record


def header(options: Options, arguments: Sequence[str]) -> dict[str, Any]:
    """The machine, ISA, versions and commit that records belong to."""
    found: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": _machine(),
        "cores": len(os.sched_getaffinity(0)),
        "last_level_cache": floors.last_level_cache(options.device),
        "isa": native.isa() if native is not None else "none",
        "threads": torch.get_num_threads(),
        "versions": {
            "fedmap_sparse": fedmap_sparse.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": metadata.version("numpy"),
        },
        "commit": _commit(),
        "arguments": list(arguments),
    }
    if options.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(options.device)
        found["versions"]["cuda"] = torch.version.cuda
        found["versions"]["triton"] = metadata.version("triton")
    return found


class OtherLoad:
    """CPUs that other processes kept busy since it was made: figures taken under load mislead."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), *self._busy())

    @staticmethod
    def _busy() -> tuple[float, float]:
        """CPU seconds of the whole machine, and of this process."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0, 0.0
        user, nice, system, _idle, _wait, irq, softirq, *_ = stat.read_text().split()[1:]
        ticks = sum(int(t) for t in (user, nice, system, irq, softirq))
        return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()

    def cpus(self) -> float:
        """0 where the system does not say."""
        now = (time.perf_counter(), *self._busy())
        elapsed, machine, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, round((machine - own) / elapsed, 2)) if elapsed > 0 else 0.0


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
        pairs = (line.partition(":") for line in lines)
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        if "model name" in fields:
            family, model = fields.get("cpu family", "?"), fields.get("model", "?")
            return f"{fields['model name']} (family {family}, model {model})"
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Of the checkout that this package runs from; "unknown" where it is installed."""
    here = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here:
            return "unknown"
        changed = git("status", "--porcelain", "--untracked-files=no", "fedmap_sparse", "csrc")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def default_sizes(name: str, quick: bool) -> list[int]:
    """26,214,400, or 65,536 when quick; of trained weights every one that there is."""
    wanted = 1 << 16 if quick else 26_214_400
    available = inputs.size(name)
    if available is None or quick:
        return [min(wanted, available or wanted)]
    return [available]
