"""Methods side by side, over seeds: means, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import results
from fedmap_sparse.experiments.intervals import CONFIDENCE, Interval
from fedmap_sparse.experiments.report import human_bytes, table
from fedmap_sparse.experiments.results import Method, Setting

#: Figures of a summary that are compared, in points.
ACCURACIES = {"accuracy": "accuracy", "clients.worst": "worst client"}
#: What settings are chosen by, so that test is left alone: compared in JSON only.
CHOICE = "validation_last_mean"


@dataclass(frozen=True)
class Comparison:
    """One method beside its reference, over the seeds that both have.

    Attributes:
        seeds: those.
        reference: None where there is nothing to compare with.
        differences: in points, by the key of the figure; empty without a common seed.
        unpaired: why seeds or the whole method cannot be paired, in words.
    """

    method: Method
    reference: Method | None
    seeds: list[int]
    differences: dict[str, Interval]
    unpaired: list[str]


@dataclass(frozen=True)
class Table:
    """All of a setting: its methods, each with what it is compared with."""

    setting: Setting
    rows: list[Comparison]


def compared(settings: Sequence[Setting]) -> list[Table]:
    """Each method of each setting beside its reference (`Setting.reference`)."""
    return [Table(s, [_beside(m, s.reference(m), s) for m in s.methods]) for s in settings]


def _beside(method: Method, reference: Method | None, setting: Setting) -> Comparison:
    if reference is None:
        lonely = [f"{method.label}: no other method under {setting.label}"]
        return Comparison(method, None, [], {}, lonely if len(setting.methods) == 1 else [])
    common = sorted(method.runs.keys() & reference.runs.keys())
    unpaired = [
        f"{one.label}, seed {seed}: {other.label} has no run of this seed"
        for one, other in ((method, reference), (reference, method))
        for seed in one.seeds
        if seed not in other.runs
    ]
    differences = {}
    for key in (*ACCURACIES, CHOICE):
        if common and method.has(key) and reference.has(key):
            pairs = zip(method.of(key, common), reference.of(key, common), strict=True)
            differences[key] = Interval.of([100 * (a - b) for a, b in pairs])
    return Comparison(method, reference, common, differences, unpaired)


def lines(tables: Sequence[Table], notes: Sequence[str]) -> list[str]:
    """The comparison as text; `notes` are about what was left out."""
    found: list[str] = []
    for one in tables:
        rows = [["method", "seeds", "accuracy", "worst client", "density", "bytes", "differences"]]
        rows += [
            [
                row.method.label,
                str(len(row.method.runs)),
                mean_of(row.method, "accuracy"),
                mean_of(row.method, "clients.worst"),
                f"{mean(row.method.of('density')):.2%}",
                human_bytes(round(sent(row.method))),
                "" if row.reference is None else f"to {row.reference.label}:",
            ]
            for row in one.rows
        ]
        drawn = table(rows)
        found += ["", one.setting.label, drawn[0]]
        for row, line in zip(one.rows, drawn[1:], strict=True):
            found.append(line)
            found += [
                f"    {name}: {row.differences[key].shown('points')}"
                for key, name in ACCURACIES.items()
                if key in row.differences
            ]
    found += ["", *_reading(tables)]
    unpaired = [line for one in tables for row in one.rows for line in row.unpaired]
    unpaired += _between(tables)
    for title, own in (("not paired:", unpaired), ("left out:", notes)):
        if own:
            found += ["", title, *(f"  {line}" for line in dict.fromkeys(own))]
    return found


def _reading(tables: Sequence[Table]) -> list[str]:
    if not any(row.differences for one in tables for row in one.rows):
        return ["nothing to pair: no two methods share data, clients, model and a seed"]
    words = "Differences: method minus reference, over the n seeds that both have; mean"
    return [
        f"{words} [{CONFIDENCE:.0%} interval by Student's t].",
        "An interval that holds 0 shows no difference; with few seeds it is wide.",
    ]


def _between(tables: Sequence[Table]) -> list[str]:
    if len(tables) < 2:
        return []
    first = tables[0].setting
    return [
        f"{other.setting.label} with {first.label}: "
        + ", ".join(results.differing(other.setting.options, first.options))
        for other in tables[1:]
    ]


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def mean_of(method: Method, key: str) -> str:
    """The mean of a share over seeds as text; "unknown" where a run lacks it."""
    return f"{mean(method.of(key)):.2%}" if method.has(key) else "unknown"


def sent(method: Method) -> float:
    """Mean bytes of a run, both ways."""
    return mean(method.of("uplink_bytes")) + mean(method.of("downlink_bytes"))


def to_dict(tables: Sequence[Table], notes: Sequence[str]) -> dict[str, Any]:
    """The comparison for JSON: by setting and method, every value with its seed."""
    return {
        "confidence": CONFIDENCE,
        "settings": [
            {
                "label": one.setting.label,
                "options": one.setting.options,
                "methods": [_row(row) for row in one.rows],
            }
            for one in tables
        ],
        "left_out": list(notes),
    }


def _row(row: Comparison) -> dict[str, Any]:
    method = row.method
    keys = ("accuracy", CHOICE, "clients.worst", "density", "uplink_bytes", "downlink_bytes")
    return {
        "label": method.label,
        "arm": method.arm,
        "seeds": method.seeds,
        "folders": [str(method.runs[seed].path) for seed in method.seeds],
        **{key.replace(".", "_"): method.of(key) for key in keys},
        "reference": None if row.reference is None else row.reference.label,
        "paired_seeds": row.seeds,
        "points": {key.replace(".", "_"): d.to_dict() for key, d in row.differences.items()},
        "unpaired": row.unpaired,
    }


def compare(paths: Sequence[Path]) -> tuple[list[str], dict[str, Any]]:
    """The runs in these folders side by side, as lines and for JSON.

    Raises:
        ConfigError: a path that is no folder, or no finished run in any of them.
    """
    runs, notes = results.find(paths)
    if not runs:
        where = ", ".join(map(str, paths))
        raise ConfigError("; ".join([f"no finished run in {where}", *notes]))
    tables = compared(results.together(runs))
    return lines(tables, notes), to_dict(tables, notes)
