"""The command line: exit codes, one-line errors, and what each command prints."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ambient import not_under
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse import cli

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

ROOT = Path(__file__).parent.parent
TINY = ("dataset=digits", "model=mlp", "clients=3", "rounds=2", "threads=1")


def command(*words: str) -> tuple[list[str], dict[str, str]]:
    """A command in a new interpreter that finds this checkout, and its environment."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return [sys.executable, "-m", "fedmap_sparse", *words], environment


def start(cwd: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    argv, environment = command(*words)
    return subprocess.run(
        argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def fails(capsys: pytest.CaptureFixture[str], words: Sequence[str], code: int = 2) -> str:
    """The one line that a command which fails writes to stderr."""
    found: object
    try:
        found = cli.main(list(words))
    except SystemExit as end:  # argparse's own
        found = end.code
    caught = capsys.readouterr()
    assert found == code
    assert caught.err.count("\n") == 1
    return caught.err.rstrip("\n")


def test_a_run_from_a_file_and_words(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('dataset = "digits"\nmodel = "mlp"\nrounds = 9\n')
    done = start(tmp_path, "run", "my.toml", "rounds=2", "clients=3", "name=mine", "threads=1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = tmp_path / "runs" / "mine"
    assert {p.name for p in out.iterdir()} >= {"config.toml", "summary.json", "curves.png"}
    assert "rounds = 2\n" in (out / "config.toml").read_text()
    lines = done.stdout.splitlines()
    arms = [line.split()[0] for line in lines if " rounds  " in line]
    assert [arm for arm in arms if arm in ("fedmap", "dense")] == ["fedmap"] * 2 + ["dense"] * 2
    assert re.search(r"test accuracy +\d+\.\d\d% +\d+\.\d\d%", done.stdout)
    assert re.search(r"pruned +90\.000% +0\.000%", done.stdout)
    assert re.search(r"weights left +5,480 of 54,800 +54,800 of 54,800", done.stdout)
    assert re.search(r"not forward, backward, evaluation +\d+\.\d% +\d+\.\d%", done.stdout)
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == {"fedmap", "dense"}


def test_words_may_stand_among_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", TINY[0], "--out", str(tmp_path / "x"), *TINY[1:], "baseline=false"]
    assert cli.main(words) == 0
    assert cli.main([*words, "--overwrite"]) == 0
    assert cli.main(["run", "--resume", "--out", str(tmp_path / "x")]) == 0
    assert "going on after 2 of 2 rounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clints=3"], "unknown option 'clints'; did you mean clients?"),
        (["clients=three"], "clients: expected an integer, got 'three'"),
        (["target=2"], "target: expected at least 0 and at most 1, got 2.0"),
        (["alpha=1"], "alpha: goes with partition=dirichlet, not with partition=iid"),
        (["dataset=nothing"], "no data set 'nothing': it is one of fashion-mnist-subset, "),
        (["--data", "/nowhere"], "no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in"),
        (["device=cuda:99"], "device: expected one that torch has here, got 'cuda:99'"),
        (["clients=2000", *TINY[:2]], "partition=iid: clients must be from 1 to the 1302 samples"),
        (["none.toml"], "none.toml: cannot be read: No such file or directory"),
        (["what"], "expected CONFIG.toml or key=value, got 'what'"),
        (["--bogus"], "unknown option --bogus; --help lists them all"),
        (["--resume", "--overwrite"], "--resume goes on with a run, --overwrite removes it"),
    ],
)
def test_what_cannot_be_is_one_line_and_code_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fails(capsys, ["run", *words]).startswith(f"fedmap-sparse run: {message}")
    assert list(tmp_path.iterdir()) == []


def test_config_files_are_checked_like_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.toml"
    for text, message in (
        ("roundz = 3", "unknown option 'roundz'; did you mean rounds?"),
        ('rounds = "3"', "rounds: expected an integer, got '3'"),
        ("rounds = true", "rounds: expected an integer, got True"),
        ("rounds = 3 3", f"{path}: not TOML: "),
        ("[training]\nrounds = 3", f"{path}: expected `key = value` lines alone"),
    ):
        path.write_text(text)
        assert fails(capsys, ["run", str(path)]).startswith(f"fedmap-sparse run: {message}")


