"""Runs over seeds as pictures of a page. The `name` of a picture is its own within the page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedmap_sparse.experiments.compare import mean
from fedmap_sparse.experiments.intervals import Interval
from fedmap_sparse.experiments.report import human_bytes
from fedmap_sparse.experiments.results import Method
from fedmap_sparse.page.drawing import INK, LINES, MARK, MARKERS, bars, beside, plot, short

#: Rows of the picture of layers, at most.
MOST_LAYERS = 30
#: What a bar of bytes or seconds is made of: as many as there are colours.
BYTES = {
    "downlink mask": ("downlink mask",),
    "downlink values": ("downlink values",),
    "uplink mask": ("uplink mask",),
    "uplink values": ("uplink values",),
    "tails, buffers": ("downlink tail", "uplink tail", "downlink buffers", "uplink buffers"),
    "headers": ("downlink rest", "uplink rest"),
}
PHASES = {
    "train": ("train",),
    "step, batch": ("step", "batch"),
    "select": ("select",),
    "encode, decode": ("encode", "decode"),
    "aggregate": ("aggregate",),
    "evaluate, save, wait": ("evaluate", "save", "wait"),
}


def accuracy(name: str, methods: Sequence[Method]) -> str:
    """Validation accuracy over rounds: means over seeds, and the lowest and highest as a band."""

    def draw(axes: Axes) -> None:
        for method in methods:
            rounds, lows, means, highs = _over_rounds(method)
            _curve(axes, method, rounds, means, lows, highs)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("rounds")
        axes.set_title("validation accuracy, %", fontsize=11, loc="left")

    return plot(name, draw, entries=len(methods), legend_columns=1)


def against_bytes(name: str, methods: Sequence[Method]) -> str:
    """The same over the bytes sent so far, both ways, averaged over seeds."""

    def draw(axes: Axes) -> None:
        for method in methods:
            rounds, lows, means, highs = _over_rounds(method)
            sent = [
                list(accumulate(r["uplink_bytes"] + r["downlink_bytes"] for r in method.records(s)))
                for s in method.seeds
            ]
            x = [mean(values) / 1e6 for values in zip(*sent, strict=False)][: len(rounds)]
            _curve(axes, method, x, means, lows, highs)
        _logarithmic(axes)
        axes.set_xlabel("MB sent so far, both ways")
        axes.set_title("validation accuracy, %", fontsize=11, loc="left")

    return plot(name, draw, entries=len(methods), legend_columns=1)


def against_density(name: str, methods: Sequence[Method]) -> str:
    """Test accuracy of each seed, the mean and its interval, over the final density."""

    def draw(axes: Axes) -> None:
        for method in methods:
            x = 100 * mean(method.of("density"))
            values = [100 * a for a in method.of("accuracy")]
            found = Interval.of(values)
            colour, marker = _style(method)
            axes.plot([x] * len(values), values, "_", color=colour, markersize=11)
            axes.plot(
                [x], [found.mean], marker=marker, color=colour, markersize=7, linestyle="none",
                label=short(method.label),
            )  # fmt: skip
            if found.half is not None:
                ends = [found.mean - found.half, found.mean + found.half]
                axes.plot([x, x], ends, color=colour, linewidth=1.2)
        _logarithmic(axes)
        axes.set_xlabel("weights left at the end, %")
        axes.set_title("test accuracy, %", fontsize=11, loc="left")

    return plot(name, draw, entries=len(methods), legend_columns=1)


def layers(name: str, methods: Sequence[Method]) -> str:
    """Final density of each layer, a mark for each method, on an axis that has 0 too."""
    shares = [layer_density(method) for method in methods]
    names = list(dict.fromkeys(layer for one in shares for layer in one))
    if len(names) > MOST_LAYERS:
        sparsest = sorted(names, key=lambda n: min(one.get(n, 1.0) for one in shares))
        names = [n for n in names if n in set(sparsest[:MOST_LAYERS])]

    def draw(axes: Axes) -> None:
        for method, one in zip(methods, shares, strict=True):
            colour, marker = _style(method)
            points = [(100 * one[n], at) for at, n in enumerate(names) if n in one]
            axes.plot(
                [x for x, _ in points], [at for _, at in points], marker, color=colour,
                markersize=7, clip_on=False,
            )  # fmt: skip
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(0, 110)
        axes.set_xticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
        axes.set_xlabel("weights left, %")

    legend = {short(m.label): _style(m)[0] for m in methods}
    return bars(name, names, draw, legend=legend, legend_columns=1)


def layer_density(method: Method) -> dict[str, float]:
    """Density of each layer at the end, the mean over seeds."""
    found = [method.runs[seed].summary[method.arm]["layers"] for seed in method.seeds]
    return {layer: mean([one[layer] for one in found]) for layer in found[0]}


def clients(name: str, methods: Sequence[Method]) -> str:
    """Accuracy over clients: worst to best, the middle half, the median; means over seeds."""

    def at(method: Method, key: str) -> float:
        return 100 * mean(method.of(f"clients.{key}"))

    def draw(axes: Axes) -> None:
        for row, method in enumerate(methods):
            colour, _ = _style(method)
            axes.plot([at(method, "worst"), at(method, "best")], [row, row], color=colour)
            middle = [at(method, "q25"), at(method, "q75")]
            axes.plot(middle, [row, row], color=colour, linewidth=9, solid_capstyle="butt")
            axes.plot([at(method, "median")] * 2, [row - 0.22, row + 0.22], color=INK)
            axes.plot([at(method, "worst")], [row], "o", color=MARK, markersize=6)
        axes.set_xlim(0, 104)
        axes.set_xlabel("accuracy of a client, %")

    return bars(name, [method.label for method in methods], draw)


def stacked(
    name: str, methods: Sequence[Method], key: str, parts: dict[str, tuple[str, ...]]
) -> str:
    """Bytes by kind or seconds by phase of a run, means over seeds, and how much they are."""
    rows = []
    for method in methods:
        summaries = [method.runs[seed].summary[method.arm][key] for seed in method.seeds]
        rows.append(
            [mean([sum(s.get(k, 0) for k in keys) for s in summaries]) for keys in parts.values()]
        )
    longest = max(map(sum, rows))

    def draw(axes: Axes) -> None:
        for at, values in enumerate(rows):
            left = 0.0
            for value, colour in zip(values, LINES, strict=True):
                axes.barh(at, value, left=left, height=0.4, color=colour)
                left += value
            beside(axes, at, left, human_bytes(round(left)) if key == "bytes" else f"{left:.1f} s")
        axes.set_xlim(0, 1.25 * longest)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: human_bytes(round(x)) if key == "bytes" else f"{x:g} s")
        )
        axes.xaxis.set_major_locator(MaxNLocator(4))

    legend = dict(zip(parts, LINES, strict=True))
    return bars(name, [method.label for method in methods], draw, legend=legend, legend_columns=2)


def _over_rounds(method: Method) -> tuple[list[int], list[float], list[float], list[float]]:
    """Rounds that every seed has, with the lowest, mean and highest accuracy in percent."""
    found = [[100 * r["accuracy"] for r in method.records(seed)] for seed in method.seeds]
    columns = list(zip(*found, strict=False))
    rounds = list(range(1, len(columns) + 1))
    return rounds, *([f(c) for c in columns] for f in (min, mean, max))  # type: ignore[return-value]  # three lists


def _curve(
    axes: Axes,
    method: Method,
    x: Sequence[float],
    means: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
) -> None:
    colour, marker = _style(method)
    style: dict[str, Any] = {"color": colour, "linewidth": 1.8, "label": short(method.label)}
    if method.place >= len(LINES):
        style["linestyle"] = "--"
    every = max(1, len(x) // 8)
    axes.plot(x, means, marker=marker, markersize=4.5, markevery=every, **style)
    if len(method.runs) > 1:
        axes.fill_between(x, lows, highs, color=colour, alpha=0.2, linewidth=0)


def _style(method: Method) -> tuple[str, str]:
    """Colour and mark; beyond as many methods as there are colours the marks are others."""
    again, place = divmod(method.place, len(LINES))
    return LINES[place], MARKERS[(place + again) % len(MARKERS)]


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
