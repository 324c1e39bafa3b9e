"""Runs that were interrupted or killed go on to the same bits, and what cannot go on is refused."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from experiment_runs import StopAfter, quick, same_results, timeless

from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import runner
from fedmap_sparse.experiments.data import load

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

ROOT = Path(__file__).parent.parent.parent

STATEFUL = {
    "clients": 6,
    "participation": 0.5,
    "dropout": 0.2,
    "keep_optimizer": True,
    "server_optimizer": "fedavgm",
    "server_lr": 0.7,
    "prox_mu": 0.01,
    "dtype": "bfloat16",
    "uplink_dtype": "int8",
    "delta": True,
    "partition": "dirichlet",
    "lr_decay": 0.9,
}


ADAPTIVE = {"schedule": "adaptive", "settled": 1.0, "margin": 0.5}


@pytest.mark.parametrize(
    "options", [ADAPTIVE, STATEFUL, {"model": "resnet8", "optimizer": "adamw"}]
)
@pytest.mark.parametrize("stop", [(1,), (3, 2)])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    options: dict[str, Any],
    stop: tuple[int, ...],
    tmp_path: Path,
) -> None:
    # (1,) stops within FedMap; (3, 2) within dense FedAvg too, after a first resumption.
    options = {"rounds": 4, "clients": 3, **options}
    if options.get("model") == "resnet8":
        options |= {"rounds": 3, "batch_size": 400}
    whole, parts = (quick(tmp_path / name, **options) for name in ("whole", "parts"))
    runner.run(whole)
    for i, rounds in enumerate(stop):
        with pytest.raises(KeyboardInterrupt):
            runner.run(parts, resume=i > 0, observer=StopAfter(rounds))
    runner.run(parts, resume=True)
    same_results(whole.folder, parts.folder)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, parts = (quick(tmp_path / name, rounds=10, clients=4) for name in ("whole", "parts"))
    runner.run(whole)
    words = [f"{k}={v}" for k, v in parts.to_dict().items() if k not in ("baseline",)]
    for resume, lines in ((False, 3), (True, 13)):
        command = [sys.executable, "-m", "fedmap_sparse", "run", *words]
        process = subprocess.Popen(
            command + ["--resume"] * resume, cwd=ROOT, stdout=subprocess.DEVNULL
        )
        metrics = parts.folder / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < lines:
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (parts.folder / "summary.json").exists()
    runner.run(parts, resume=True)
    same_results(whole.folder, parts.folder)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    config = quick(tmp_path, rounds=2)
    summary = runner.run(config)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert runner.run(config, resume=True) == summary
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_starts_what_was_never_begun(tmp_path: Path) -> None:
    config = quick(tmp_path / "new", rounds=1, baseline=False)
    assert runner.run(config, resume=True)["fedmap"]["rounds"] == 1


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    config = quick(tmp_path, rounds=1, baseline=False)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="--resume goes on with it, --overwrite replaces it"):
        runner.run(config)
    with pytest.raises(ConfigError, match="give one"):
        runner.run(config, resume=True, overwrite=True)
    runner.run(config, overwrite=True)
    first = timeless(tmp_path)
    runner.run(quick(tmp_path, rounds=1, baseline=False, seed=1), overwrite=True)
    assert timeless(tmp_path) != first
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a folder, got a file"):
        runner.run(quick(tmp_path / "file"))


def test_resume_wants_the_same_options_and_data(tmp_path: Path) -> None:
    runner.run(quick(tmp_path, rounds=1, baseline=False))
    for changed, message in (
        ({"seed": 3}, "seed was 0, got 3"),
        ({"partition": "dirichlet"}, "alpha was not given, got 0.5"),
        ({"schedule": "dense"}, "criterion was magnitude, got none"),
    ):
        with pytest.raises(ConfigError, match=message):
            runner.run(quick(tmp_path, **{"rounds": 1, "baseline": False, **changed}), resume=True)
    other = load("digits")
    other.train.images[0, 0, 0, 0] += 1
    with pytest.raises(ConfigError, match="the data are not those"):
        runner.run(quick(tmp_path, rounds=1, baseline=False), data=other, resume=True)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match="not a checkpoint, or damaged"):
        runner.run(quick(tmp_path, rounds=1, baseline=False), resume=True)
