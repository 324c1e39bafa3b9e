"""A run's results as text and as a picture."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from fedmap_sparse import _command
from fedmap_sparse.experiments import hardening
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.data import Dataset
from fedmap_sparse.experiments.folder import Record

Summary = dict[str, dict[str, Any]]

ARM_NAMES = {
    "fedmap": "FedMap",
    "dense": "dense FedAvg",
    "fedsparsify": "FedSparsify",
    "oneshot": "one-shot",
    "random": "random",
    "snip": "SNIP at start",
    "feddst": "FedDST-like",
    "stc": "STC-like",
}
_DENSE, _OTHER = "#d1701a", "#0b6e99"


def human_bytes(count: int) -> str:
    """Decimal units, three or four figures: "412 B", "3.30 MB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.{2 if value < 99.5 else 0}f} {unit}"


def opening(config: Config, dataset: Dataset, model: nn.Module, name: str) -> list[str]:
    """What will be run, before the first round; `name` is the model's."""
    train, validation, test = (
        f"{len(split):,}" for split in (dataset.train, dataset.validation, dataset.test)
    )
    parameters = sum(p.numel() for p in model.parameters())
    cohort = "" if config.cohort == config.clients else f", {config.cohort} a round"
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    rows = {
        "data": f"{dataset.provenance}",
        "split": f"{train} training, {validation} validation, {test} test images",
        "model": f"{name}, {parameters:,} parameters, {threads} on {config.device}",
        "clients": f"{config.clients}, {config.partition}{cohort}",
        "schedule": f"{config.make_schedule()}",
        **hardening.opening(config),
    }
    notes = [*cautions(config), *hardening.cautions(config, model)]
    return [*(f"{key:<9} {text}" for key, text in rows.items()), *notes]


def cautions(config: Config) -> list[str]:
    """Notes on a schedule that may surprise."""
    if config.prune_start is None or not config.target:
        return []
    lines = []
    if config.prune_start == 0 and config.method not in ("snip", "feddst"):
        lines.append("note: pruning starts before any training, so it ranks random initial weights")
    if config.prune_end is not None and config.prune_end == config.prune_start:
        lines.append(
            f"note: all {config.target:.0%} go in round {config.prune_start}, at once: more "
            "rounds, or prune_start and prune_end, make it gradual"
        )
    return lines


