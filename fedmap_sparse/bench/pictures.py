"""Records as pictures of a page. The `name` of a picture has to be its own within the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from fedmap_sparse.bench.case import PHASES
from fedmap_sparse.bench.growth import Series
from fedmap_sparse.bench.report import seconds
from fedmap_sparse.bench.runner import Record
from fedmap_sparse.page.drawing import (
    INK,
    LINES,
    MARK,
    MARKERS,
    OURS,
    THEIRS,
    bars,
    beside,
    plot,
    short,
)


def bandwidth(name: str, records: Sequence[Record]) -> str:
    """GB/s of each record as a bar, and its floor's as a line across it."""
    rows = [(label(r, records), float(r["gbps"]), r["bytes"] / r["floor_s"] / 1e9) for r in records]

    def draw(axes: Axes) -> None:
        for at, (_, ours, floor) in enumerate(rows):
            axes.barh(at, ours, height=0.4, color=OURS)
            axes.plot([floor, floor], [at - 0.24, at + 0.24], color=MARK, linewidth=2.5)
        axes.set_xlim(0, 1.35 * max(max(row[1:]) for row in rows))
        for at, (_, ours, floor) in enumerate(rows):
            beside(axes, at, max(ours, floor), f"{ours:.3g} of {floor:.3g}")
        axes.set_xlabel("GB/s")

    return bars(name, [row[0] for row in rows], draw)


def speedups(name: str, rows: Sequence[tuple[str, float]]) -> str:
    """How many times faster than a peer, from a line at 1 on; a logarithmic axis."""

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        times = [value for _, value in rows]
        axes.set_xlim(min(1.0, 0.8 * min(times)), 3 * max(1.0, *times))
        for at, (_, value) in enumerate(rows):
            axes.barh(at, value - 1, left=1, height=0.4, color=OURS if value >= 1 else THEIRS)
            beside(axes, at, max(value, 1), f"×{value:.3g}")
        axes.axvline(1, color=INK, linewidth=1)
        axes.xaxis.set_major_formatter(lambda x, _: f"×{x:g}")

    return bars(name, [row[0] for row in rows], draw)


def rounds(name: str, records: Sequence[Record]) -> str:
    """Phases of each arm's round, stacked, as shares of the slowest arm's time."""
    labels, stacks, totals = [], [], []
    for r in records:
        arms = {"ours": r, **r["peers"]}
        slowest = max(sum(arm["phases_s"].values()) for arm in arms.values())
        for kind, arm in arms.items():
            place = f"{r['op'].removeprefix('round_')} {r['density']:g}, " if arm is r else ""
            labels.append(place + kind)
            stacks.append([arm["phases_s"][phase] / slowest for phase in PHASES])
            totals.append(seconds(sum(arm["phases_s"].values())))

    def draw(axes: Axes) -> None:
        for at, (shares, total) in enumerate(zip(stacks, totals, strict=True)):
            left = 0.0
            for share, colour in zip(shares, LINES, strict=True):
                axes.barh(at, share, left=left, height=0.4, color=colour)
                left += share
            beside(axes, at, left, total)
        axes.set_xlim(0, 1.22)
        axes.set_xticks([0, 0.5, 1], ["0", "half", "the slowest"])

    return bars(name, labels, draw, legend=dict(zip(PHASES, LINES, strict=True)))


def growth(name: str, curves: Sequence[Series]) -> str:
    """Curves along one axis: time, against n that of an element; the floor's dashed."""
    axis = curves[0].axis

    def draw(axes: Axes) -> None:
        for k, one in enumerate(curves):
            x = one.values(axis)
            per = x if axis == "n" else [1.0] * len(x)
            unit = 1e-9 if axis == "n" else 1e-3
            colour, marker = LINES[k % len(LINES)], MARKERS[k % len(MARKERS)]
            ours, floor = (
                [t / p / unit for t, p in zip(one.values(key), per, strict=True)]
                for key in ("median_s", "floor_s")
            )
            style: dict[str, Any] = {"color": colour, "linewidth": 1.8}
            axes.plot(x, ours, marker=marker, markersize=4.5, label=short(one.name), **style)
            axes.plot(x, floor, linestyle="--", **{**style, "linewidth": 1.2})
        axes.set_xscale("log", base=2 if axis == "threads" else 10)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: "")
        axes.xaxis.set_minor_formatter(lambda x, _: "")
        if axis == "n":
            axes.xaxis.set_major_formatter(lambda x, _: f"1e{math.log10(x):.0f}")
        else:
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel(axis)
        axes.set_title("ns per element" if axis == "n" else "ms", fontsize=11, loc="left")

    return plot(name, draw, entries=len(curves))


def label(record: Record, among: Sequence[Record]) -> str:
    """An op with what tells its record from others of its name."""
    same = [r for r in among if r["op"] == record["op"]]
    shown = {
        "density": f"{record['density']:g}",
        "n": f"{record['n']:,}",
        "dtype": record["dtype"],
        "threads": f"{record['threads']} threads",
        "inputs": record["inputs"],
    }
    telling = [k for k in shown if k == "density" or len({r[k] for r in same}) > 1]
    return short(" ".join([record["op"], *(shown[k] for k in telling)]))
