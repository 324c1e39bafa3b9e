"""Runs of a folder as one page: `fedmap-sparse report FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmap_sparse import page
from fedmap_sparse._files import write_atomically
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import compare, results
from fedmap_sparse.experiments.report import human_bytes
from fedmap_sparse.experiments.results import Method
from fedmap_sparse.page import Cell, Picture, Section, Table, clean, text

#: Methods that a picture has at most; the tables have all.
MOST = 9


def write(folder: Path, out: Path) -> list[str]:
    """Draw the page of the runs below `folder` into a file; lines on what was left out.

    Raises:
        RuntimeError: matplotlib or jinja2 is not installed.
        ConfigError: no finished run in it.
        OSError: the file cannot be written.
    """
    page.require("report")
    runs, notes = results.find([folder])
    if not runs:
        raise ConfigError("; ".join([f"no finished run in {folder}", *notes]))
    tables = compare.compared(results.together(runs))
    write_atomically(out, render(tables, notes, folder.resolve().name).encode())
    return notes


def render(tables: Sequence[compare.Table], notes: Sequence[str], title: str) -> str:
    """The page of compared settings, as HTML of UTF-8; `notes` say what was left out.

    Raises:
        ConfigError: a run's metrics.jsonl is missing or damaged.
    """
    page.load()
    sections = [_section(f"setting{k}", one) for k, one in enumerate(tables)]
    sections[0].notes += [clean(note) for note in notes]
    return page.render(f"fedmap_sparse: {clean(title)}", sections)


def _section(name: str, one: compare.Table) -> Section:
    methods = [row.method for row in one.rows]
    seeds = sorted({seed for method in methods for seed in method.runs})
    facts = {**one.setting.options, "seeds": ", ".join(map(str, seeds))}
    made = Section(name, clean(one.setting.label), [(k, clean(v)) for k, v in facts.items()])
    _draw(made, methods)
    made.tables = [_methods(one.rows), _layers(methods), _runs(methods)]
    made.notes = [
        f"{method.label}, seed {seed}: {line}"
        for method in methods
        for seed in method.seeds
        for line in method.runs[seed].summary[method.arm].get("starving", [])
    ]
    made.notes += [f"not paired: {line}" for row in one.rows for line in row.unpaired]
    made.notes = list(dict.fromkeys(map(clean, made.notes)))
    return made


def _draw(made: Section, methods: Sequence[Method]) -> None:
    from fedmap_sparse.experiments import pictures

    shown = methods[:MOST]
    fewer = "" if len(methods) <= MOST else f" The first {MOST} of {len(methods)} methods."

    def add(title: str, words: str, svg: str) -> None:
        made.pictures.append(Picture(title, words + fewer, svg))

    def name(what: str) -> str:
        return f"{made.name}-{what}"

    add(
        "Accuracy over rounds",
        "Means over seeds; the bands reach from the lowest seed to the highest.",
        pictures.accuracy(name("rounds"), shown),
    )
    add(
        "Accuracy against bytes",
        "Every message, both ways, by its length.",
        pictures.against_bytes(name("sent"), shown),
    )
    add(
        "Accuracy against density",
        "Strokes: seeds. Marks: means, with 95% intervals by Student's t where there are two "
        "seeds or more.",
        pictures.against_density(name("density"), shown),
    )
    pruned = [m for m in shown if _is_pruned(m)]
    if pruned:
        layers = len(pictures.layer_density(pruned[0]))
        most = pictures.MOST_LAYERS
        add(
            "Density of each layer",
            "At the end, means over seeds."
            + (f" The {most} sparsest of {layers}." if layers > most else ""),
            pictures.layers(name("layers"), pruned),
        )
    known = [m for m in shown if all(m.has(f"clients.{k}") for k in ("q25", "q75", "best"))]
    if known:
        add(
            "Clients",
            "Line: from the worst client (dot) to the best. Bar: the middle half, with the median. "
            "Means over seeds, on "
            + clean(known[0].runs[known[0].seeds[0]].summary[known[0].arm]["clients"]["on"])
            + ".",
            pictures.clients(name("clients"), known),
        )
    for key, title, words, parts in (
        ("bytes", "Bytes by kind", "Of one run, both ways.", pictures.BYTES),
        ("phases", "Time by phase", "Of one run, on its machine at its load.", pictures.PHASES),
    ):
        with_key = [m for m in shown if m.has(key)]
        if with_key:
            add(title, words, pictures.stacked(name(key), with_key, key, parts))


def _methods(rows: Sequence[compare.Comparison]) -> Table:
    head = ["method", "seeds", "accuracy", "worst client", "density", "uplink", "downlink", "time"]
    head += ["against", "points", "from", "to", "n", "worst client, points", "from", "to"]
    return Table("Methods", head, [_row(row) for row in rows])


def _row(row: compare.Comparison) -> list[Cell]:
    method = row.method
    cells = [
        text(method.label),
        _count(len(method.runs)),
        *(_share(method, key) for key in ("accuracy", "clients.worst", "density")),
        *(_bytes(compare.mean(method.of(key))) for key in ("uplink_bytes", "downlink_bytes")),
        _seconds(method),
        text("" if row.reference is None else row.reference.label),
    ]
    for key in compare.ACCURACIES:
        found = row.differences.get(key)
        half = None if found is None else found.half
        cells.append(_points(None if found is None else found.mean))
        for sign in (-1, 1):
            end = None if found is None or half is None else found.mean + sign * half
            cells.append(_points(end))
        if key == "accuracy":
            cells.append(Cell("", 0.0) if found is None else _count(len(row.seeds)))
    return cells


def _layers(methods: Sequence[Method]) -> Table:
    from fedmap_sparse.experiments.pictures import layer_density

    rows = [
        [text(method.label), text(layer), Cell(f"{density:.3%}", density)]
        for method in methods
        if _is_pruned(method)
        for layer, density in layer_density(method).items()
    ]
    return Table("Layers", ["method", "layer", "density"], rows)


def _is_pruned(method: Method) -> bool:
    """Whether it has layers that are not whole."""
    return method.has("layers") and min(method.of("density")) < 1


def _runs(methods: Sequence[Method]) -> Table:
    head = ["folder", "method", "seed", "accuracy", "best validation", "worst client", "starving"]
    rows = []
    for method in methods:
        for seed in method.seeds:
            run = method.runs[seed]
            arm = run.summary[method.arm]
            clients = arm.get("clients", {})
            rows.append(
                [
                    text(run.path.name),
                    text(method.label),
                    _count(seed),
                    _percent(arm["accuracy"]),
                    _percent(arm.get("validation_best")),
                    _percent(clients.get("worst")),
                    _count(len(arm.get("starving", []))),
                ]
            )
    return Table("Runs", head, rows)


def _percent(value: float | None) -> Cell:
    return Cell("", -1.0) if value is None else Cell(f"{value:.2%}", value)


def _share(method: Method, key: str) -> Cell:
    return _percent(compare.mean(method.of(key)) if method.has(key) else None)


def _bytes(value: float) -> Cell:
    return Cell(human_bytes(round(value)), value)


def _seconds(method: Method) -> Cell:
    if not method.has("seconds"):
        return Cell("", -1.0)
    value = compare.mean(method.of("seconds"))
    return Cell(f"{value:.1f} s", value)


def _points(value: float | None) -> Cell:
    # Nothing to show comes first, whatever the sign of the others.
    return Cell("", -1000.0) if value is None else Cell(f"{value:+.2f}", value)


def _count(value: int) -> Cell:
    return Cell(f"{value}", float(value))