def totals(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums by name, over all rounds: seconds by phase, say."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def closing(summary: Summary) -> list[str]:
    """The arms side by side: accuracy, survivors, bytes, time and where it went."""
    rows = [
        ["", *(ARM_NAMES[name] for name in summary)],
        ["test accuracy", *(f"{arm['accuracy']:.2%}" for arm in summary.values())],
        [
            "validation accuracy",
            *(f"{arm['validation_accuracy']:.2%}" for arm in summary.values()),
        ],
        [
            "its mean over the last 3 rounds",
            *(f"{arm['validation_last_mean']:.2%}" for arm in summary.values()),
        ],
        [
            "its best, in round",
            *(
                f"{arm['validation_best']:.2%}, {arm['validation_best_round']}"
                for arm in summary.values()
            ),
        ],
        ["clients' mean accuracy", *(_client(arm, "mean") for arm in summary.values())],
        ["worst client's", *(_client(arm, "worst") for arm in summary.values())],
        ["pruned", *(f"{1 - arm['density']:.3%}" for arm in summary.values())],
        [
            "weights left",
            *(f"{arm['survivors']:,} of {arm['prunable']:,}" for arm in summary.values()),
        ],
        *hardening.rows(summary),
        ["uplink", *(human_bytes(arm["uplink_bytes"]) for arm in summary.values())],
        ["downlink", *(human_bytes(arm["downlink_bytes"]) for arm in summary.values())],
        ["time", *(f"{arm['seconds']:.1f} s" for arm in summary.values())],
        [
            "not forward, backward, evaluation",
            *(f"{arm['overhead']:.1%}" for arm in summary.values()),
        ],
    ]
    return ["", *table(rows), *_comparison(summary), *_warnings(summary), *_where(summary), ""]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of as many cells each as lines; the first column flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def _client(arm: dict[str, Any], key: str) -> str:
    value = arm["clients"][key]
    return "unknown" if value is None else f"{value:.2%}"


def _warnings(summary: Summary) -> list[str]:
    lines = [
        f"warning: {ARM_NAMES[name]}: {line}"
        for name, arm in summary.items()
        for line in [*arm["starving"], *([arm["short"]] if arm["short"] else [])]
    ]
    return ["", *lines] if lines else []


def _comparison(summary: Summary) -> list[str]:
    if len(summary) < 2:
        return []
    (name, sparse), (_, dense) = summary.items()
    points = 100 * (sparse["accuracy"] - dense["accuracy"])
    up, down = (f"{sparse[k] / dense[k]:.1%}" for k in ("uplink_bytes", "downlink_bytes"))
    line = (
        f"{points:+.2f} points of test accuracy with {up} of the uplink and {down} of the downlink"
    )
    return ["", f"{ARM_NAMES[name]} against dense FedAvg: {line}"]


def _where(summary: Summary) -> list[str]:
    lines = [""]
    for name, arm in summary.items():
        total = arm["phases"]["total"]
        parts = [
            f"{phase} {seconds / total:.1%}"
            for phase, seconds in arm["phases"].items()
            if phase != "total"
        ]
        lines.append(f"{ARM_NAMES[name]}'s time: {', '.join(parts)}")
    return lines


def curves(records: list[Record]) -> bytes:
    """Accuracy, bytes so far, and density of the model and of each layer over rounds, as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # matplotlib says on stderr that it builds its cache of fonts, or has no folder for it.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with _command.held():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), dpi=120)  # a layout engine would draw all of it twice
    FigureCanvasAgg(figure)
    (accuracy, sent), (density, layers) = figure.subplots(2, 2)
    figure.subplots_adjust(left=0.05, right=0.985, bottom=0.07, top=0.955, hspace=0.28, wspace=0.1)
    for name in dict.fromkeys(r["arm"] for r in records):
        own = [r for r in records if r["arm"] == name]
        rounds = [r["round"] + 1 for r in own]
        style: dict[str, Any] = {
            "color": _DENSE if name == "dense" else _OTHER,
            "label": ARM_NAMES[name],
            "linewidth": 2,
        }
        marker = "o" if len(own) == 1 else None
        accuracy.plot(rounds, [100 * r["accuracy"] for r in own], marker=marker, **style)
        worst = [100 * r["clients"]["worst"] for r in own if r["clients"]["worst"] is not None]
        if len(worst) == len(own):
            worst_style = {**style, "linewidth": 1, "label": f"{ARM_NAMES[name]}, worst client"}
            accuracy.plot(rounds, worst, linestyle="--", marker=marker, **worst_style)
        density.step(rounds, [100 * r["density"] for r in own], where="mid", marker=marker, **style)
        total = accumulate(r["uplink_bytes"] + r["downlink_bytes"] for r in own)
        sent.plot(rounds, [b / 1e6 for b in total], marker=marker, **style)
    first = [r for r in records if r["arm"] == records[0]["arm"]]
    for layer in first[0]["layers"]:
        shares = [100 * r["layers"][layer] for r in first]
        layers.step([r["round"] + 1 for r in first], shares, where="mid", label=layer)
    layers.set_title(f"density of each layer, {ARM_NAMES[first[0]['arm']]}, %")
    # Logarithmic from a thousandth on, so that a layer with nothing left is in the picture too.
    layers.set_yscale("symlog", linthresh=0.1)
    layers.set_ylim(0, 120)
    accuracy.set_title("validation accuracy, %")
    density.set_title("density: weights left, %")
    density.set_ylim(0, 105)
    sent.set_title("bytes sent so far, both ways, MB")
    sent.set_ylim(bottom=0)
    for axes in (accuracy, density, sent, layers):
        axes.set_xlabel("rounds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if len(first[0]["layers"]) <= 12 or axes is not layers:
            axes.legend(frameon=False, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
