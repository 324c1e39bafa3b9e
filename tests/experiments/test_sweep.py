"""Sweeps: what a file means, what is run once, skipped, resumed, named; Ctrl-C ends all of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedmap_sparse import cli
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import pool, runner, sweep
from fedmap_sparse.experiments.config import build
from fedmap_sparse.experiments.folder import RunFolder

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

ROOT = Path(__file__).parent.parent.parent
TINY: dict[str, Any] = {
    "dataset": "digits", "model": "mlp", "clients": 3, "rounds": 2, "batch_size": 128,
}  # fmt: skip


def names(**values: Any) -> list[str]:
    return [job.name for job in sweep.plan({**TINY, **values}).jobs]


def test_a_grid_is_every_combination_over_seeds() -> None:
    found = names(grid={"target": [0.5, 0.9], "lr": [0.1]}, seeds=[0, 1], baseline=False)
    assert found == [f"target={t},lr=0.1,seed={s}" for t in (0.5, 0.9) for s in (0, 1)]


def test_tables_of_runs_are_choices_of_several_options() -> None:
    runs = [{"model": "mlp", "lr": 0.1}, {"model": "cnn"}]
    found = names(runs=runs, grid={"target": [0.5, 0.9]}, baseline=False)
    assert found == [
        f"{m},target={t}" for m in ("model=mlp,lr=0.1", "model=cnn") for t in (0.5, 0.9)
    ]


def test_a_dense_arm_that_several_runs_have_is_one_run() -> None:
    made = sweep.plan({**TINY, "grid": {"lr": [0.1, 0.2], "target": [0.5, 0.9]}, "seeds": "0,1"})
    found = {job.name: job.values for job in made.jobs}
    dense = [name for name in found if name.startswith("dense")]
    assert dense == [f"dense,lr={lr},seed={seed}" for lr in (0.1, 0.2) for seed in (0, 1)]
    assert all(found[name]["schedule"] == "dense" for name in dense)
    assert all("target" not in found[name] for name in dense)
    assert all(found[name]["baseline"] is False for name in found.keys() - set(dense))


def test_a_dense_arm_of_one_run_stays_there() -> None:
    made = sweep.plan({**TINY, "grid": {"lr": [0.1, 0.2]}})
    assert [job.name for job in made.jobs] == ["lr=0.1", "lr=0.2"]
    assert all("baseline" not in job.values for job in made.jobs)


def test_a_dense_run_of_the_grid_serves_the_others() -> None:
    made = sweep.plan({**TINY, "grid": {"schedule": ["dense", "oneshot"]}})
    assert [job.name for job in made.jobs] == ["schedule=dense", "schedule=oneshot"]
    assert made.jobs[1].values["baseline"] is False


def test_a_run_that_cannot_be_is_named_and_the_others_stay() -> None:
    made = sweep.plan({**TINY, "alpha": 0.3, "grid": {"partition": ["iid", "dirichlet"]}})
    assert [job.name for job in made.jobs] == ["partition=dirichlet"]
    assert list(made.bad) == ["partition=iid"]
    assert made.bad["partition=iid"].startswith("alpha: goes with partition=dirichlet")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid": {"lrr": [1]}}, "unknown option 'lrr'; did you mean lr"),
        ({"gird": {"lr": [1]}}, "unknown option 'gird'"),
        ({"grid": {"lr": 0.1}}, r"grid.lr: expected a list of values, got 0\.1"),
        ({"grid": {"lr": []}}, r"grid.lr: expected a list of values, got \[\]"),
        ({"grid": {"seed": [1]}}, "grid: seed is none of a grid's"),
        ({"grid": [1]}, "grid: expected a table of lists"),
        ({"runs": {"lr": 1}}, r"runs: expected tables \[\[runs\]\]"),
        ({"runs": [{"name": "x"}]}, "runs: name stands above the tables"),
        ({"seeds": "0,x"}, "seeds: expected integers as in 0,1,2, got '0,x'"),
        ({"seeds": [0, 0]}, "seeds: expected at least one and none twice"),
        ({"seeds": []}, "seeds: expected at least one"),
        ({"seeds": [0], "seed": 1}, "seed, seeds: expected one of them, got both"),
        ({"grid": {"lr": [0.1, 0.1]}}, "'lr=0.1': expected names of runs that differ"),
    ],
)
def test_what_is_no_sweep(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep.plan({**TINY, **values})


@pytest.mark.parametrize(("name", "runs"), [("claim", 24), ("baselines", 27)])
def test_the_committed_sweeps_can_be_run(name: str, runs: int) -> None:
    made = sweep.plan(sweep.read_file(ROOT / "experiments" / f"{name}.toml"))
    assert made.bad == {}
    assert len(made.jobs) == runs


def test_processes_and_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "available_cores", lambda: 8)
    jobs = [sweep.Job(str(k), {}) for k in range(3)]
    assert sweep.share(jobs, None) == (3, 2)
    assert sweep.share(jobs * 9, None) == (8, 1)
    assert sweep.share(jobs, 1) == (1, 8)
    assert sweep.share([sweep.Job("a", {"threads": 4}), *jobs], None) == (2, 4)
    monkeypatch.setattr(sweep, "available_cores", lambda: 2)
    assert sweep.share([sweep.Job("a", {"threads": 4})], None) == (1, 4)


def stamps(folder: Path) -> dict[str, int]:
    return {
        p.parent.name: p.stat().st_mtime_ns
        for p in folder.rglob("metrics.jsonl")
    }  # fmt: skip


def test_a_sweep_runs_names_shares_and_skips(tmp_path: Path) -> None:
    """One that diverges is named; the others go on, and none is run again."""
    values = {
        **TINY, "out": str(tmp_path / "s"), "seeds": [0, 1], "grid": {"target": [0.5, 0.9]},
        "runs": [{}, {"lr": 1e30}],
    }  # fmt: skip
    lines: list[str] = []
    failed = sweep.run(sweep.plan(values), processes=2, tell=lines.append)
    assert len(failed) == 6  # the dense arms of that rate diverge, too
    assert all("lr=1e+30" in name and "round 0: " in reason for name, reason in failed.items())
    found = json.loads((tmp_path / "s" / "comparison.json").read_text())
    methods = {m["label"]: m for m in found["settings"][0]["methods"]}
    assert list(methods) == ["dense", "fedmap target=0.5", "fedmap target=0.9"]
    assert all(m["seeds"] == [0, 1] for m in methods.values())
    points = methods["fedmap target=0.9"]["points"]["accuracy"]
    own, dense = (methods[name]["accuracy"] for name in ("fedmap target=0.9", "dense"))
    assert points["n"] == 2
    assert points["mean"] == pytest.approx(50 * sum(a - b for a, b in zip(own, dense)))
    assert any("n=2" in line for line in lines)
    log = tmp_path / "s" / "target=0.5,seed=0" / pool.LOG
    assert "accuracy" in log.read_text()
    good = {k: v for k, v in stamps(tmp_path / "s").items() if "lr" not in k}
    lines.clear()
    del values["runs"]
    assert sweep.run(sweep.plan(values), tell=lines.append) == {}
    assert "6 runs, 6 of them finished before" in lines[0]
    assert good == {k: v for k, v in stamps(tmp_path / "s").items() if "lr" not in k}


def test_other_options_in_the_folder_of_a_run_are_refused(tmp_path: Path) -> None:
    values = {**TINY, "out": str(tmp_path / "s"), "seeds": [0], "baseline": False, "rounds": 1}
    runner.run(build({**TINY, "rounds": 1, "baseline": False, "out": str(tmp_path / "s/seed=0")}))
    failed = sweep.run(sweep.plan({**values, "lr": 0.2}), tell=lambda line: None)
    assert "lr was 0.05, got 0.2" in failed["seed=0"]
    assert sweep.run(sweep.plan(values), tell=lambda line: None) == {}


def test_a_process_that_dies_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**TINY, "out": str(tmp_path / "s"), "seeds": [0, 1], "baseline": False}
    give = pool._Worker.give

    def killed(worker: Any, task: pool.Task, *options: bool) -> None:
        give(worker, task, *options)
        if task[0] == "seed=0":
            worker.process.kill()

    monkeypatch.setattr(pool._Worker, "give", killed)
    failed = sweep.run(sweep.plan(values), processes=1, tell=lambda line: None)
    assert list(failed) == ["seed=0"]
    assert "its process ended by signal 9" in failed["seed=0"]
    assert (tmp_path / "s" / "seed=1" / "summary.json").exists()


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "fedmap_sparse", *words],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
def test_ctrl_c_ends_every_process_with_one_line(tmp_path: Path) -> None:
    """As a terminal does: the signal goes to the whole group."""
    (tmp_path / "s.toml").write_text(
        'dataset = "digits"\nmodel = "mlp"\nrounds = 2000\nbaseline = false\nseeds = [0, 1]\n'
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(tmp_path, "sweep", "s.toml", "--jobs", "2")
    signal.signal(signal.SIGINT, before)
    try:
        runs = [tmp_path / "runs" / "s" / f"seed={seed}" for seed in (0, 1)]
        end = time.monotonic() + 90
        while not all((run / "checkpoint.safetensors").exists() for run in runs):
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        again = "fedmap-sparse sweep s.toml --jobs 2"
        assert errors == f"fedmap-sparse sweep: interrupted; go on with: {again}\n"
        for run in runs:
            with RunFolder(run).open(resume=True, overwrite=False) as found:
                assert found.state is not None, "nobody is at work in it"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'dataset = "digits"\nmodel = "mlp"\nclients = 3\n[grid]\ntarget = [0.9, 2]\n'
    )
    process = start(tmp_path, "sweep", "s.toml", "rounds=2", "seeds=4")
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (1, "")
    assert "1 of 2 runs are done" in out
    assert "target=2,seed=4: target: expected at least 0 and at most 1, got 2" in out


def test_several_seeds_of_one_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{key}={value}" for key, value in TINY.items()]
    assert cli.main(["run", *words, "seeds=0,1", "--out", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert "seed=0: fedmap    1/2 rounds" in out
    assert ", n=2" in out
    assert {p.name for p in (tmp_path / "r").iterdir()} == {"seed=0", "seed=1", "comparison.json"}
    assert cli.main(["run", *words, "seeds=1,x"]) == 2
    assert "seeds: expected integers as in 0,1,2" in capsys.readouterr().err
    assert cli.main(["run", *words, "seeds=1", "--show-partition"]) == 2
