"""What a run of `tools/measure_gpu.py` found, as a section of benchmarks/GPU.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- a run of tools/measure_gpu.py -->", "<!-- end of the run -->"
Json = dict[str, Any]


def read(folder: Path) -> dict[str, Json]:
    """Every JSON file of a run by its step; ValueError if nothing in it was measured."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if "run" not in found:
        raise ValueError(f"{folder}: expected run.json, found {', '.join(found) or 'nothing'}")
    if found["run"]["mode"] or any(step.get("dry") for step in found.values()):
        raise ValueError(f"{folder}: a dry run measures nothing")
    return found


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    """Markdown; every column but the first to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def _baseline(step: Json, copies: Json) -> list[str]:
    rate = copies.get("copy 105 MB", {}).get("GB/s")
    rows: list[list[object]] = []
    for name, row in step.get("workloads", {}).items():
        if "error" in row:
            rows.append([name, "failed", "", "", row["error"].replace("|", "/")[:80]])
            continue
        floor = row["floor_bytes"] / rate / 1000 if rate else None
        times = f"{row['us'] / floor:.2f}" if floor else ""
        kernels = ", ".join(f"{k} {us}" for k, us in row.get("kernels_us", {}).items())
        rows.append([name, row["us"], f"{floor:.1f}" if floor else "", times, kernels])
    head = ["op", "us", "its bytes at the rate of a copy", "ratio", "kernels, by the profiler"]
    return [f"{step['n']:,} elements.", "", *table(head, rows)] if rows else []


def _sweeps(step: Json) -> list[str]:
    rows: list[list[object]] = []
    for constant, sweep in step.get("sweeps", {}).items():
        for value, times in sweep["us"].items():
            text = (
                times if isinstance(times, str) else ", ".join(f"{k} {v}" for k, v in times.items())
            )
            mark = " (kept)" if value == str(sweep.get("chosen", sweep["default"])) else ""
            rows.append([constant, f"{value}{mark}", text])
    return table(["constant", "value", "us"], rows) if rows else []


def _ties(step: Json) -> list[str]:
    rows: list[list[object]] = []
    for name, row in step.get("ties", {}).items():
        kernels = ", ".join(f"{k} {us}" for k, us in row.get("kernels_us", {}).items())
        rows.append([name, row["us"], row["of normal"], kernels])
    return table(["input, width, kept", "us", "of normal", "kernels, by the profiler"], rows)


def _waits(step: Json) -> list[str]:
    captures, host = step.get("captures", {}), step.get("host_us", {})
    syncs = {name: len(seen) for name, seen in step.get("syncs", {}).items()}
    rows: list[list[object]] = [
        [name, host.get(name, ""), syncs.get(name, ""), captures.get(name, "").replace("|", "/")]
        for name in dict.fromkeys([*syncs, *captures])
    ]
    head = ["op", "host, us", "numbers fetched", "captured without a warm-up"]
    return table(head, rows)


def section(found: dict[str, Json]) -> str:
    """The page's part between BEGIN and END: card, versions, date, commit, then the figures."""
    run, machine = found["run"], found.get("machine", {})
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items())
    lines = [
        BEGIN,
        f"## Measured on {machine.get('card', 'an unnamed card')}",
        "",
        f"{run['time']}, commit {run['commit']}; {versions}.",
        "Microseconds of the device's own time, medians of 15, launches queued, caches flushed.",
        "",
        *table(
            ["step", "ended", "s"],
            [[name, step["state"], step["seconds"]] for name, step in run["steps"].items()],
        ),
    ]
    rates = machine.get("bandwidth", {})
    if rates:
        lines += ["", "### Bandwidth", ""]
        rows: list[list[object]] = [[k, r["us"], r["GB/s"]] for k, r in rates.items()]
        lines += table(["what", "us", "GB/s"], rows)
    parts = {
        "Ops": _baseline(found.get("baseline", {}), rates),
        "Constants tried": _sweeps(found.get("sweeps", {})),
        "Selection of inputs with ties": _ties(found.get("ties", {})),
        "Masks coded in chunks of other lengths": table(
            ["steps per chunk", "bytes", "encode, us", "decode, us"],
            [
                [steps, row["bytes"], row.get("encode_mask", ""), row.get("decode_mask", "")]
                for steps, row in found.get("chunks", {}).get("chunks", {}).items()
            ],
        ),
        "Launched directly and replayed": table(
            ["work", "us per call, directly", "replayed"],
            [
                [k, row.get("direct", "failed"), row.get("replay", "failed")]
                for k, row in found.get("graphs", {}).get("wall_us", {}).items()
            ],
        ),
        "What a caller waits for": _waits(found.get("waits", {})),
        "10^9 parameters in bfloat16": table(
            ["op", "us"], [[k, v] for k, v in found.get("scale", {}).get("us", {}).items()]
        ),
        "2^31 + 4,999 elements in bfloat16": table(
            ["op", "us"], [[k, v] for k, v in found.get("large", {}).get("us", {}).items()]
        ),
    }
    for title, part in parts.items():
        if len(part) > 2:
            lines += ["", f"### {title}", "", *part]
    tests = found.get("contracts", {})
    if "tests" in tests:
        lines += [
            "",
            f"`tests/gpu` there: {tests['tests']}; stress: {tests.get('stress', 'not run')}.",
        ]
    return "\n".join([*lines, END])


def put(page: str, part: str) -> str:
    """The page with its measured part replaced, or added before '## Counted'."""
    if BEGIN in page:
        before, after = page.split(BEGIN, 1)[0], page.split(END, 1)[1]
        return before + part + after
    before, mark, after = page.partition("## Counted")
    if not mark:
        raise ValueError("the page has no heading '## Counted' to put the run before")
    return f"{before}{part}\n\n{mark}{after}"
