"""What a run of `tools/measure_gpu.py` found, as a section of benchmarks/GPU.md."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import gpu_tables as tables

BEGIN, END = "<!-- a run of tools/measure_gpu.py -->", "<!-- end of the run -->"
Json = dict[str, Any]
#: Of a run's files, what is kept with the project; the rest is of use to who mends a kernel.
_DROPPED = {"counters": ("code",), "waits": ("profile",), "contracts": ("longest",)}

#: What stands before a table.
_WORDS = {
    "Ops": "{n:,} elements. Goals were set for an H100, beforehand. Coding is bound by chains of "
    "dependent steps, which its floor does not count.",
    "Beside peers": "In turns within one process: `fedmap-sparse bench --device cuda`. In brackets "
    "what a caller waits who starts with an idle device.",
    "Inputs with ties": "Selections, and times a normal input's of the same width, share and "
    "implementation.",
    "What a caller waits for": "Of 1,048,576 elements: time until a call returns, the device busy; "
    "how often it waits for the device; whether a CUDA graph captures it in a process that has "
    "compiled nothing.",
    "Launched directly and replayed": "Per call, and as a CUDA graph; of 1,048,576 elements, and "
    "of an MLP of 159,010 weights.",
    "Constants tried": "One after another, the better kept while the next is tried: it saves over "
    "all of its workloads and slows none by a fiftieth. `triton_kernels/_tuning.py` has what they "
    "are now.",
    "Bytes fetched from memory at a time": "A hint to the driver, of 64 by default on an H200, "
    "which the package never sets, as it holds for all that a process does. Sparse reads gain by "
    "32: packing at density 0.1 a seventh, AdamW a tenth. Once torch has used the device, it is "
    '`ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(5, ctypes.c_size_t(32))`, or with cuda-bindings '
    "`runtime.cudaDeviceSetLimit(runtime.cudaLimit.cudaLimitMaxL2FetchGranularity, 32)`. "
    "Microseconds.",
    "Masks coded in chunks of other lengths": "At density 0.1.",
    "10^9 parameters in bfloat16": "At density 0.1.",
    "2^31 + 4,999 elements in bfloat16": "At density 0.1.",
    "Hardware counters": "By ncu, one launch each, at base clocks and from an empty cache.",
}


def read(folder: Path) -> dict[str, Json]:
    """Every JSON file of a run by its step; ValueError if nothing in it was measured."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if "run" not in found:
        raise ValueError(f"{folder}: expected run.json, found {', '.join(found) or 'nothing'}")
    if found["run"]["mode"] or any(step.get("dry") for step in found.values()):
        raise ValueError(f"{folder}: a dry run measures nothing")
    for name, keys in _DROPPED.items():
        for key in keys:
            found.get(name, {}).pop(key, None)
    for row in found.get("baseline", {}).get("workloads", {}).values():
        if "kernels_us" in row:
            row["kernels_us"] = {tables.kernel(k): us for k, us in row["kernels_us"].items()}
    if "counters" in found:  # what a run before this page's noted is of no workload
        told = [one for one in found["counters"].get("launches", ()) if "workload" in one]
        found["counters"]["launches"] = told
        if not told:
            del found["counters"]
    for step in found["run"]["steps"].values():
        step.pop("output", None)
    return found


def card(found: dict[str, Json]) -> str:
    """Such as "NVIDIA H200"."""
    return str(found.get("machine", {}).get("card", "an unnamed card"))


def keep(found: dict[str, Json], results: Path) -> Path:
    """Write the run's files, a line for each key, into the card's folder, in place of others."""
    name = card(found).removeprefix("NVIDIA ").split()[0].lower()
    folder = results / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        path.unlink()
    for step, content in found.items():
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in
                           content.items())  # fmt: skip
        (folder / f"{step}.json").write_text(f"{{\n{lines}\n}}\n")
    return folder


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


def _ended(run: Json) -> str:
    """Which steps there were, and which did not come to their end."""
    steps = run["steps"]
    states: dict[str, list[str]] = {}
    for name, step in steps.items():
        states.setdefault(step["state"], []).append(name)
    parts = [f"{', '.join(names)} {state}" for state, names in states.items()]
    seconds = sum(step["seconds"] for step in steps.values())
    return f"Steps: {'; '.join(parts)}; {seconds:.0f} s."


