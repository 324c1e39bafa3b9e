"""A run's folder: one run at a time, whole files, and no other experiment than its own."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmap_sparse import cli
from fedmap_sparse.errors import CheckpointError, ConfigError
from fedmap_sparse.experiments import checkpoint, runner
from fedmap_sparse.experiments.config import Config, build
from fedmap_sparse.experiments.lock import Lock
from fedmap_sparse.experiments.models import mlp
from fedmap_sparse.experiments.progress import Observer

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

OPTIONS: dict[str, Any] = {
    "dataset": "digits", "model": "mlp", "clients": 2, "rounds": 2, "batch_size": 400,
    "threads": 1, "baseline": False,
}  # fmt: skip


def tiny(out: Path, **options: Any) -> Config:
    return build({**OPTIONS, "out": str(out), **options})


def command(out: Path, *words: str) -> list[str]:
    return ["run", *(f"{k}={v}" for k, v in OPTIONS.items()), "--out", str(out), *words]


def resume(out: Path, *words: str) -> list[str]:
    return ["run", "--resume", "--out", str(out), *words]


def line(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert cli.main(words) == code
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def snapshot(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def outcome(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in record.items() if k != "seconds"} for record in lines]
    return (out / "model.safetensors").read_bytes(), timeless


class StopAtOnce(Observer):
    """Stops a run when its folder is ready and no round has ended."""

    def arm(self, *_: Any) -> None:
        raise KeyboardInterrupt


class StopAfterOne(Observer):
    def round(self, _: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    runner.run(tiny(out))
    return out


def stopped(out: Path, when: Observer) -> Path:
    with pytest.raises(KeyboardInterrupt):
        runner.run(tiny(out), observer=when)
    return out


@pytest.mark.parametrize("how", [[], ["--resume"], ["--overwrite"]])
def test_a_second_process_is_one_line_and_changes_nothing(
    how: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped(tmp_path / "run", StopAfterOne())
    lock = Lock(out / ".lock")
    before = snapshot(out)
    assert "another run is at work in it (process " in line(capsys, command(out, *how))
    assert snapshot(out) == before
    lock.release()
    assert cli.main(resume(out)) == 0


def test_the_lock_ends_with_a_run_that_fails(tmp_path: Path) -> None:
    stopped(tmp_path / "run", StopAfterOne())
    Lock(tmp_path / "run" / ".lock").release()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing"])
def test_the_checkpoint_before_is_used_with_a_line_that_says_so(
    damage: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    runner.run(tiny(out))
    path = out / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"flipped": data, "cut": data[:-9], "empty": b""}[damage])
    assert cli.main(resume(out)) == 0
    text = capsys.readouterr().out
    assert "going on from the one before, checkpoint.previous.safetensors" in text
    assert "going on after 1 of 2 rounds" in text
    assert outcome(out) == outcome(whole)


def test_a_damaged_checkpoint_never_takes_the_place_of_a_sound_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    out = tmp_path / "run"
    runner.run(tiny(out))
    (out / "checkpoint.safetensors").write_bytes(b"rubbish")
    real = os.replace

    def crash(source: Path, target: Path) -> None:
        if target.name == "checkpoint.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    assert cli.main(resume(out)) == 3
    monkeypatch.undo()
    assert cli.main(resume(out)) == 0
    assert outcome(out) == outcome(whole)


def test_two_damaged_checkpoints_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped(tmp_path / "run", StopAfterOne())
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        (out / name).write_bytes(b"rubbish")
    before = snapshot(out)
    assert "--overwrite starts anew" in line(capsys, resume(out))
    assert snapshot(out) == before


def test_every_byte_of_a_checkpoint_is_under_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"numbers": torch.arange(20), "text": "and JSON", "more": [1.5, None]})
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


NO_RUN = "no run in"
FOREIGN = "not the options of a run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, NO_RUN),
        ("", NO_RUN),
        ("\n \n", NO_RUN),
        ("rounds = 1\n", FOREIGN),
        ("[server]\nport = 80\n", "expected `key = value` lines alone"),
        ("{}", "not TOML"),
        ("\x00", "not TOML"),
    ],
)
def test_resume_never_starts_another_experiment(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    if text is not None:
        (out / "config.toml").write_text(text)
    before = snapshot(out)
    assert message in line(capsys, resume(out))
    assert snapshot(out) == before
    if message is NO_RUN:  # with the options named it starts
        assert cli.main(command(out, "--resume")) == 0
    else:  # another's file is not replaced
        assert message in line(capsys, command(out, "--resume"))


@pytest.mark.parametrize("text", [None, "", "rounds = 1\n"])
def test_a_checkpoint_has_the_options_too(
    text: str | None, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped(tmp_path / "run", StopAfterOne())
    (out / "config.toml").unlink()
    if text is not None:
        (out / "config.toml").write_text(text)
    assert cli.main(resume(out)) == 0
    assert "lacks the run's options; they are the checkpoint's" in capsys.readouterr().out
    assert outcome(out) == outcome(whole)


def test_a_run_stopped_before_its_first_round_goes_on_as_itself(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped(tmp_path / "run", StopAtOnce())
    assert not (out / "checkpoint.safetensors").exists()
    assert "lr was 0.05, got 0.5" in line(capsys, resume(out, "lr=0.5"))
    with pytest.raises(ConfigError, match="seed was 0, got 1"):
        runner.run(tiny(out, seed=1), resume=True)
    assert cli.main(resume(out)) == 0
    assert outcome(out) == outcome(whole)


@pytest.mark.parametrize("when", [StopAtOnce, StopAfterOne])
def test_a_model_from_python_is_not_replaced_by_a_built_in_one(
    when: type[Observer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def mine() -> torch.nn.Module:
        return mlp((1, 8, 8), 10)

    with pytest.raises(KeyboardInterrupt):
        runner.run(tiny(out), model=mine, observer=when())
    assert "model mine from Python" in line(capsys, resume(out))
    with pytest.raises(ConfigError, match="model mine from Python, this one nothing"):
        runner.run(tiny(out), resume=True)
    assert runner.run(tiny(out), model=mine, resume=True)["fedmap"]["rounds"] == 2


def test_overwrite_removes_the_options_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped(tmp_path / "run", StopAfterOne())
    removed = []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(ConfigError, match="cannot be replaced: Input/output error"):
        runner.run(tiny(out), overwrite=True)
    assert removed == ["config.toml"]


def test_a_config_of_a_run_serves_another(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    words = ["run", str(whole / "config.toml"), "rounds=12", "optimizer=adamw", "--out", str(out)]
    assert cli.main([*words, "--show-partition"]) == 0
    text = (whole / "config.toml").read_text()
    assert "# prune_end = 1\n" in text
    assert "# lr = 0.05\n" in text
    assert "\nrounds = 2\n" in text
    assert "\n# out = " in text


def test_the_dense_model_is_saved_too(tmp_path: Path) -> None:
    runner.run(tiny(tmp_path, baseline=True, rounds=1))
    assert (tmp_path / "model-dense.safetensors").stat().st_size > 4 * 54_800


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({"rounds": 1}, ["ranks random initial weights", "at once"]),
        ({"rounds": 3}, ["at once"]),
        ({"rounds": 10}, []),
        ({"rounds": 1, "schedule": "dense"}, []),
        ({"rounds": 5, "schedule": "oneshot", "prune_start": 0}, ["ranks random initial weights"]),
    ],
)
def test_what_a_short_schedule_does_is_said(
    options: dict[str, Any], notes: list[str], tmp_path: Path
) -> None:
    said: list[str] = []

    class Stop(Observer):
        def begin(self, lines: list[str]) -> None:
            said.extend(text for text in lines if text.startswith("note:"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(tiny(tmp_path, **options), observer=Stop())
    assert len(said) == len(notes)
    for found, wanted in zip(said, notes):
        assert wanted in found


def test_a_failed_round_is_drawn_anew_when_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"clients": 6, "participation": 0.5, "dropout": 0.7, "min_updates": 2}
    patient = runner.run(tiny(tmp_path / "patient", **options, attempts=100))
    words = [*command(tmp_path / "hasty"), *(f"{k}={v}" for k, v in options.items()), "attempts=1"]
    code, failures = cli.main(words), 0
    while code == 1:
        failures += 1
        assert failures < 50
        error = capsys.readouterr().err
        told = error.rstrip("\n").partition("draw it again with: fedmap-sparse ")[2]
        code = cli.main(told.split(" "))
    assert code == 0
    assert failures > 0
    assert outcome(tmp_path / "patient")[0] == outcome(tmp_path / "hasty")[0]
    attempts = [record["attempts"] for record in outcome(tmp_path / "patient")[1]]
    assert sum(attempts) == failures + patient["fedmap"]["rounds"]
