"""Two files of `bench --json`, cell by cell: `fedmap-sparse bench compare A.json B.json`.

A cell has moved when its median changed beyond the threshold and the spreads, 20th to 80th
percentile, do not overlap: one of them alone is what a busy machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from fedmap_sparse._text import printable, shown
from fedmap_sparse.bench.case import CLIENTS
from fedmap_sparse.errors import FedMapError

__all__ = [
    "Cell",
    "Change",
    "Comparison",
    "Foreign",
    "Run",
    "add_arguments",
    "checked",
    "compare",
    "read",
]

#: A median has to change by more than this to count.
THRESHOLD = 1.05
#: CPUs that others kept busy, from which on a file's figures are doubted.
BUSY_CPUS = 0.2

_HEADER = ("machine", "isa", "threads", "versions", "commit")
_WANTED = "expected a header and records, as `fedmap-sparse bench --json` writes them"


class Foreign(FedMapError, ValueError):
    """A file cannot be read, or is not what `bench --json` writes; the message names it."""


class Cell(NamedTuple):
    """What tells one record of a file from the others."""

    op: str
    n: int
    density: float
    dtype: str
    device: str
    threads: int
    inputs: str
    clients: int

    def __str__(self) -> str:
        return (
            f"{self.op} n={self.n:,} density={self.density:g} {self.dtype} {self.device}, "
            f"{self.threads} threads, {self.inputs}, {self.clients} clients"
        )


@dataclass(frozen=True)
class Run:
    """One file: its header, its records by cell, and the reasons of what it refused to time."""

    path: Path
    header: dict[str, Any]
    records: dict[Cell, dict[str, Any]]
    refused: tuple[dict[str, Any], ...] = ()

    def reason(self, cell: Cell) -> str | None:
        """Why this run has no time of `cell`, where it says so."""
        fields = ("op", "n", "density", "dtype", "inputs")
        for one in self.refused:
            if all(one.get(name) == getattr(cell, name) for name in fields):
                return str(one.get("reason"))
        return None


@dataclass(frozen=True)
class Change:
    """One cell of both files.

    Attributes:
        a, b: its records.
        ratio: of the medians, B over A: above 1 is slower.
        least, most: the ratio between the ends of the spreads that lie nearest and farthest.
        floor: ratio of the floors, timed in the same rounds: where it moved as much, the machine
            did.
        moved: "slower" or "faster"; None for a cell that stayed.
    """

    cell: Cell
    a: dict[str, Any]
    b: dict[str, Any]
    ratio: float
    least: float
    most: float
    floor: float | None
    moved: str | None

    def as_dict(self) -> dict[str, Any]:
        times = ("median_s", "p20_s", "p80_s")
        return {
            **self.cell._asdict(),
            "a": {name: self.a[name] for name in times},
            "b": {name: self.b[name] for name in times},
            "ratio": self.ratio,
            "noise": [self.least, self.most],
            "floor_ratio": self.floor,
            "moved": self.moved,
        }


@dataclass(frozen=True)
class Comparison:
    """Of file A with file B: the changes of the cells they share, and what only one of them has."""

    a: Run
    b: Run
    threshold: float
    changes: tuple[Change, ...]
    only_a: tuple[Cell, ...]
    only_b: tuple[Cell, ...]
    warnings: tuple[str, ...]

    @property
    def moved(self) -> list[Change]:
        """The worst first."""
        found = [change for change in self.changes if change.moved]
        return sorted(found, key=lambda change: -change.ratio)

    @property
    def slower(self) -> bool:
        return any(change.moved == "slower" for change in self.changes)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "a": {"file": str(self.a.path), "header": self.a.header},
            "b": {"file": str(self.b.path), "header": self.b.header},
            "threshold": self.threshold,
            "warnings": list(self.warnings),
            "cells": [change.as_dict() for change in self.changes],
            "only_a": [cell._asdict() for cell in self.only_a],
            "only_b": [cell._asdict() for cell in self.only_b],
        }


def read(path: Path) -> Run:
    """A file of `fedmap-sparse bench --json`.

    Raises:
        Foreign: it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise Foreign(f"{path}: {_WANTED}; it cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Foreign(f"{path}: {_WANTED}; it is no JSON: {error}") from error
    return checked(path, found)


def checked(path: Path, found: Any) -> Run:
    """What such a file holds, as a Run.

    Raises:
        Foreign: it is something else; the message calls it `path`.
    """
    if not isinstance(found, dict):
        raise Foreign(f"{path}: {_WANTED}; got {shown(found)}")
    header, records = found.get("header"), found.get("records")
    if not isinstance(header, dict) or not isinstance(records, list):
        raise Foreign(f"{path}: {_WANTED}; got the keys {', '.join(map(shown, found)) or 'none'}")
    missing = [name for name in _HEADER if name not in header]
    if missing or not isinstance(header["versions"], dict):
        raise Foreign(f"{path}: {_WANTED}; its header lacks {', '.join(missing or ['versions'])}")
    refused = found.get("refused", [])
    return Run(
        path,
        header,
        dict(_record(path, at, record) for at, record in enumerate(records)),
        tuple(one for one in refused if isinstance(one, dict)) if isinstance(refused, list) else (),
    )


def _record(path: Path, at: int, record: Any) -> tuple[Cell, dict[str, Any]]:
    def bad(what: str) -> Foreign:
        return Foreign(f"{path}: {_WANTED}; record {at} {what}")

    if not isinstance(record, dict):
        raise bad(f"is {shown(record)}")
    kinds: dict[str, type | tuple[type, ...]] = {
        "op": str, "n": int, "density": (int, float), "dtype": str, "device": str, "threads": int,
        "inputs": str,
    }  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            raise bad(f"has {name} {shown(record.get(name))}")
    for name in ("median_s", "p20_s", "p80_s"):
        value = record.get(name)
        if not _is_time(value):
            raise bad(f"has {name} {shown(value)}")
    clients = record.get("clients", CLIENTS)
    if not isinstance(clients, int):
        raise bad(f"has clients {shown(clients)}")
    return Cell._make([*(record[name] for name in kinds), clients]), record


def _is_time(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 < value < 1e9  # seconds; no NaN, no infinity


def compare(a: Run, b: Run, threshold: float = THRESHOLD) -> Comparison:
    """What of `a` moved in `b`; a ratio of medians up to `threshold`, or down to its inverse, has
    not.
    """
    return Comparison(
        a,
        b,
        threshold,
        tuple(
            _change(cell, record, b.records[cell], threshold)
            for cell, record in a.records.items()
            if cell in b.records
        ),
        tuple(cell for cell in a.records if cell not in b.records),
        tuple(cell for cell in b.records if cell not in a.records),
        tuple(_warnings(a, b)),
    )


def _change(cell: Cell, a: dict[str, Any], b: dict[str, Any], threshold: float) -> Change:
    ratio = b["median_s"] / a["median_s"]
    least, most = b["p20_s"] / a["p80_s"], b["p80_s"] / a["p20_s"]
    moved = None
    if ratio > threshold and least > 1:
        moved = "slower"
    elif ratio < 1 / threshold and most < 1:
        moved = "faster"
    floors: list[float] = [seconds for r in (a, b) if _is_time(seconds := r.get("floor_s"))]
    floor = floors[1] / floors[0] if len(floors) == 2 else None
    return Change(cell, a, b, ratio, least, most, floor, moved)


def _warnings(a: Run, b: Run) -> list[str]:
    """What makes the two files hard to compare."""
    found = []
    for name in ("machine", "device", "cores", "isa", "threads"):
        left, right = a.header.get(name), b.header.get(name)
        if left != right:
            found.append(f"{name} differs: {left} in A, {right} in B")
    left, right = (run.header["versions"].get("torch") for run in (a, b))
    if left != right:
        found.append(f"torch differs: {left} in A, {right} in B")
    for letter, run in (("A", a), ("B", b)):
        busy = run.header.get("others_cpus", 0)
        if isinstance(busy, int | float) and busy > BUSY_CPUS:
            found.append(f"others kept {busy:g} CPUs busy during {letter}: repeat it when quiet")
    return found


def _threshold(text: str) -> float:
    found = float(text)
    if not 1 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"expected a ratio of 1 or more, as 1.05; got {text}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fedmap-sparse bench compare`."""
    parser.add_argument("a", type=Path, metavar="A.json", help="what was: a file of bench --json")
    parser.add_argument("b", type=Path, metavar="B.json", help="what is")
    parser.add_argument(
        "--threshold",
        type=_threshold,
        default=THRESHOLD,
        metavar="RATIO",
        help="medians that differ by no more have not moved; default 1.05",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the comparison there")
    parser.set_defaults(do=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 if a cell got slower; 2 for a file that is none of `bench --json`, for two
    that share no cell, and where rich is missing.
    """
    from fedmap_sparse.bench import report

    try:
        console = report.console()
        found = compare(read(args.a), read(args.b), args.threshold)
        if not found.changes:
            raise Foreign(f"{args.b}: expected a cell that {args.a} has too; they share none")
    except (Foreign, RuntimeError) as error:
        print(f"bench compare: {printable(str(error))}", file=sys.stderr)
        return 2
    if args.json is not None:
        args.json.write_text(json.dumps(found.as_dict(), indent=1) + "\n")

    def line(text: str, style: str = "") -> None:
        console.print(printable(text), style=style, highlight=False, markup=False, soft_wrap=True)

    for letter, one in (("A", found.a), ("B", found.b)):
        line(f"{letter} {one.path}: {one.header['machine']}; commit {one.header['commit']}")
    for text in found.warnings:
        line(text, "yellow")
    if found.moved:
        console.print(table(found))
    for text in _rest(found):
        line(text)
    return 1 if found.slower else 0


def table(found: Comparison) -> Any:
    """One row a cell that moved; of dtype, device, threads and inputs those that are not the same
    in all of them.
    """
    from rich.table import Table
    from rich.text import Text

    from fedmap_sparse.bench.report import seconds

    shared = {
        name: len({getattr(c.cell, name) for c in found.changes}) == 1 for name in Cell._fields
    }
    named = ["op", "n", "density"]
    named += [name for name in Cell._fields[3:] if not shared[name]]
    grid = Table(box=None, pad_edge=False)
    for name in named:
        grid.add_column(name, no_wrap=True)
    for name in ("A", "B", "B / A", "noise", "floors"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("")
    for change in found.moved:
        cell = change.cell
        values = {**cell._asdict(), "n": f"{cell.n:,}", "density": f"{cell.density:g}"}
        grid.add_row(
            *(Text(printable(str(values[name]))) for name in named),
            seconds(change.a["median_s"]),
            seconds(change.b["median_s"]),
            f"×{change.ratio:.3f}",
            f"{change.least:.3f}–{change.most:.3f}",
            "" if change.floor is None else f"×{change.floor:.3f}",
            Text(change.moved or "", style="red" if change.moved == "slower" else "green"),
        )
    return grid


def _rest(found: Comparison) -> list[str]:
    """How many stayed, and what only one file has."""
    stayed = len(found.changes) - len(found.moved)
    beyond = f"beyond ×{found.threshold:g} and the spread of both"
    lines = [f"{stayed} of {len(found.changes)} cells did not move {beyond}."]
    sides = (("A", found.only_a, found.b), ("B", found.only_b, found.a))
    for letter, cells, other in sides:
        for cell in cells:
            reason = other.reason(cell)
            refused = f"; the other file refused it: {reason}" if reason else ""
            lines.append(f"only in {letter}: {cell}{refused}")
    return lines
