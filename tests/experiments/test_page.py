"""The page of runs: whole, alone, escaped, and alive in a browser."""

import json
from pathlib import Path
from typing import Any

import pytest
from pages import Reader, in_chromium, needs_chromium, references

pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")

from fedmap_sparse import cli
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import page
from fedmap_sparse.experiments.config import build

PICTURES = (
    "Accuracy over rounds", "Accuracy against bytes", "Accuracy against density",
    "Density of each layer", "Clients", "Bytes by kind", "Time by phase",
)  # fmt: skip
BYTES = {"downlink mask": 10, "downlink values": 300, "uplink values": 600, "uplink rest": 90}
PHASES = {"train": 3.0, "step": 1.0, "evaluate": 0.5, "encode": 0.2, "total": 5.0}


def an_arm(name: str, accuracy: float, density: float, layers: int) -> tuple[Any, Any]:
    """A summary and its records, by hand."""
    spread = {"mean": accuracy, "std": 0.1, "worst": accuracy - 0.2, "q25": accuracy - 0.05}
    spread |= {"median": accuracy, "q75": accuracy + 0.02, "best": accuracy + 0.05}
    densities = {f"layer{k}.weight": density / (k + 1) for k in range(layers)}
    summary = {
        "accuracy": accuracy, "density": density, "uplink_bytes": 690, "downlink_bytes": 310,
        "clients": {**spread, "on": "validation"}, "layers": densities, "seconds": 5.0,
        "starving": ["layer1.weight is starving"] if density < 1 else [], "bytes": BYTES,
        "phases": PHASES, "validation_best": accuracy,
    }  # fmt: skip
    records = [
        {"arm": name, "round": r, "accuracy": accuracy * (r + 1) / 4, "uplink_bytes": 172,
         "downlink_bytes": 78}
        for r in range(4)
    ]  # fmt: skip
    return summary, records


def runs(folder: Path, layers: int = 3, **options: Any) -> Path:
    """Two targets with three seeds each, beside the dense arm."""
    for target in (0.5, 0.9):
        for seed in range(3):
            where = folder / f"target={target},seed={seed}"
            where.mkdir(parents=True)
            config = build({"dataset": "digits", "target": target, "seed": seed, **options})
            (where / "config.toml").write_text(config.to_toml())
            own, first = an_arm("fedmap", 0.7 + seed / 100 - target / 50, 1 - target, layers)
            dense, second = an_arm("dense", 0.7 + seed / 90, 1.0, layers)
            (where / "summary.json").write_text(json.dumps({"fedmap": own, "dense": dense}))
            text = "".join(json.dumps(r) + "\n" for r in first + second)
            (where / "metrics.jsonl").write_text(text)
    return folder


def drawn(folder: Path) -> str:
    assert page.write(folder, folder / "p.html") == []
    return (folder / "p.html").read_text()


def test_all_parts(tmp_path: Path) -> None:
    found = Reader(drawn(runs(tmp_path)))
    for words in (
        *PICTURES, "fedmap target=0.5", "fedmap target=0.9", "Methods", "Layers", "Runs",
        "digits", "0, 1, 2", "downlink mask", "step, batch",
        "layer2.weight", "fedmap target=0.9, seed 2: layer1.weight is starving",
    ):  # fmt: skip
        assert words in found.text, words
    assert found.elements.count("svg") == len(PICTURES)
    assert found.elements.count("table") == 3
    assert found.elements.count("tr") == 3 + 3 + 2 * 3 + 3 * 3


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    assert references(drawn(runs(tmp_path))) == []


def test_settings_are_sections(tmp_path: Path) -> None:
    runs(tmp_path / "a")
    runs(tmp_path / "b", partition="dirichlet")
    found = Reader(drawn(tmp_path))
    assert found.elements.count("section") == 2
    assert "cnn on digits, 10 clients, dirichlet" in found.text
    assert found.elements.count("svg") == 2 * len(PICTURES)


def test_many_layers_are_the_sparsest_and_said(tmp_path: Path) -> None:
    assert "The 30 sparsest of 60." in Reader(drawn(runs(tmp_path, layers=60))).text


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    runs(tmp_path)
    path = tmp_path / "target=0.9,seed=1" / "summary.json"
    path.write_text(path.read_text().replace("layer1.weight is", evil.replace('"', '\\"')))
    found = Reader(drawn(tmp_path))
    assert found.elements.count("script") == 1
    assert evil in found.text


def test_what_runs_lack_is_left_out(tmp_path: Path) -> None:
    """Runs of an earlier version have no layers, no bytes by kind and no quartiles."""
    for path in runs(tmp_path).rglob("summary.json"):
        summary = json.loads(path.read_text())
        for arm in summary.values():
            del arm["bytes"], arm["layers"], arm["clients"]["q25"]
        path.write_text(json.dumps(summary))
    found = Reader(drawn(tmp_path))
    assert found.elements.count("svg") == len(PICTURES) - 3


def test_nothing_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no finished run in"):
        page.write(tmp_path, tmp_path / "p.html")
    runs(tmp_path)
    (tmp_path / "target=0.5,seed=0" / "metrics.jsonl").write_text("{")
    with pytest.raises(ConfigError, match=r"metrics.jsonl: not the rounds of a run"):
        page.write(tmp_path, tmp_path / "p.html")
    monkeypatch.setattr("fedmap_sparse.page.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="report: matplotlib and jinja2 not installed"):
        page.write(tmp_path, tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(runs(tmp_path))]) == 0
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert "report.html is the page" in capsys.readouterr().out
    out = tmp_path / "none" / "p.html"
    assert cli.main(["report", str(tmp_path), "--out", str(out)]) == 3
    assert str(out) in capsys.readouterr().err


@needs_chromium
def test_in_chromium(tmp_path: Path) -> None:
    text = drawn(runs(tmp_path / "runs"))
    backs = []
    for width, options in ((390, ()), (1400, ("--blink-settings=preferredColorScheme=0",))):
        found = in_chromium(text, width, tmp_path, "Methods", (0, 2), *options)
        assert found["errors"] == []
        assert found["needs"] <= found["width"], "the page scrolls sideways"
        assert len(found["pictures"]) == len(PICTURES)
        assert min(found["pictures"]) > 50
        backs.append(found["back"])
        names, accuracies = (found["columns"][at] for at in "02")
        assert names[0] == ["dense", "fedmap target=0.5", "fedmap target=0.9"] == names[1][::-1]
        shares = [float(text.rstrip("%")) for text in accuracies[0]]
        assert shares == sorted(shares) != shares[::-1]
        assert accuracies[1] == accuracies[0][::-1]
        assert accuracies[2:] == ["ascending", "descending"]
    assert backs[0] != backs[1], "light and dark look the same"
