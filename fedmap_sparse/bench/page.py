"""A page of benchmarks that stands alone: `fedmap-sparse bench --html FILE`, or from files

    python -m fedmap_sparse.bench.page A.json [B.json ...] --out FILE

What a file lacks is left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmap_sparse import page
from fedmap_sparse._files import write_atomically
from fedmap_sparse._text import printable
from fedmap_sparse.bench import compare, growth, report
from fedmap_sparse.bench.case import PHASES
from fedmap_sparse.bench.runner import Record
from fedmap_sparse.page import (
    Cell,
    Picture,
    Section,
    Table,
    clean,
    load,
    number,
    require,
    sort_key,
    text,
)

#: Bars that a picture has at most: beyond, each record keeps its fastest peer, the hardest to beat.
MOST_BARS = 24


def write(path: Path, runs: Sequence[compare.Run]) -> None:
    """Draw a page of `runs` into a file.

    Raises:
        RuntimeError: matplotlib or jinja2 is not installed.
        OSError: the file cannot be written; what was there stays.
    """
    write_atomically(path, render(runs).encode())


def render(runs: Sequence[compare.Run]) -> str:
    """The page, as HTML of UTF-8."""
    require("--html")
    load()
    found = [section(f"run{k}", run) for k, run in enumerate(runs)]
    return page.render("fedmap_sparse: benchmarks", found)


def picture(runs: Sequence[compare.Run], title: str) -> str:
    """The first picture of the page with this title, as an SVG file.

    Raises:
        ValueError: the page has none.
    """
    require("--picture")
    load()
    found = [p for k, run in enumerate(runs) for p in section(f"run{k}", run).pictures]
    for one in found:
        if one.title == title:
            return page.alone(one)
    known = ", ".join(dict.fromkeys(p.title for p in found)) or "none"
    raise ValueError(f"--picture: expected one of {known}, got {title!r}")


def section(name: str, run: compare.Run) -> Section:
    records = list(run.records.values())
    whole = [r for r in records if _is_round(r)]
    ops = [r for r in records if "phases_s" not in r]
    made = Section(name, clean(run.path.stem), _facts(run))
    _rounds(made, whole)
    _growth(made, ops, run)
    _ops(made, ops)
    skipped = run.header.get("skipped")
    made.notes = [clean(line) for line in skipped] if isinstance(skipped, list) else []
    made.notes += [
        f"{clean(r.get('op'))} n={clean(r.get('n'))} density={clean(r.get('density'))} was not "
        f"timed: {clean(r.get('reason'))}"
        for r in run.refused
    ]
    return made


def _facts(run: compare.Run) -> list[tuple[str, str]]:
    h = run.header
    versions = ", ".join(f"{name} {version}" for name, version in h["versions"].items())
    others = h.get("others_cpus")
    load = "unknown" if others is None else f"others kept {others} CPUs busy meanwhile"
    facts = {
        "machine": h["machine"],
        "device": h.get("device"),
        "cores": h.get("cores"),
        "ISA": h["isa"],
        "threads": h["threads"],
        "versions": versions,
        "commit": h["commit"],
        "time": h.get("time"),
        "load": load,
    }
    return [(name, clean(value)) for name, value in facts.items() if value is not None]


def _ops(made: Section, ops: Sequence[Record]) -> None:
    from fedmap_sparse.bench import pictures

    curves = {id(r) for one in growth.series(ops) for r in one.records}
    single = [r for r in ops if id(r) not in curves]
    streams = [
        r for r in single if _number(r, "gbps") and _number(r, "floor_s") and _number(r, "bytes")
    ]
    streams = [r for r in streams if not r["op"].startswith("latency_")]
    if streams:
        words = (
            "Bars: bytes that have to move, over our time. Lines across them: plain streams of as "
            "many bytes with as many threads, the roof."
        )
        made.pictures.append(
            Picture(
                "Bandwidth and its roof", words, pictures.bandwidth(f"{made.name}-roof", streams)
            )
        )
    rows = [
        (pictures.label(r, ops), name, speedup)
        for r in ops
        for name, peer in _peers(r).items()
        if (speedup := _number(peer, "speedup")) is not None
    ]
    if rows:
        words = "How many times faster than what one would run otherwise. "
        shown = rows
        if len(rows) > MOST_BARS:
            words += "Of several peers the fastest; the table has all."
            best: dict[str, tuple[str, str, float]] = {}
            for row in rows:
                if row[0] not in best or row[2] < best[row[0]][2]:
                    best[row[0]] = row
            shown = list(best.values())
        bars = [(f"{op}: {name}", speedup) for op, name, speedup in shown]
        made.pictures.append(
            Picture("Faster than", words, pictures.speedups(f"{made.name}-peers", bars))
        )
    if ops:
        made.tables.append(_records(ops))
    if rows:
        made.tables.append(_against(ops))


def _growth(made: Section, ops: Sequence[Record], run: compare.Run) -> None:
    from fedmap_sparse.bench import pictures

    found = growth.series(ops)
    cache = run.header.get("last_level_cache")
    cache = cache if isinstance(cache, int) else 0
    for axis in growth.LEAST:
        curves = [one for one in found if one.axis == axis]
        if curves:
            words = "Dashed: the floor, plain streams of the same bytes with the same threads."
            svg = pictures.growth(f"{made.name}-{axis}", curves)
            made.pictures.append(Picture(f"Growth with {axis}", words, svg))
    if found:
        rows = [
            [Cell(clean(c), _leading(c)) for c in row] for row in report.growth_rows(ops, cache)
        ]
        made.tables.append(Table("Growth", report.GROWTH_HEAD, rows))


def _rounds(made: Section, whole: Sequence[Record]) -> None:
    from fedmap_sparse.bench import pictures

    if not whole:
        return
    words = (
        "A round without forward and backward: ours, and the same round as people write it. Each "
        "model's bars are shares of its slowest arm. The table has forward and backward beside."
    )
    made.pictures.append(
        Picture("Whole rounds", words, pictures.rounds(f"{made.name}-rounds", whole))
    )
    head = ["round of", "density", "arm", "time", "× ours", "forward, backward"]
    head += ["bytes", "peak memory"]
    head += [f"{phase}, ms" for phase in PHASES]
    rows = []
    for r in whole:
        for name, arm in {"ours": r, **_peers(r)}.items():
            rows.append(
                [
                    text(r["op"].removeprefix("round_")),
                    number(r["density"]),
                    text(name),
                    _seconds(arm, "median_s"),
                    number(arm["median_s"] / r["median_s"]),
                    _seconds(arm, "forward_backward_s"),
                    _bytes(arm, "payload_bytes"),
                    _bytes(arm, "memory_bytes"),
                    *(number(arm["phases_s"][phase] * 1e3) for phase in PHASES),
                ]
            )
    made.tables.append(Table("Rounds", head, rows))


def _records(ops: Sequence[Record]) -> Table:
    head = ["op", "n", "density", "dtype", "threads", "inputs", "median", "p20", "p80", "GB/s"]
    head.append("× floor")
    rows = [
        [
            text(r["op"]),
            Cell(clean(f"{r['n']:,}"), sort_key(r["n"])),
            number(r["density"]),
            text(r["dtype"]),
            number(r["threads"]),
            text(r["inputs"]),
            *(_seconds(r, key) for key in ("median_s", "p20_s", "p80_s")),
            _optional(r, "gbps"),
            _optional(r, "ratio_to_floor"),
        ]
        for r in ops
    ]
    return Table("Ops", head, rows)


def _against(ops: Sequence[Record]) -> Table:
    from fedmap_sparse.bench import pictures

    sized = any("payload_bytes" in r for r in ops)
    head = ["op", "peer", "ours", "the peer", "× ours", *(["bytes", "its bytes"] if sized else [])]
    rows = [
        [
            text(pictures.label(r, ops)),
            text(name),
            _seconds(r, "median_s"),
            _seconds(peer, "median_s"),
            _optional(peer, "speedup"),
            *([_bytes(r, "payload_bytes"), _bytes(peer, "payload_bytes")] if sized else []),
        ]
        for r in ops
        for name, peer in _peers(r).items()
    ]
    return Table("Beside peers", head, rows)


def _peers(r: Record) -> dict[str, dict[str, Any]]:
    found = r.get("peers")
    if not isinstance(found, dict):
        return {}
    return {name: peer for name, peer in found.items() if isinstance(peer, dict)}


def _is_round(r: Record) -> bool:
    """Whether each arm has a time, and a positive time or none for every phase."""
    arms = [r, *_peers(r).values()]
    phases = [arm.get("phases_s") for arm in arms]
    return all(_number(arm, "median_s") for arm in arms) and all(
        isinstance(p, dict)
        and all(p.get(name) == 0 or _number(p, name) is not None for name in PHASES)
        and any(_number(p, name) for name in PHASES)
        for p in phases
    )


def _number(of: dict[str, Any], key: str) -> float | None:
    """A positive number; None for whatever else stands there."""
    value = of.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        return None
    return float(value)


def _optional(of: dict[str, Any], key: str) -> Cell:
    value = _number(of, key)
    return Cell("", 0.0) if value is None else Cell(f"{value:.3g}", value)


def _seconds(of: dict[str, Any], key: str) -> Cell:
    value = _number(of, key)
    return Cell("", 0.0) if value is None else Cell(report.seconds(value), value)


def _bytes(of: dict[str, Any], key: str) -> Cell:
    value = _number(of, key)
    return Cell("", 0.0) if value is None else Cell(f"{value:,.0f}", value)


def _leading(text: str) -> float | str:
    """Of a cell that begins with a number, that number."""
    first = text.replace(",", "").split(" ")[0]
    try:
        found = float(first)
    except ValueError:
        return text
    return found if math.isfinite(found) else text


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 for a file that is none of `bench --json`, and for what is missing here."""
    parser = argparse.ArgumentParser(
        prog="python -m fedmap_sparse.bench.page", description="Draw a page from bench --json."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--picture", metavar="TITLE", help='draw this one alone, as SVG: "Whole rounds", say'
    )
    parser.add_argument("--density", type=float, metavar="D", help="only what was measured at it")
    args = parser.parse_args(argv)
    try:
        runs = [compare.read(file) for file in args.files]
        if args.density is not None:
            runs = [
                replace(
                    r, records={c: v for c, v in r.records.items() if c.density == args.density}
                )
                for r in runs
            ]
        if args.picture is None:
            write(args.out, runs)
        else:
            write_atomically(args.out, picture(runs, args.picture).encode())
    except (compare.Foreign, ValueError, RuntimeError, OSError) as error:
        print(f"bench page: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
