"""How time grows with n, density, threads and clients: `fedmap-sparse bench --growth`.

The points are those of the other records, without peers: what is asked is our own curve beside the
floor's. Whatever records hold enough points along one axis can be drawn and fitted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedmap_sparse._checks import short
from fedmap_sparse.bench import case, runner
from fedmap_sparse.bench.case import CPU, Setting
from fedmap_sparse.bench.runner import Record, Refused
from fedmap_sparse.bench.timing import QUICK, Plan

OPS = ("select", "pack", "masked_sgd", "accumulate", "encode", "decode_full")
#: Ops that a model's whole buffer goes through at once: they are measured beyond 1e8 too.
LARGE = ("select", "pack", "encode")
#: Messages grow with n, whose density is that of the message; they are not measured against it.
MESSAGES = ("encode", "decode_full")
SIZES = tuple(round(10 ** (k / 2)) for k in range(8, 17))
LARGE_SIZES = tuple(round(10 ** (k / 2)) for k in range(12, 19))
DENSITIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
DENSITY = 0.1
#: Of the curves against density and threads: beyond the cache of most machines.
AT = SIZES[-2]
QUICK_SIZES = SIZES[:5]
CLIENTS = (1, 3, 10, 30, 100, 300, 1000)
#: Elements of a model of many clients: the vectors of 1,000 take 0.4 GB.
CLIENTS_AT = 10**6
#: Bytes per element that a trial and its check hold at most, and so many more at density 1:
#: measured, with a tenth to spare.
NEED = {
    ("select", "float32"): (38, 0),
    ("pack", "float32"): (14, 21),
    ("masked_sgd", "float32"): (78, 13),
    ("accumulate", "float32"): (8, 70),
    ("select", "bfloat16"): (12, 0),
    ("pack", "bfloat16"): (12, 20),
    ("encode", "float32"): (9, 9),
    ("encode", "bfloat16"): (7, 2),
    ("decode_full", "float32"): (9, 9),
}
#: Points that make a curve, by axis.
LEAST = {"n": 5, "density": 5, "threads": 2, "clients": 5}


@dataclass(frozen=True)
class Point:
    """One setting of one op, with so many threads."""

    op: str
    n: int
    density: float
    dtype: torch.dtype
    threads: int
    clients: int = case.CLIENTS

    @property
    def need(self) -> int:
        """Bytes of memory that it takes."""
        base, at_one = NEED[self.op, short(self.dtype)]
        return round(self.n * (base + at_one * self.density * self.clients / case.CLIENTS))


@dataclass(frozen=True)
class Series:
    """Records that differ along one axis only, ascending along it."""

    axis: str
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        first = self.records[0]
        return f"{first['op']} {first['dtype']}"

    def values(self, key: str) -> list[float]:
        return [float(_of(r, key)) for r in self.records]

    def exponent(self, cache: float) -> float | None:
        """The slope of log time over log axis; against n of what is larger than `cache` bytes.

        None where fewer than three points are left.
        """
        used = [r for r in self.records if self.axis != "n" or r["bytes"] > cache]
        if len(used) < 3:
            return None
        x = [math.log(_of(r, self.axis)) for r in used]
        y = [math.log(r["median_s"]) for r in used]
        return statistics.linear_regression(x, y).slope


def points(
    threads: int,
    *,
    ops: Sequence[str] = OPS,
    sizes: Sequence[int] | None = None,
    densities: Sequence[float] = DENSITIES,
    quick: bool = False,
) -> list[Point]:
    """What is measured, each point once.

    With `sizes` there are no larger ones in bfloat16, and the curves against density and threads
    are taken at the largest of them that is no larger than `AT`.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"ops: with --growth expected any of {', '.join(OPS)}, got {op!r}")
    small = sizes or (QUICK_SIZES if quick else SIZES)
    at = max((n for n in small if n <= AT), default=min(small))
    counts = sorted({*(1 << k for k in range(threads.bit_length())), threads})
    found = []
    for op in ops:
        found += [Point(op, n, DENSITY, torch.float32, threads) for n in sorted(small)]
        if op not in MESSAGES:
            found += [Point(op, at, density, torch.float32, threads) for density in densities]
        found += [Point(op, at, DENSITY, torch.float32, count) for count in counts]
        if op == "accumulate":
            n = min(CLIENTS_AT, at)
            counts_of = CLIENTS[:5] if quick else CLIENTS
            found += [Point(op, n, DENSITY, torch.float32, threads, c) for c in counts_of]
        if op in LARGE and not sizes and not quick:
            found += [Point(op, n, DENSITY, torch.bfloat16, threads) for n in LARGE_SIZES]
    return list(dict.fromkeys(found))


def available() -> int | None:
    """Bytes of memory that are free; None where the system does not say."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    line = next(row for row in file.read_text().splitlines() if row.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def skip(point: Point, free: int | None) -> str | None:
    """Why a point cannot be measured here: a line; None where it can."""
    if free is None or point.need <= free:
        return None
    return (
        f"{point.op} n={point.n:,} {short(point.dtype)} was skipped: it takes "
        f"{point.need / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free"
    )


def run(wanted: Sequence[Point], inputs: str, quick: bool) -> Iterator[Record | Refused | str]:
    """A record for each point, a refusal, or a line that says why it was skipped.

    Sets torch's number of threads, and restores it.
    """
    cases = runner.registry()
    before = torch.get_num_threads()
    try:
        for point in wanted:
            if (reason := skip(point, available())) is not None:
                yield reason
                continue
            torch.set_num_threads(point.threads)
            setting = Setting(
                point.n, point.density, point.dtype, CPU, inputs, clients=point.clients
            )
            plan, sets = (QUICK, 2) if quick else (Plan(), runner.MOST_SETS)
            yield runner.measure(cases[point.op], setting, plan, sets, peers=False)
    finally:
        torch.set_num_threads(before)


def series(records: Sequence[Record]) -> list[Series]:
    """Every curve that the records hold: at least `LEAST` points along an axis, all else equal."""
    usable = [r for r in records if _positive(r, "n", "density", "threads", "bytes", "floor_s")]
    found = []
    for axis, least in LEAST.items():
        fixed = [k for k in ("op", "dtype", "device", "inputs", *LEAST) if k != axis]
        groups: dict[tuple[Any, ...], dict[float, Record]] = {}
        for r in usable:
            groups.setdefault(tuple(_of(r, k) for k in fixed), {})[_of(r, axis)] = r
        found += [
            Series(axis, tuple(group[at] for at in sorted(group)))
            for group in groups.values()
            if len(group) >= least
        ]
    return found


def _of(record: Record, key: str) -> Any:
    return record.get(key, case.CLIENTS) if key == "clients" else record[key]


def _positive(record: Record, *keys: str) -> bool:
    found = (record.get(key) for key in keys)
    return all(isinstance(v, int | float) and 0 < v < 1e18 for v in found)
