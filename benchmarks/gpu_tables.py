"""Tables of what `tools/measure_gpu.py` measured, as Markdown; an empty one has no lines."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

Json = dict[str, Any]
MARK = " (CUDA C++)"
#: Microseconds that were asked of an H100 before it was measured, by workload.
GOALS: dict[str, float] = {
    "select float32": 85, "select within 0.3": 70, "pack float32 0.1": 36, "unpack float32 0.1": 46,
    "extract 0.1": 14, "deposit 0.1": 12, "masked_sgd float32 0.01": 25,
    "masked_adamw float32 0.01": 25, "weighted_mean 10 float32": 400, "cast float32 bfloat16": 60,
    "quantize_int8 feedback": 120, "digest": 8, "encode_mask 0.1": 100, "message out 0.1": 1000,
    "message in 0.1": 600,
}  # fmt: skip
TIES_GOALS = {"constant float32 0.1": 170}
HOST_GOALS = {"select": 50}
#: torch's kernels, whose names fill lines, by a word of theirs.
_SHORT = {
    "FillFunctor": "fill", "direct_copy": "copy", "DeviceScan": "scan", "Memcpy HtoD": "to device",
    "Memcpy DtoH": "to host", "Memcpy DtoD": "copy", "Memset": "memset", "reduce_kernel": "reduce",
    "kernel_scan": "scan", "elementwise_kernel": "elementwise",
}  # fmt: skip


def kernel(name: str) -> str:
    """A kernel's name as short as it is told apart by."""
    for word, short in _SHORT.items():
        if word in name:
            return short
    bare = re.sub(r"<.*|\(.*", "", name).split("::")[-1].removeprefix("void ").strip()
    return bare.lstrip("_")


