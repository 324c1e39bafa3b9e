"""Records as pictures: SVG to stand inside a page, whose style sheet gives the colours.

Drawn as wide as a phone, so that a page only ever makes them larger. Text stays text. The `name` of
a picture has to be its own within the page: references inside it begin with it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from fedmap_sparse._text import printable
from fedmap_sparse.bench.case import PHASES
from fedmap_sparse.bench.growth import Series
from fedmap_sparse.bench.report import seconds
from fedmap_sparse.bench.runner import Record

#: What stands in the SVG for a colour of the page, and what replaces it there.
INK, GRID, OURS, THEIRS, MARK, BACK = (f"#00000{k}" for k in range(1, 7))
#: Of curves and of a round's phases, in order.
LINES = tuple(f"#0000{16 + k:02x}" for k in range(6))
COLOURS = {
    INK: "currentColor",
    GRID: "var(--grid)",
    OURS: "var(--ours)",
    THEIRS: "var(--theirs)",
    MARK: "var(--mark)",
    BACK: "var(--back)",
    **{colour: f"var(--line{k})" for k, colour in enumerate(LINES)},
}
#: Behind a text, so that no line of the grid crosses it.
GROUND: Any = {"facecolor": BACK, "edgecolor": "none", "pad": 0.5}
MARKERS = "os^Dv*"
WIDTH = 5.0  # inches, of 72 CSS pixels here
ROW = 0.42
LONGEST = 44

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedmap-sparse",  # the same records give the same bytes
    "text.parse_math": False,
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def bandwidth(name: str, records: Sequence[Record]) -> str:
    """GB/s of each record as a bar, and its floor's as a line across it."""
    rows = [(label(r, records), float(r["gbps"]), r["bytes"] / r["floor_s"] / 1e9) for r in records]

    def draw(axes: Axes) -> None:
        for at, (_, ours, floor) in enumerate(rows):
            axes.barh(at, ours, height=0.4, color=OURS)
            axes.plot([floor, floor], [at - 0.24, at + 0.24], color=MARK, linewidth=2.5)
        axes.set_xlim(0, 1.35 * max(max(row[1:]) for row in rows))
        for at, (_, ours, floor) in enumerate(rows):
            _beside(axes, at, max(ours, floor), f"{ours:.3g} of {floor:.3g}")
        axes.set_xlabel("GB/s")

    return _bars(name, [row[0] for row in rows], draw)


def speedups(name: str, rows: Sequence[tuple[str, float]]) -> str:
    """How many times faster than a peer, from a line at 1 on; a logarithmic axis."""

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        times = [value for _, value in rows]
        axes.set_xlim(min(1.0, 0.8 * min(times)), 3 * max(1.0, *times))
        for at, (_, value) in enumerate(rows):
            axes.barh(at, value - 1, left=1, height=0.4, color=OURS if value >= 1 else THEIRS)
            _beside(axes, at, max(value, 1), f"×{value:.3g}")
        axes.axvline(1, color=INK, linewidth=1)
        axes.xaxis.set_major_formatter(lambda x, _: f"×{x:g}")

    return _bars(name, [row[0] for row in rows], draw)


def rounds(name: str, records: Sequence[Record]) -> str:
    """Phases of each arm's round, stacked, as shares of the slowest arm's time."""
    labels, bars, totals = [], [], []
    for r in records:
        arms = {"ours": r, **r["peers"]}
        slowest = max(sum(arm["phases_s"].values()) for arm in arms.values())
        for kind, arm in arms.items():
            place = f"{r['op'].removeprefix('round_')} {r['density']:g}, " if arm is r else ""
            labels.append(place + kind)
            bars.append([arm["phases_s"][phase] / slowest for phase in PHASES])
            totals.append(seconds(sum(arm["phases_s"].values())))

    def draw(axes: Axes) -> None:
        for at, (shares, total) in enumerate(zip(bars, totals, strict=True)):
            left = 0.0
            for share, colour in zip(shares, LINES, strict=True):
                axes.barh(at, share, left=left, height=0.4, color=colour)
                left += share
            _beside(axes, at, left, total)
        axes.set_xlim(0, 1.22)
        axes.set_xticks([0, 0.5, 1], ["0", "half", "the slowest"])

    return _bars(name, labels, draw, legend=dict(zip(PHASES, LINES, strict=True)))


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
            axes.plot(x, ours, marker=marker, markersize=4.5, label=_short(one.name), **style)
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

    legend_rows = -(-len(curves) // 2)
    height = 3.1 + 0.24 * legend_rows
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((0.13, 0.55 / height, 0.84, 2.2 / height))
        draw(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.12, 1.12), ncols=2, borderaxespad=0)
        return _svg(figure, name)


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
    return _short(" ".join([record["op"], *(shown[k] for k in telling)]))


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _beside(axes: Axes, at: float, x: float, text: str) -> None:
    axes.annotate(
        text, (x, at), xytext=(5, 0), textcoords="offset points", va="center", bbox=GROUND
    )


def _bars(
    name: str,
    labels: Sequence[str],
    draw: Callable[[Axes], None],
    legend: dict[str, str] | None = None,
) -> str:
    """Horizontal bars, each below its label: on a phone there is no room beside them."""
    top = 0.62 if legend else 0.12
    height = ROW * len(labels) + 0.5 + top
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((0.02, 0.5 / height, 0.96, (height - 0.5 - top) / height))
        draw(axes)
        axes.set_ylim(len(labels) - 0.6, -0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        place = axes.get_yaxis_transform()
        for at, text in enumerate(labels):
            axes.text(0, at - 0.45, _short(text), transform=place, va="center", bbox=GROUND)
        for words, colour in (legend or {}).items():
            axes.barh(0, 0, color=colour, label=words)
        if legend:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, borderpad=0.2
            )
        return _svg(figure, name)


def _svg(figure: Figure, name: str) -> str:
    """The element alone: no declaration, no metadata, and no `id` but what it refers to."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    opening, _, body = text[text.index("<svg") :].partition(">")
    box = re.search(r'viewBox="[^"]*"', opening)
    used = set(re.findall(r'(?:"#|url\(#)([^")]+)', body))
    body = re.sub("<[^>]*>", lambda tag: _tag(tag.group(), name, used), body)
    body = re.sub(r"\s*\n\s*", " ", body)
    return f'<svg {box.group() if box else ""} aria-hidden="true">{body}'


def _tag(text: str, name: str, used: set[str]) -> str:
    """The page's font and colours, two decimals, and the picture's name before each `id`."""
    text = re.sub(r' id="([^"]*)"', lambda id_: id_.group() if id_[1] in used else "", text)
    text = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub("#0000[01][0-9a-f]", lambda c: COLOURS.get(c.group(), c.group()), text)
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", text)
