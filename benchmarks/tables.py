"""Records of `fedmap-sparse bench` as the tables of README.md, each beside what it has to reach.

    python benchmarks/tables.py benchmarks/results/*.json [--write]

Without --write the tables go to standard output; with it, into README.md between its two markers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fedmap_sparse.bench.case import PHASES
from fedmap_sparse.bench.report import (
    GROWTH_HEAD,
    growth_rows,
    header_line,
    over_floor,
    produced,
    seconds,
)

README = Path(__file__).with_name("README.md")
MARKERS = ("<!-- tables: python benchmarks/tables.py --write -->", "<!-- end of tables -->")

# (op, density): at most this many times the floor, then at least so many times faster than a peer.
FUSED = "fused + mask"
GOALS: dict[tuple[str, float], tuple[float | None, dict[str, float]]] = {
    ("select", 0.5): (2.2, {"torch.topk": 50, "torch.kthvalue": 50, "numpy partition": 4}),
    ("select", 0.1): (1.4, {"torch.topk": 50, "torch.kthvalue": 50, "numpy partition": 4}),
    ("select", 0.01): (1.7, {"torch.topk": 50, "torch.kthvalue": 50, "numpy partition": 4}),
    ("select_packed", 0.1): (None, {"select over all": 5}),
    ("pack", 0.1): (1.35, {"masked_select": 50, "index_select": 2}),
    ("unpack", 0.1): (1.2, {"masked_scatter_": 5, "zero_ + index_copy_": 1.8}),
    ("masked_sgd", 0.1): (1.2, {FUSED: 2.3}),
    ("masked_sgd", 0.01): (1.5, {FUSED: 3}),
    ("masked_adamw", 0.1): (1.2, {FUSED: 2.3}),
    ("masked_adamw", 0.01): (1.5, {FUSED: 3}),
    ("accumulate", 0.5): (1.1, {"add_ loop": 2, "stack, weighted sum": 10}),
    ("deposit", 0.1): (2.0, {}),
    ("extract", 0.1): (2.0, {}),
    ("median_10", 1.0): (None, {"torch.median": 20, "numpy.median": 20}),
    ("median_50", 1.0): (None, {"torch.median": 20, "numpy.median": 20}),
    ("trimmed_10", 1.0): (None, {"scipy trim_mean": 20}),
    ("trimmed_50", 1.0): (None, {"scipy trim_mean": 20}),
}
LATENCY_US = 5
#: Whole models: at least so many times faster than the best peer, by optimizer and density.
MODEL_GOALS = {
    ("sgd", 1.0): 1.0,
    ("sgd", 0.1): 2.0,
    ("sgd", 0.01): 3.0,
    ("adamw", 1.0): 1.0,
    ("adamw", 0.1): 2.3,
    ("adamw", 0.01): 3.0,
}


def mark(text: str, reached: bool | None) -> str:
    """Bold where the goal is missed; plain where there is none or it is reached."""
    return f"**{text}**" if reached is False else text


def op_row(r: dict[str, Any]) -> list[str]:
    most, least = GOALS.get((r["op"], r["density"]), (None, {}))
    if r["op"].startswith("latency_"):
        beyond = (r["median_s"] - r["floor_s"]) * 1e6
        floor = mark(over_floor(r), beyond < LATENCY_US) + f" (goal {LATENCY_US})"
    else:
        goal = f" (goal {most})" if most else ""
        floor = mark(over_floor(r), r["ratio_to_floor"] <= most if most else None) + goal
    peers = [f"ours{produced(r)}"] if "payload_bytes" in r else []
    for name, p in r["peers"].items():
        goal = f" (goal {least[name]:g})" if name in least else ""
        reached = p["speedup"] >= least[name] if name in least else None
        times = mark(f"×{p['speedup']:.3g}", reached)
        peers.append(f"{name} {seconds(p['median_s'])}, {times}{goal}{produced(p)}")
    spread = f"{seconds(r['p20_s'])}–{seconds(r['p80_s'])}"
    return [r["op"], f"{r['density']:g}", seconds(r["median_s"]), spread, floor, "; ".join(peers)]


def model_row(r: dict[str, Any]) -> list[str]:
    optimizer, _, model = r["op"].partition("_")
    best = min(r["peers"].values(), key=lambda p: p["median_s"])["speedup"]
    goal = MODEL_GOALS.get((optimizer, r["density"]))
    text = mark(f"×{best:.3g}", best >= goal if goal else None) + (
        f" (goal {goal:g})" if goal else ""
    )
    peers = "; ".join(f"{name} {seconds(p['median_s'])}" for name, p in r["peers"].items())
    state = f"{r['state_bytes'] / 1e6:.3g} MB"
    return [optimizer, model, f"{r['density']:g}", seconds(r["median_s"]), text, peers, state]


def round_rows(r: dict[str, Any]) -> list[list[str]]:
    """One row per arm of a round."""
    goals = (12, 13, 2.5) if r["density"] == 0.1 else (None, None, None)
    rows = []
    for name, arm in (("ours", r), *r["peers"].items()):
        cells = []
        for key, goal in zip(("median_s", "payload_bytes", "memory_bytes"), goals, strict=True):
            value = seconds(arm[key]) if key == "median_s" else f"{arm[key] / 1e6:.3g} MB"
            if arm is r:
                cells.append(value)
                continue
            times = arm[key] / r[key]
            text = mark(f"×{times:.3g}", times >= goal if goal else None)
            cells.append(f"{value}, {text}" + (f" (goal {goal:g})" if goal else ""))
        phases = " / ".join(f"{arm['phases_s'][phase] * 1e3:.3g}" for phase in PHASES)
        model = r["op"].removeprefix("round_")
        beside = seconds(r["forward_backward_s"])
        place = [model, f"{r['density']:g}"] if arm is r else ["", ""]
        rows.append([*place, name, *cells, phases, beside if arm is r else ""])
    return rows


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tables(found: dict[str, Any]) -> str:
    records = found["records"]
    by_model = [r for r in records if "state_bytes" in r and r["inputs"] == "init"]
    rounds = [r for r in records if "phases_s" in r]
    rest = [r for r in records if r not in by_model and r not in rounds]
    header = found["header"]
    parts = [
        f"{header_line(header)}; {header['time']}; others kept {header['others_cpus']:g} CPUs busy."
    ]
    if "growth=True" in header["arguments"]:
        parts.append("Growth along one axis, from its first point to its last:")
        parts.append(markdown(GROWTH_HEAD, growth_rows(rest, header["last_level_cache"])))
    elif rest:
        names = sorted({f"{r['n']:,} {r['dtype']}, {r['inputs']}" for r in rest if r["n"] > 1000})
        parts.append(f"Of {'; '.join(names)} values:")
        head = ["op", "density", "median", "p20–p80", "× floor", "peers: median, × ours"]
        parts.append(markdown(head, [op_row(r) for r in rest]))
    if by_model:
        head = ["optimizer", "model", "density", "ours", "best peer", "peers", "state"]
        parts.append(markdown(head, [model_row(r) for r in by_model]))
    if rounds:
        r = rounds[0]
        parts.append(f"Whole rounds of {r['clients']} clients, {r['steps']} steps each:")
        head = ["model", "density", "arm", "time", "bytes", "peak memory"]
        head += [f"ms: {', '.join(PHASES)}", "forward and backward, beside"]
        parts.append(markdown(head, [row for r in rounds for row in round_rows(r)]))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    files = args.files or sorted(README.with_name("results").glob("*.json"))
    text = "\n\n".join(tables(json.loads(file.read_text())) for file in files)
    if not args.write:
        print(text)
        return
    before, _, rest = README.read_text().partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    README.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    main()