def goal(name: str, us: float, goals: dict[str, float]) -> str:
    wanted = goals.get(name.removesuffix(MARK))
    return "" if wanted is None else f"{wanted:g}, {'met' if us <= wanted else '**missed**'}"


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    """Columns of numbers to the right."""
    if not rows:
        return []
    numbers = [all(re.fullmatch(r"(×?[\d.,]+)?", str(cell)) for cell in column)
               for column in zip(*rows, strict=True)]  # fmt: skip
    lines = [head, ["---:" if right else "---" for right in numbers], *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def copy_rate(machine: Json) -> float | None:
    """GB/s of the fastest copy."""
    rates = machine.get("bandwidth", {}).items()
    return max((row["GB/s"] for name, row in rates if name.startswith("copy")), default=None)


def three(us: float) -> str:
    """Microseconds, to what their spread allows."""
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def ops(step: Json, rate: float | None) -> list[str]:
    rows: list[list[object]] = []
    for name, row in step.get("workloads", {}).items():
        if "error" in row:
            rows.append([name, "failed", "", "", "", row["error"].replace("|", "/")[:80]])
            continue
        floor = row["floor_bytes"] / rate / 1000 if rate else None
        kernels: dict[str, float] = defaultdict(float)
        for each, us in row.get("kernels_us", {}).items():
            kernels[kernel(each)] += us
        rows.append([
            name, three(row["us"]), three(floor) if floor else "",
            f"{row['us'] / floor:.2f}" if floor else "", goal(name, row["us"], GOALS),
            ", ".join(f"{k} {us:.1f}" for k, us in kernels.items()),
        ])  # fmt: skip
    head = ["op, density", "us", "floor", "× floor", "goal", "its kernels, by the profiler"]
    return table(head, rows)


def peers(step: Json) -> list[str]:
    rows: list[list[object]] = []
    for r in step.get("records", []):
        others = sorted(r["peers"].items(), key=lambda item: item[1]["median_s"])
        told = [
            f"{name} {three(1e6 * one['median_s'])} ({three(1e6 * one['call_s'])}), "
            f"×{one['speedup']:.1f}"
            for name, one in others
        ]
        ours = f"{three(1e6 * r['median_s'])} ({three(1e6 * r['call_s'])})"
        rows.append([
            f"{r['op']}, {r['density']:g}", ours,
            three(1e6 * r["floor_s"]), "; ".join(told),
        ])  # fmt: skip
    rows += [
        [f"{r['op']}, {r['density']:g}", "refused", "", r["reason"].replace("|", "/")[:120]]
        for r in step.get("refused", [])
    ]
    return table(["op, density", "this, us", "a copy of as many bytes", "peers, us"], rows)


def ties(step: Json) -> list[str]:
    """A row for each input, a column for each width, share and implementation."""
    found: dict[str, dict[str, Json]] = defaultdict(dict)
    for title, row in step.get("ties", {}).items():
        mark = MARK if title.endswith(MARK) else ""
        name, width, share = title.removesuffix(MARK).rsplit(" ", 2)
        found[name][f"{width} {share}{mark}"] = row
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    columns.sort(key=lambda column: column.endswith(MARK))
    rows: list[list[object]] = []
    for name, cells in found.items():
        line: list[object] = [name]
        for column in columns:
            row = cells.get(column)
            told = f"{three(row['us'])} (×{row['of normal']:g})" if row else ""
            if row and (wanted := goal(f"{name} {column}", row["us"], TIES_GOALS)):
                told += f"; goal {wanted}"
            line.append(told)
        rows.append(line)
    return table(["input", *columns], rows)


def waits(step: Json) -> list[str]:
    captures, host = step.get("captures", {}), step.get("host_us", {})
    syncs = {name: len(seen) for name, seen in step.get("syncs", {}).items()}
    rows: list[list[object]] = []
    for name in dict.fromkeys([*host, *syncs, *captures]):
        us = host.get(name)
        rows.append([
            name, "" if us is None else us, "" if us is None else goal(name, us, HOST_GOALS),
            syncs.get(name, ""), captures.get(name, "").splitlines()[0].replace("|", "/")
            if captures.get(name) else "",
        ])  # fmt: skip
    made = table(["op", "host, us", "goal", "waits for the device", "captured"], rows)
    if parts := step.get("parts_us"):
        told = ", ".join(f"{name} {us}" for name, us in parts.items())
        made += ["", f"What the host's time of a small pack is made of, us: {told}."]
    return made


def graphs(step: Json) -> list[str]:
    rows: list[list[object]] = []
    for name, row in step.get("wall_us", {}).items():
        if "error" in row:
            rows.append([name, "failed", "", row["error"].replace("|", "/")[:80]])
        else:
            times = f"×{row['direct'] / row['replay']:.1f}" if row["replay"] else ""
            rows.append([name, row["direct"], row["replay"], times])
    return table(["work", "directly, us", "replayed", "less"], rows)


def sweeps(step: Json) -> list[str]:
    """A row for each constant: what was tried, what is kept, and what it changed."""
    rows: list[list[object]] = []
    for constant, sweep in step.get("sweeps", {}).items():
        default, kept = _value(sweep["default"]), _value(sweep.get("chosen", sweep["default"]))
        us = sweep["us"]
        others = [value for value in us if value != default]
        failed = [value for value in others if isinstance(us[value], str)]
        base, best = us[default], us[kept]
        told = ", ".join(f"{name} {base[name]} → {best[name]}" for name in base)
        if kept == default:
            timed = [v for v in others if v not in failed]
            told = ", ".join(
                f"{name} {base[name]}, others {_range([us[v][name] for v in timed])}"
                for name in base
            )
        tried = ", ".join(f"{v} (failed)" if v in failed else v for v in others)
        rows.append([constant, default, tried, "" if kept == default else f"**{kept}**", told])
    return table(["constant", "was", "tried", "better", "us"], rows)


def _value(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, list) else str(value)


def _range(times: list[float]) -> str:
    if not times:
        return "not timed"
    return f"{min(times)}" if len(times) == 1 else f"{min(times)} to {max(times)}"


def fetches(step: Json) -> list[str]:
    found = step.get("l2_fetch", {})
    names = list(dict.fromkeys(n for row in found.values() for n in row if n != "accepted"))
    return table(["bytes", *names], [[size, *(row.get(n, "") for n in names)]
                                     for size, row in found.items()])  # fmt: skip


def chunks(step: Json) -> list[str]:
    rows: list[list[object]] = [
        [steps, f"{row['bytes']:,}", row.get("encode_mask", ""), row.get("decode_mask", "")]
        for steps, row in step.get("chunks", {}).items()
    ]
    return table(["steps per chunk", "bytes", "encode, us", "decode, us"], rows)


def times(step: Json) -> list[str]:
    rows: list[list[object]] = [[name, three(us)] for name, us in step.get("us", {}).items()]
    made = table(["op", "us"], rows)
    if made and step.get("peak_bytes"):
        made += ["", f"Most memory at a time: {step['peak_bytes'] / 1e9:.1f} GB."]
    return made


def counters(step: Json) -> list[str]:
    rows: list[list[object]] = []
    for one in step.get("launches", []):
        value = {key: number for key, number in one.items() if isinstance(number, int | float)}
        get = value.get
        rows.append([
            f"{one['workload']}: {kernel(one['kernel'])}",
            three(get("gpu__time_duration.sum", 0) / 1000),
            f"{get('dram__bytes_read.sum', 0) / 1e6:.1f}",
            f"{get('dram__bytes_write.sum', 0) / 1e6:.1f}",
            f"{get('sm__warps_active.avg.pct_of_peak_sustained_active', 0):.0f}",
            f"{get('smsp__issue_active.avg.pct_of_peak_sustained_active', 0):.0f}",
            f"{get('launch__registers_per_thread', 0):.0f}", _stall(value),
        ])  # fmt: skip
    head = ["workload: kernel", "us", "read, MB", "written, MB", "warps active, %",
            "issue slots, %", "registers", "most waited for"]  # fmt: skip
    return table(head, rows)


def _stall(value: dict[str, float]) -> str:
    start, end = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
    found = {key.removeprefix(start).removesuffix(end).replace("_", " "): number
             for key, number in value.items() if key.startswith(start)}  # fmt: skip
    if not found:
        return ""
    name = max(found, key=lambda key: found[key])
    return f"{name} {found[name]:.1f}"
