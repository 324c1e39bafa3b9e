"""What the tables of this folder share: one arm of a run, and a CSV file that goes on."""

from __future__ import annotations

import csv
import functools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedmap_sparse.errors import RoundFailed
from fedmap_sparse.experiments import data, models
from fedmap_sparse.experiments.arm import Arm
from fedmap_sparse.experiments.config import build
from fedmap_sparse.experiments.runner import partition
from fedmap_sparse.experiments.setting import prepared
from fedmap_sparse.schedule import Dense

RESULTS = Path(__file__).parent / "results"


_load = functools.cache(data.load)


def play(options: Mapping[str, Any]) -> dict[str, Any]:
    """One arm without a folder; its summary, as in summary.json.

    A run whose model diverged, so that no client's update is finite any more, ends there: it counts
    as it stands then.
    """
    config = build({"threads": 1, "processes": 1, **options})
    torch.set_num_threads(1)
    dataset = _load(config.dataset or "")
    torch.manual_seed(config.seed)
    template = models.build(config.model, dataset.shape, dataset.classes)
    name = "dense" if config.schedule == Dense.kind else "fedmap"
    with prepared(
        config,
        template,
        dataset,
        partition(config, dataset, None),
        torch.device("cpu"),
        own_model=False,
        rounds=config.rounds,
        budget=1,
    ) as setting:
        arm = Arm(name, config, config.make_schedule(), setting)
        records = []
        while arm.round < config.rounds:
            try:
                records.append(arm.play(0.0))
            except RoundFailed:
                if not records:
                    raise
                break
        summary = arm.summary(records)
    return {**summary, "refused": sum(len(r["refused"]) for r in records)}


def fill(
    path: Path, cells: Iterable[dict[str, Any]], options: Any, columns: tuple[str, ...]
) -> list[dict[str, str]]:
    """Play each cell that the file lacks, and add its row at once; every row that is there.

    Args:
        cells: what tells a row from the others.
        options: a function of a cell that gives the run's options.
        columns: of the summary, beside the cell's own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    for cell in cells:
        key = {k: str(v) for k, v in cell.items()}
        if any(key.items() <= row.items() for row in rows):
            continue
        start = time.perf_counter()
        summary = play(options(cell))
        summary["aggregate_ms"] = 1000 * summary["phases"]["aggregate"] / summary["rounds"]
        found = {c: _text(summary[c]) for c in columns}
        rows.append({**key, **found})
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[-1].keys(), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(rows[-1])
        seconds = time.perf_counter() - start
        print(*key.values(), *found.values(), f"{seconds:.1f} s", flush=True)
    return rows


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def mean(rows: list[dict[str, str]], column: str, **where: object) -> float | None:
    """Over the rows of a cell; None where there are none."""
    key = {k: str(v) for k, v in where.items()}
    found = [float(r[column]) for r in rows if key.items() <= r.items()]
    return sum(found) / len(found) if found else None
