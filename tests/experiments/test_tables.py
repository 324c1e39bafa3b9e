"""The scripts that make the guide's tables: a file that goes on, and what is printed of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedmap_sparse.experiments.config import build

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        for known in ("cells", "attacks", "privacy"):
            sys.modules.pop(known, None)
        return importlib.import_module(name)

    return load


def test_a_table_goes_on_where_it_was_stopped(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = script("cells")
    played: list[int] = []

    def play(options: dict[str, Any]) -> dict[str, Any]:
        played.append(options["a"])
        if len(played) == 2:
            raise KeyboardInterrupt
        return {"accuracy": 0.5, "phases": {"aggregate": 1.0}, "rounds": 2}

    monkeypatch.setattr(cells, "play", play)
    path, wanted = tmp_path / "t.csv", [{"a": 1}, {"a": 2}]
    columns = ("accuracy", "aggregate_ms")
    with pytest.raises(KeyboardInterrupt):
        cells.fill(path, wanted, dict, columns)
    rows = cells.fill(path, wanted, dict, columns)
    assert played == [1, 2, 2]
    assert path.read_text() == "a,accuracy,aggregate_ms\n1,0.5,500\n2,0.5,500\n"
    assert rows == cells.fill(path, wanted, dict, columns)
    assert cells.mean(rows, "accuracy", a=1) == 0.5
    assert cells.mean(rows, "accuracy", a=3) is None


def test_one_arm_is_played(script: Any) -> None:
    small = {"dataset": "digits", "model": "mlp", "rounds": 2, "clients": 3, "threads": 1}
    found = script("cells").play({**small, "attack": "noise", "attackers": 1})
    assert found["rounds"] == 2
    assert 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize("name", ["attacks", "privacy"])
def test_every_cell_is_a_run(script: Any, name: str) -> None:
    module = script(name)
    cells = module.cells((0, 1))
    assert len({tuple(c.values()) for c in cells}) == len(cells)
    for cell in cells:
        build(module.options(cell))
