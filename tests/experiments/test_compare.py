"""Comparisons of runs: what is paired with what, over which seeds, and what is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedmap_sparse import cli
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import compare, results
from fedmap_sparse.experiments.config import build


def arm(accuracy: float, density: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "accuracy": accuracy, "density": density, "uplink_bytes": 1000, "downlink_bytes": 2000,
        "clients": {"worst": accuracy - 0.1}, "starving": [], **more,
    }  # fmt: skip


def run(folder: Path, summary: dict[str, Any], **options: Any) -> None:
    """A finished run's folder, by hand."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(build({"dataset": "digits", **options}).to_toml())
    (folder / "summary.json").write_text(json.dumps(summary))


def compared(*paths: Path) -> tuple[str, dict[str, Any]]:
    lines, found = compare.compare(paths)
    return "\n".join(lines), found


def test_arms_of_a_run_are_paired_over_seeds(tmp_path: Path) -> None:
    for seed, (own, dense) in enumerate([(0.80, 0.81), (0.90, 0.93), (0.70, 0.70)]):
        run(tmp_path / str(seed), {"fedmap": arm(own, 0.1), "dense": arm(dense)}, seed=seed)
    text, found = compared(tmp_path)
    dense, fedmap = found["settings"][0]["methods"]
    assert (dense["label"], dense["reference"]) == ("dense", None)
    assert fedmap["accuracy"] == [0.80, 0.90, 0.70]
    assert fedmap["paired_seeds"] == [0, 1, 2]
    points = fedmap["points"]["accuracy"]
    # Differences of -1, -3 and 0 points: standard deviation 1.5275, t of 2 degrees 4.3027.
    assert points["mean"] == pytest.approx(-4 / 3)
    assert points["high"] == pytest.approx(-4 / 3 + 4.3027 * 1.5275 / 3**0.5, rel=1e-4)
    assert "accuracy: -1.33 points [-5.13, +2.46], n=3" in text
    assert "not paired" not in text


def test_what_settings_are_chosen_by_is_in_json_alone(tmp_path: Path) -> None:
    for seed, (own, dense) in enumerate([(0.70, 0.71), (0.60, 0.63)]):
        arms = {
            "fedmap": arm(0.9, 0.1, validation_last_mean=own),
            "dense": arm(0.9, validation_last_mean=dense),
        }
        run(tmp_path / str(seed), arms, seed=seed)
    text, found = compared(tmp_path)
    fedmap = found["settings"][0]["methods"][1]
    assert fedmap["validation_last_mean"] == [0.70, 0.60]
    assert fedmap["points"]["validation_last_mean"]["mean"] == pytest.approx(-2)
    assert "-2.00" not in text


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    run(tmp_path / "a", {"fedmap": arm(0.8, 0.1), "dense": arm(0.81)})
    assert "accuracy: -1.00 points, n=1: no interval" in compared(tmp_path)[0]


def test_a_dense_run_of_its_own_serves_every_method(tmp_path: Path) -> None:
    for seed in (0, 1):
        run(tmp_path / f"d{seed}", {"dense": arm(0.9)}, seed=seed, schedule="dense")
        for target in (0.5, 0.9):
            options = {"seed": seed, "target": target, "baseline": False}
            run(tmp_path / f"{target}{seed}", {"fedmap": arm(0.9 - target / 100)}, **options)
    _, found = compared(tmp_path)
    (setting,) = found["settings"]
    assert [m["label"] for m in setting["methods"]] == [
        "dense", "fedmap target=0.5", "fedmap target=0.9",
    ]  # fmt: skip
    assert [m["points"]["accuracy"]["mean"] for m in setting["methods"][1:]] == [
        pytest.approx(-0.5), pytest.approx(-0.9),
    ]  # fmt: skip


def test_each_rate_has_its_own_dense_arm(tmp_path: Path) -> None:
    for lr, dense in ((0.05, 0.9), (0.2, 0.8)):
        run(tmp_path / str(lr), {"fedmap": arm(0.7, 0.1), "dense": arm(dense)}, lr=lr)
    _, found = compared(tmp_path)
    methods = {m["label"]: m for m in found["settings"][0]["methods"]}
    assert methods["fedmap lr=0.2"]["reference"] == "dense lr=0.2"
    assert methods["fedmap lr=0.2"]["points"]["accuracy"]["mean"] == pytest.approx(-10)
    assert methods["dense lr=0.2"]["reference"] == "dense lr=0.05"


def test_what_cannot_be_paired_is_named(tmp_path: Path) -> None:
    run(tmp_path / "a", {"fedmap": arm(0.8, 0.1), "dense": arm(0.8)}, seed=0)
    run(tmp_path / "b", {"fedmap": arm(0.8, 0.1)}, seed=1, baseline=False)
    run(tmp_path / "c", {"fedmap": arm(0.6, 0.1)}, partition="dirichlet", baseline=False)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.toml").write_text("rounds = 3\n")
    run(tmp_path / "e", {"fedmap": {"accuracy": "high"}})
    text, found = compared(tmp_path)
    assert "fedmap, seed 1: dense has no run of this seed" in text
    assert "no other method under cnn on digits, 10 clients, dirichlet" in text
    assert "partition dirichlet and iid" in text
    assert f"{tmp_path / 'd'}: not finished, so it is left out" in text
    assert f"{tmp_path / 'e'}: not the result of a run: " in text
    assert len(found["left_out"]) == 2


def test_models_from_python_are_not_taken_for_the_options(tmp_path: Path) -> None:
    run(tmp_path / "a", {"fedmap": arm(0.8)}, baseline=False)
    run(tmp_path / "b", {"fedmap": arm(0.8)}, baseline=False)
    path = tmp_path / "b" / "config.toml"
    path.write_text("# from Python, whatever is said below: model Net\n\n" + path.read_text())
    assert len(compared(tmp_path)[1]["settings"]) == 2


def test_a_path_given_twice_counts_once(tmp_path: Path) -> None:
    run(tmp_path / "a", {"fedmap": arm(0.8)}, baseline=False)
    assert len(results.find([tmp_path, tmp_path / "a"])[0]) == 1


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run in"):
        compare.compare([tmp_path])
    with pytest.raises(ConfigError, match="expected a folder of runs, got none"):
        compare.compare([tmp_path / "no"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "a", {"fedmap": arm(0.8, 0.1), "dense": arm(0.81)})
    out = tmp_path / "c.json"
    assert cli.main(["compare", str(tmp_path / "a"), "--json", str(out)]) == 0
    assert "n=1: no interval" in capsys.readouterr().out
    assert json.loads(out.read_text())["confidence"] == 0.95
    assert cli.main(["compare", str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.startswith("fedmap-sparse compare: ")