def test_an_existing_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={tmp_path / 'x'}"
    assert cli.main(["run", *TINY, "baseline=false", out]) == 0
    capsys.readouterr()
    before = (tmp_path / "x" / "metrics.jsonl").read_bytes()
    line = fails(capsys, ["run", *TINY, out])
    assert "--resume goes on with it, --overwrite replaces it" in line
    line = fails(capsys, ["run", "--resume", out, "lr=0.5"])
    assert line.endswith("lr was 0.05, got 0.5")
    assert (tmp_path / "x" / "metrics.jsonl").read_bytes() == before


@not_under("anomaly", reason="anomaly mode itself raises at the NaN that this run is about")
def test_a_failed_round_is_one_line_and_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, ["run", *TINY, "lr=1e30", "--out", str(tmp_path / "x")], code=1)
    assert "round 0: expected at least 1 usable updates, got 0 (refused: 0: " in line


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    words = [*TINY[:2], "clients=4", "rounds=24", "threads=1", "baseline=false"]
    argv, environment = command("run", *words, "name=stopped")
    # A shell starts background jobs with SIGINT ignored, which the child would inherit; a handler
    # becomes the default there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        argv,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if " 3/24 rounds" in line:
            break
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "24/24 rounds" not in rest
    assert errors == (
        "fedmap-sparse run: interrupted; go on with: fedmap-sparse run --resume --out "
        f"{Path('runs', 'stopped')}\n"
    )
    resumed = start(tmp_path, "run", "--resume", "--out", "runs/stopped")
    assert resumed.returncode == 0, resumed.stderr
    done = int(re.findall(r"going on after (\d+) of 24 rounds", resumed.stdout)[0])
    assert 3 <= done < 24
    assert cli.main(["run", *words, "--out", str(tmp_path / "whole")]) == 0
    whole, stopped = tmp_path / "whole", tmp_path / "runs" / "stopped"
    name = "model.safetensors"
    assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == 24


def test_inspect_prints_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    params = fs.flatten(nn.Linear(100, 10))
    mask = fs.ops.prune_(params.prunable, 250, within=params.mask)
    params.mask = mask
    path = tmp_path / "m.fedmap"
    data = fs.encode(params, mask, mask_section="full", round=3, meta={"lr": 0.5})
    path.write_bytes(data)
    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for expected in (
        f"{len(data):,} bytes",
        "round 3",
        "survivors 250 of 1,000 eligible: density 25.0000%",
        mask.digest().hex(),
        params.layout.digest().hex(),
        "lr=0.5",
        "MASK",
        "VALUES",
        "TAIL",
        "float32",
    ):
        assert expected in text, expected
    damaged = bytearray(data)
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    assert "no message, or damaged" in fails(capsys, ["inspect", str(path)])
    assert "No such file" in fails(capsys, ["inspect", str(tmp_path / "none")])
    assert "cannot be read" in fails(capsys, ["inspect", str(tmp_path)])


def test_info_names_versions_backends_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())
    assert rows["fedmap-sparse"] == fs.__version__
    assert rows["torch"] == torch.__version__
    assert {
        f"backend {name}": state for name, state in fs.backends().items()
    }.items() <= rows.items()
    assert rows["threads"].startswith(f"{torch.get_num_threads()} of ")
    if fs.backends()["cpu"] == "available":
        assert re.fullmatch(r"(\w+) \(this machine: .*\b\1\b.*\)", rows["isa"])
    assert any(name.startswith("gpu") for name in rows)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (["--help"], ("run", "bench", "inspect", "info")),
        (["run", "--help"], ("partition=iid", "pruning:", "--resume", "checkpoint.safetensors")),
        (["bench", "--help"], ("--sizes",)),
        (["--version"], (f"fedmap-sparse {fs.__version__}",)),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 0
        text = capsys.readouterr().out
        for word in expected:
            assert word in text


@pytest.mark.parametrize("words", [[], ["walk"], ["inspect"], ["info", "--x"], ["info", "x"]])
def test_wrong_commands_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, words).startswith("fedmap-sparse")


def test_show_partition_prints_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    words = ["run", *TINY, "partition=dirichlet", "--show-partition", "--out", str(out)]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["client", "class", "0"]
    assert lines[-1].split()[-1] == "1302"
    assert len(lines) == 1 + 3 + 1
    assert not out.exists()


def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'fedmap-sparse[experiments]'" in fails(capsys, ["run"])
