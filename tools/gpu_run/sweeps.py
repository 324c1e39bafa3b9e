"""Each constant of `triton_kernels/_tuning.py` at other values, one after another.

The fastest value of one is kept while the next is tried. A value counts as faster by what it saves
over the workloads that it touches; one workload slower by more than a fiftieth rules it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_run.bench import Bench, tuned
from gpu_run.machine import l2_fetch

_SELECT = ("select float32", "select bfloat16", "select within 0.3")
_SPARSE = ("pack float32 0.1", "masked_adamw float32 0.1", "masked_adamw float32 0.01")
_ENCODE = ("encode_values float32", "encode_values float16", "encode_values bfloat16")
_DECODE = ("decode_values float32", "decode_values float16", "decode_values bfloat16")
_PACKS = ("pack float32 0.5", "pack bfloat16 0.5", "pack float32 0.1", "pack bfloat16 0.1")
_UNPACKS = ("unpack float32 0.5", "unpack bfloat16 0.5", "unpack float32 0.1",
            "unpack bfloat16 0.1", "unpack float32 1.0", "unpack bfloat16 1.0")  # fmt: skip
_ALLOWED = 1.02


@dataclass(frozen=True)
class Sweep:
    """A constant, the values to try beside the one that it has, and the workloads to time."""

    constant: str
    values: tuple[Any, ...]
    workloads: tuple[str, ...]


#: What was as fast on an H200, or nearly, and what another card's caches or size may favour.
SWEEPS = (
    Sweep("DESCRIBE", ((2048, 64, 8), (4096, 64, 16)), _ENCODE),
    Sweep("JOIN", ((32, 8),), _DECODE),
    Sweep("READ_REGISTERS", (64,), _SELECT),
    Sweep(
        "STEP_SPARSE",
        ((128, 128, 2, 512), (32, 64, 1, 256)),
        ("masked_sgd float32 0.01", "masked_adamw float32 0.01"),
    ),
    Sweep(
        "STEP_MIDDLE",
        ((64, 64, 1, 256), (64, 128, 1, 512), (256, 256, 8, 2048)),
        ("masked_sgd float32 0.1", "masked_adamw float32 0.1"),
    ),
    Sweep("STEP_ROWS", (2.0,), ("masked_sgd float32 0.5", "masked_sgd float32 0.1")),
    Sweep("STEP_BY_ROWS", ((64, 64, 1, 256),), ("masked_sgd float32 0.5",)),
    Sweep("STEP_DENSE", ((64, 64, 1, 256), (128, 128, 2, 512)), ("masked_adamw float32 0.5",)),
    Sweep(
        "STEP_WHOLE",
        ((128, 64, 1, 512), (256, 256, 4, 1024)),
        ("masked_sgd float32 1.0", "masked_adamw float32 1.0"),
    ),
    Sweep("EXTRACT_WORDS", (256,), ("extract 0.5", "extract 0.1")),
    Sweep("DEPOSIT_WARPS", (4,), ("deposit 0.5", "deposit 0.1")),
    Sweep("HISTOGRAMS", (1, 16), _SELECT),
    Sweep("SAMPLES", (16384, 32768), _SELECT),
    Sweep("SAMPLE_COPIES", (16,), _SELECT),
    Sweep("DECIDE_ROWS", (4,), _SELECT),
    Sweep("DECIDE_WARPS", (8,), _SELECT),
    Sweep("REFINE_PROGRAMS", (132, 1024), _SELECT),
    Sweep("REFINE_LANES", (2048,), _SELECT),
    Sweep("SETTLE_LANES", (64,), _SELECT),
    Sweep("TRIM_BLOCKS", (2,), _SELECT),
    Sweep("TRIMMED_MANY", ((4, 2), (4, 1)), ("trimmed_mean 50 less 24",)),
    Sweep("PACK_ROWS", (0.05,), _PACKS),
    Sweep("PACK_WARPS", (1, 8), _PACKS[:2]),
    Sweep("UNPACK_WARPS", (2, 4), _UNPACKS),
    Sweep("PACK_MIDDLE", ((64, 64, 1, 256), (256, 128, 4, 1024)), _PACKS[2:]),
    Sweep("PACK_DENSE", ((256, 1024, 4, 2048),), ("pack float32 1.0", "pack bfloat16 1.0")),
)


def better(base: dict[str, float], tried: dict[str, float]) -> bool:
    """Whether the times of `tried` are the better ones."""
    if any(tried[name] > _ALLOWED * base[name] for name in base):
        return False
    return sum(tried.values()) < 0.995 * sum(base.values())


def sweeps(bench: Bench) -> None:
    """Every sweep while there is time; on a stand-in the first other value of each."""
    from ladder.catalogue import each_workload

    from fedmap_sparse.triton_kernels import _tuning

    wanted = {name for sweep in SWEEPS for name in sweep.workloads}
    found = {w.name: w for w in each_workload(bench.n, bench.device) if w.name in wanted}
    best: dict[str, Any] = {}
    rows: dict[str, Any] = {}

    def times(sweep: Sweep, value: Any) -> dict[str, float]:
        with tuned({**best, sweep.constant: value}):
            return {name: bench.median(found[name].run) for name in sweep.workloads}

    failed = []
    for sweep in SWEEPS:
        default = getattr(_tuning, sweep.constant)
        chosen, base = default, times(sweep, default)
        rows[sweep.constant] = row = {"default": default, "us": {str(default): base}}
        for value in sweep.values if not bench.dry else sweep.values[:1]:
            if bench.left() < 1:
                bench.note(left_out=f"from {sweep.constant} = {value} on: no time left")
                return
            try:
                row["us"][str(value)] = tried = times(sweep, value)
            except Exception as error:  # such as too many registers on this card
                row["us"][str(value)] = repr(error)[:300]
                failed.append(f"{sweep.constant} = {value}")
                continue
            if bench.real and better(base, tried):
                chosen, base = value, tried
        if chosen != default:
            best[sweep.constant] = row["chosen"] = chosen
        bench.note(n=bench.n, sweeps=rows, winners=best)
    if bench.real:
        fetches(bench, found)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def fetches(bench: Bench, found: dict[str, Any]) -> None:
    """Sparse ops with the device fetching 32, 64 and 128 bytes from memory at a time: a hint to
    the driver, tried here and put back."""
    before = l2_fetch()
    if before is None:
        return
    rows: dict[str, Any] = {}
    try:
        for size in (32, 64, 128):
            rows[str(size)] = {"accepted": l2_fetch(size)}
            for name in _SPARSE:
                rows[str(size)][name] = bench.median(found[name].run)
            bench.note(l2_fetch=rows)
    finally:
        l2_fetch(before)
