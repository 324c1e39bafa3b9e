"""Machine code and memory traffic of the catalogue's workloads, for tests and for the report."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gpucheck.driver import compile_only, emulate
from gpucheck.interpreter import guard
from gpucheck.memory import SECTOR
from gpucheck.offline import Cost, cost

from ladder.catalogue import Workload

BUDGETS = Path(__file__).parents[1] / "budgets.csv"
_HEADER = ("workload", "kernel", "arch", "registers", "shared", "ld128", "st128")


@dataclass(frozen=True)
class Code:
    """One compiled kernel of a workload; a kernel launched in several forms is numbered."""

    workload: str
    kernel: str
    arch: int
    cost: Cost

    @property
    def key(self) -> tuple[str, str, str]:
        return self.workload, self.kernel, str(self.arch)


def machine_code(workload: Workload, arch: int) -> list[Code]:
    """Every kernel that the workload launches, compiled for `arch`."""
    with compile_only(arch) as kernels:
        workload.run()
    out: list[Code] = []
    for compiled in kernels.values():
        name = compiled.metadata.name.lstrip("_")
        number = sum(code.kernel.split("#")[0] == name for code in out)
        kernel = f"{name}#{number + 1}" if number else name
        out.append(Code(workload.name, kernel, arch, cost(compiled, arch)))
    return out


@dataclass(frozen=True)
class Traffic:
    """What one run moved: launches, and bytes per element touched and asked for."""

    launches: int
    touched: float
    requested: float
    faults: list[str]


def traffic(workload: Workload) -> Traffic:
    """Run the compiled kernels in the emulator. Launches that exit at once count too."""
    with emulate(blocks=16, check_races=False) as session:
        session.show(**workload.shown)
        workload.run()
    n = workload.numel
    return Traffic(
        len(session.launches),
        session.touched_bytes / n,
        session.requested_bytes / n,
        session.faults,
    )


def accesses(workload: Workload) -> list[str]:
    """Bytes an element that each access asks for and touches, launch by launch: where the excess
    of a workload comes from."""
    with emulate(blocks=16, check_races=False) as session:
        session.show(**workload.shown)
        workload.run()
    unit = SECTOR / workload.numel
    lines = []
    for report in session.launches:
        total = report.requested_bytes, report.touched_bytes
        lines.append(_moved(report.kernel, *(moved / workload.numel for moved in total)))
        for (place, kind, space), count in report.stats.items():
            if space == "global":
                what = f"  {kind:5s}{place}"
                lines.append(_moved(what, count["sectors"] * unit, count["distinct"] * unit))
    return lines


def _moved(what: str, asked: float, touched: float) -> str:
    return f"{what:70s} asked {asked:8.4f}  touched {touched:8.4f}"


def touched(workload: Workload) -> float:
    """Bytes an element that the interpreted kernels touch: quicker at a million elements."""
    with np.errstate(all="ignore"), guard() as watch:
        watch.show(**workload.shown)
        workload.run()
    return watch.touched_bytes / workload.numel


def read_budgets() -> dict[tuple[str, str, str], dict[str, int]]:
    """The table that fails on growth."""
    with BUDGETS.open(newline="") as file:
        return {
            (row["workload"], row["kernel"], row["arch"]): {k: int(row[k]) for k in _HEADER[3:]}
            for row in csv.DictReader(file)
        }


def write_budgets(codes: Iterable[Code]) -> None:
    with BUDGETS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_HEADER)
        for code in codes:
            c = code.cost
            wide = c.counts["ld128"], c.counts["st128"]
            writer.writerow([*code.key, c.registers, c.shared, *wide])
