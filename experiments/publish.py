"""What is committed of the set: `python experiments/publish.py`, after `run.py`.

Copies each sweep's comparison and page to `results/`, draws the README's picture, and writes
the tables of this folder's README. Runs that are missing are left out of all of them; a sweep that
was not run keeps what is committed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fedmap_sparse import page
from fedmap_sparse._files import write_atomically

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PICTURE = HERE.parent / "docs" / "images" / "claim.svg"
BUILD = Path("build")
SWEEPS = {name: BUILD / "experiments" / name for name in ("claim", "baselines")}
SWEEPS |= {name: BUILD / f"experiments-{name}" for name in ("choice", "hotter", "longer")}
#: Figures of a comparison: words, and the points below dense FedAvg that the claim allows.
AIMS = {"accuracy": ("accuracy", 0.5), "clients_worst": ("worst client", 2.0)}
#: Points that the picture shows on either side of dense FedAvg.
REACH = 6.0

Json = dict[str, Any]


def main() -> None:
    for name, folder in SWEEPS.items():
        if (folder / "comparison.json").exists():
            found = json.loads((folder / "comparison.json").read_text())
            for setting in found["settings"]:
                for method in setting["methods"]:
                    del method["folders"]  # of the machine that ran them
            write_atomically(
                RESULTS / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode()
            )
        if (folder / "report.html").exists():
            shutil.copyfile(folder / "report.html", RESULTS / f"{name}.html")
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in SWEEPS}
    write_atomically(PICTURE, picture(found["claim"]).encode())
    readme = HERE / "README.md"
    words = readme.read_text()
    for name, table in TABLES.items():
        words = put(words, name, table(found[name]))
    write_atomically(readme, words.encode())


def put(words: str, name: str, lines: list[str]) -> str:
    """The page with its table of that name replaced.

    Raises:
        ValueError: it has no place for one.
    """
    begin, end = f"<!-- {name}: written by publish.py -->", f"<!-- end of {name} -->"
    if begin not in words or end not in words:
        raise ValueError(f"README.md: expected {begin} and {end}, found neither or one")
    before, after = words.split(begin)[0], words.split(end)[1]
    return "\n".join([before + begin, "", *lines, "", end + after])


def claim_table(found: Json) -> list[str]:
    lines = [
        "| data and model | clients | pruned | seeds | dense | accuracy | worst client | aim |",
        "|---|---|---:|---:|---:|---|---|---|",
    ]
    for setting, method in pruned(found):
        dense = reference(setting, method)
        cells = [
            *names(setting),
            f"{1 - mean(method['density']):.0%}",
            str(len(method["paired_seeds"])),
            f"{mean(dense['accuracy']):.2%}",
            *(interval(method, key) for key in AIMS),
            "reached" if reaches(method) else "missed",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def method_table(found: Json) -> list[str]:
    lines = [
        "| method | seeds | test | density | MB a run | accuracy | worst client |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for setting in found["settings"]:
        for method in setting["methods"]:
            sent = mean(method["uplink_bytes"]) + mean(method["downlink_bytes"])
            cells = [
                method["label"],
                str(len(method["seeds"])),
                f"{mean(method['accuracy']):.2%}",
                f"{mean(method['density']):.0%}",
                f"{sent / 1e6:.1f}",
                *(interval(method, key) for key in AIMS),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def choice_table(found: Json) -> list[str]:
    lines = [
        "| options beside `choice.toml`'s | seeds | dense, validation | FedMap, points |",
        "|---|---:|---:|---|",
    ]
    for setting, method in pruned(found):
        dense = reference(setting, method)
        cells = [
            f"`{method['label'].removeprefix('fedmap ')}`",
            str(len(method["paired_seeds"])),
            f"{mean(dense['validation_last_mean']):.2%}",
            interval(method, "validation_last_mean"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def longer_table(found: Json) -> list[str]:
    lines = [
        "| options | seeds | dense | accuracy | worst client | validation, last three rounds |",
        "|---|---:|---:|---|---|---|",
    ]
    for setting, method in pruned(found):
        cells = [
            f"`{method['label'].removeprefix('fedmap ')}`",
            str(len(method["paired_seeds"])),
            f"{mean(reference(setting, method)['accuracy']):.2%}",
            *(interval(method, key) for key in (*AIMS, "validation_last_mean")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


TABLES = {
    "claim": claim_table,
    "baselines": method_table,
    "choice": choice_table,
    "hotter": claim_table,
    "longer": longer_table,
}


def pruned(found: Json) -> list[tuple[Json, Json]]:
    """Each method that is not dense and is paired with one that is, with its setting."""
    found_in = ((s, m) for s in found["settings"] for m in s["methods"])
    return [(s, m) for s, m in found_in if m["arm"] != "dense" and m["points"]]


def reference(setting: Json, method: Json) -> Json:
    named: list[Json] = [m for m in setting["methods"] if m["label"] == method["reference"]]
    return named[0]


def names(setting: Json) -> tuple[str, str]:
    o = setting["options"]
    data = "small data" if str(o["dataset"]).endswith(".npz") else "subset"
    spread = "IID" if o["partition"] == "iid" else f"Dirichlet({o['alpha']:g})"
    return f"{data}, {o['model']}", spread


def reaches(method: Json) -> bool:
    return all(method["points"][key]["mean"] >= -most for key, (_, most) in AIMS.items())


def interval(method: Json, key: str) -> str:
    p = method["points"].get(key)
    if p is None:
        return ""
    ends = "no interval" if p["low"] is None else f"[{p['low']:+.2f}, {p['high']:+.2f}]"
    return f"{p['mean']:+.2f} {ends}"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def picture(found: Json) -> str:
    """Each combination's paired differences: seeds, mean and interval beside what is allowed."""
    page.load()
    from fedmap_sparse.page.drawing import MARK, OURS, THEIRS, bars

    rows = pruned(found)
    labels = [f"{', '.join(names(s))}, {1 - mean(m['density']):.0%} pruned" for s, m in rows]
    styles = dict(zip(AIMS, ((OURS, -0.07), (THEIRS, 0.2)), strict=True))

    def draw(axes: Any) -> None:
        for at, (setting, method) in enumerate(rows):
            dense, seeds = reference(setting, method), method["paired_seeds"]
            for key, (colour, beside) in styles.items():
                y, p = at + beside, method["points"][key]
                each = [100 * (of(method, key, s) - of(dense, key, s)) for s in seeds]
                axes.plot(each, [y] * len(each), "|", color=colour, markersize=7)
                if p["low"] is not None:
                    axes.plot([p["low"], p["high"]], [y, y], color=colour, linewidth=1.2)
                axes.plot([p["mean"]], [y], "o", color=colour, markersize=6)
                limit = -AIMS[key][1]
                axes.plot([limit, limit], [y - 0.12, y + 0.12], color=MARK, linewidth=2.5)
        axes.axvline(0, color=THEIRS, linewidth=0.8)
        axes.set_xlim(-REACH, REACH)
        axes.set_xlabel("points of test accuracy beside dense FedAvg")

    legend = {words: styles[key][0] for key, (words, _) in AIMS.items()} | {"allowed": MARK}
    title = "The claim on four combinations: differences from dense FedAvg with 95% intervals"
    return page.alone(page.Picture(title, "", bars("claim", labels, draw, legend=legend)))


def of(method: Json, key: str, seed: int) -> float:
    value: float = method[key][method["seeds"].index(seed)]
    return value


if __name__ == "__main__":
    main()
