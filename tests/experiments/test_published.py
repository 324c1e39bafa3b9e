"""experiments/publish.py: what is committed, tables and picture, is that of the results."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish", FOLDER / "publish.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(name: str) -> Any:
    return json.loads((FOLDER / "results" / f"{name}.json").read_text())


def test_the_readme_has_the_tables_of_the_results(publish: ModuleType) -> None:
    text = (FOLDER / "README.md").read_text()
    for name, table in publish.TABLES.items():
        assert publish.put(text, name, table(results(name))) == text, name


def test_a_difference_beyond_the_aim_is_missed(publish: ModuleType) -> None:
    def method(accuracy: float, worst: float) -> Any:
        return {"points": {"accuracy": {"mean": accuracy}, "clients_worst": {"mean": worst}}}

    assert publish.reaches(method(-0.5, -2.0))
    assert not publish.reaches(method(-0.51, 1.0))
    assert not publish.reaches(method(1.0, -2.01))


def test_a_page_without_a_place_is_refused(publish: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"expected <!-- claim: .* found neither or one"):
        publish.put("no table", "claim", [])


def test_the_picture_draws_every_combination(publish: ModuleType) -> None:
    found = results("claim")
    drawn = publish.picture(found)
    assert "95% intervals" in drawn
    for setting, _ in publish.pruned(found):
        assert ", ".join(publish.names(setting)) in drawn