def _left_out(found: dict[str, Json]) -> list[str]:
    lines = []
    for name, step in found.items():
        out = step.get("left_out")
        if out:
            lines.append(f"- {name}: {', '.join(out) if isinstance(out, list) else out}")
        for what, why in step.get("missing", {}).items():
            lines.append(f"- {name}: {what}: {why}")
        if out := step.get("peers_left_out"):
            lines.append(f"- {name}: {', '.join(out)}, which would have taken the others' time")
    return lines


def _tests(step: Json) -> list[str]:
    if "tests" not in step:
        return []
    stress = step.get("stress")
    told = ""
    if stress:
        many, wrong = stress["selections"], stress["wrong"]
        told = f"; {many:,} selections beside a stream that writes, {wrong} wrong"
    lines = [f"{step['tests']}{told}."]
    failures = step.get("failures", {})
    lines += [f"- {name}: {_line(text)}" for name, text in failures.items()]
    return ["", *lines] if failures else lines


def _line(text: str) -> str:
    """The first line of a failure that says something."""
    said = [line.strip() for line in text.splitlines() if re.match(r"E |\w*Error", line.strip())]
    return (said[0] if said else text.strip().splitlines()[-1] if text.strip() else "")[:160]


def section(found: dict[str, Json], note: str = "") -> str:
    """The page's part between BEGIN and END: card, versions, date, commit, then the figures."""
    run, machine = found["run"], found.get("machine", {})
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items())
    rate = tables.copy_rate(machine)
    baseline = found.get("baseline", {})
    lines = [
        BEGIN,
        f"## Measured on one {card(found).removeprefix('NVIDIA ')}",
        "",
        *_wrapped(
            f"{card(found)}; {versions}; commit {run['commit'][:7]}, {run['time'][:10]}. {note} "
            f"{_ended(run)} Raw figures: `benchmarks/results`, in the card's folder."
        ),
        "",
        *_wrapped(
            "Microseconds of the device's own time, medians of 15: launches are queued before, and "
            "the L2 cache is full of what nobody wants. A floor is what any method must move, at "
            "the rate of the card's copies " + (f"({rate:,.0f} GB/s)." if rate else "(not timed).")
        ),
    ]
    parts = {
        "Ops": tables.ops(baseline, rate),
        "Beside peers": tables.peers(found.get("peers", {})),
        "Inputs with ties": tables.ties(found.get("ties", {})),
        "What a caller waits for": tables.waits(found.get("waits", {})),
        "Launched directly and replayed": tables.graphs(found.get("graphs", {})),
        "Constants tried": tables.sweeps(found.get("sweeps", {})),
        "Bytes fetched from memory at a time": tables.fetches(found.get("sweeps", {})),
        "Masks coded in chunks of other lengths": tables.chunks(found.get("chunks", {})),
        "10^9 parameters in bfloat16": tables.times(found.get("scale", {})),
        "2^31 + 4,999 elements in bfloat16": tables.times(found.get("large", {})),
        "Hardware counters": tables.counters(found.get("counters", {})),
        "`tests/gpu` there": _tests(found.get("contracts", {})),
        "With the fastest constants": _winners(found.get("winners", {})),
        "Left out: no time, or a package was missing": _left_out(found),
    }
    for title, part in parts.items():
        if part:
            words = _WORDS.get(title, "").format(n=baseline.get("n", 0))
            lines += ["", f"### {title}", "", *([*_wrapped(words), ""] if words else []), *part]
    return "\n".join([*lines, END])


def _winners(step: Json) -> list[str]:
    times = step.get("select_us", {})
    told = ", ".join(f"{name} {us} us" for name, us in times.items())
    lines = [f"A selection of float32, a tenth: {told}."] if told else []
    if "tests" in step:
        lines.append(f"`tests/gpu/test_contracts.py` with them: {step['tests']}.")
    return lines


def put(page: str, part: str) -> str:
    """The page with its measured part replaced, or added before the first '## Measured on'."""
    if BEGIN in page:
        before, after = page.split(BEGIN, 1)[0], page.split(END, 1)[1]
        return before + part + after
    before, mark, after = page.partition("## Measured on")
    if not mark:
        raise ValueError("the page has no heading '## Measured on' to put the run before")
    return f"{before}{part}\n\n{mark}{after}"
