"""`tools/measure_gpu.py` without a GPU: its steps on stand-ins, and steps that fail or hang."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure_gpu
import pytest
import torch
from gpu_run import chunks, counters, extras, peers, split, steps, sweeps, tests, ties, waits
from gpu_run.bench import Bench
from ladder import syncs
from measure_gpu import Step

import fedmap_sparse as fs
from fedmap_sparse.triton_kernels import _tuning

#: Of the bench's ops, those that know no density.
WHOLE = ("cast_bfloat16", "quantize_int8")
_HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").write('{"half": 1}')
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1] + ".pid", "w").write(str(child.pid))
time.sleep(600)
"""


def test_a_step_that_fails_or_hangs_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_gpu, "_GRACE", 0.5)
    python, half = sys.executable, tmp_path / "hangs.json"
    run = measure_gpu.conduct(
        [
            Step("fails", 20, "", (python, "-c", "raise SystemExit('no such card')")),
            Step("crashes", 20, "", (python, "-c", "import os; os.abort()")),
            Step("hangs", 3, "", (python, "-c", _HANGS, str(half))),
            Step("missing", 20, "", ("/no/such/program",)),
            Step("nothing", 20, "", (python, "-c", "raise SystemExit(3)")),
            Step("works", 20, "", (python, "-c", "print('ok')")),
        ],
        tmp_path,
    )
    found = {name: record["state"] for name, record in run["steps"].items()}
    assert found == {
        "fails": "failed", "crashes": "failed", "hangs": "timed out", "missing": "failed",
        "nothing": "skipped", "works": "done",
    }  # fmt: skip
    assert "no such card" in run["steps"]["fails"]["output"]
    assert "/no/such/program" in run["steps"]["missing"]["output"]
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == run["steps"]
    assert json.loads(half.read_text()) == {"half": 1}
    child = int(Path(f"{half}.pid").read_text())
    for _ in range(50):  # what the step had started is gone too, or is about to be reaped
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {child}, which the step had started, still runs")


def test_no_step_starts_without_time(tmp_path: Path) -> None:
    run = measure_gpu.conduct([Step("late", 60, "", ("/bin/true",))], tmp_path, minutes=0.01)
    assert run["steps"]["late"]["state"] == "skipped"


def test_the_limits_of_all_steps_are_the_eight_minutes() -> None:
    build, *others = measure_gpu.STEPS
    assert build.name == "build"
    assert sum(step.limit for step in others) <= 60 * measure_gpu._MINUTES
    assert [step.name for step in measure_gpu.STEPS] == list(steps.STEPS)
    assert all(step.limit > 2 * measure_gpu._GRACE for step in measure_gpu.STEPS)


def test_a_message_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies apart from kernels; a message that was written, and none that was read, is taken
    apart on the host."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    params = fs.flatten(torch.nn.Linear(64, 64))
    row = {"us": 100.0, "kernels_us": {"_pack": 10.0, "Memcpy DtoH (Device -> Pinned)": 30.0}}
    cpu = torch.device("cpu")
    found = split.split(row, lambda: fs.encode(params, params.mask), cpu)
    assert {"kernels": 10.0, "copies": 30.0, "host": 60.0}.items() <= found["split_us"].items()
    assert "host: join" in found["split_us"]
    assert found["waits"] == []
    assert any("encode" in line for line in found["profile"])
    assert "host: join" not in split.split(row, lambda: None, cpu)["split_us"]


@pytest.mark.parametrize("name", [n for n in steps.STEPS if n not in ("contracts", "winners")])
def test_a_step_on_stand_ins(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    goals = importlib.import_module("gpu_tables")
    code = steps.run(name, tmp_path, time.time() + 60, True, None)
    nothing = {"counters", "peers", "experiment"}
    assert code == (steps.SKIPPED if name in nothing else 0)
    path = tmp_path / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if name in nothing - {"peers"}:
        return
    assert found["dry"] is True
    if name == "baseline":
        assert len(found["workloads"]) > 40
        assert {"select of 8", *goals.GOALS} < set(found["workloads"])
        assert {row["us"] for row in found["workloads"].values()} == {0.0}
        assert found["missing"]["select (CUDA C++)"]
    if name == "sweeps":
        assert set(found["sweeps"]) == {sweep.constant for sweep in sweeps.SWEEPS}
        assert found["winners"] == {}
    if name == "waits":
        here = [name for name in waits.CAPTURED if not name.endswith(extras.MARK)]
        assert found["captures"] == dict.fromkeys(here, "replayed")
        assert set(here) < set(found["syncs"])
        assert set(goals.HOST_GOALS) < set(found["syncs"])
    if name == "peers":
        assert found["cases"][: len(peers.OPS)] == [
            f"{op} {0.5 if op == 'accumulate' else 1.0 if op in WHOLE else 0.1}" for op in peers.OPS
        ]
        assert "select 0.01" in found["cases"]
    if name == "graphs":
        assert set(found["wall_us"]) == {"local step", "select", "pack", "masked_sgd"}
    if name == "ties":
        assert len(found["ties"]) == 2 * 2 * len(ties.INPUTS)
        assert set(goals.TIES_GOALS) < set(found["ties"])
    if name == "chunks":
        sizes = [row["bytes"] for row in found["chunks"].values()]
        assert list(found["chunks"]) == [str(steps) for steps in chunks.STEPS]
        assert sizes == sorted(sizes, reverse=True)
    if name == "large":
        assert "code" in found


def test_a_step_minds_its_deadline(tmp_path: Path) -> None:
    assert steps.run("sweeps", tmp_path, 0, True, None) == 0
    assert "no time left" in json.loads((tmp_path / "sweeps.json").read_text())["left_out"]


def test_without_a_device_nothing_is_timed(tmp_path: Path) -> None:
    if importlib.import_module("torch").cuda.is_available():
        pytest.skip("there is a device")
    assert steps.run("baseline", tmp_path, time.time() + 60, False, None) == steps.SKIPPED
    assert not (tmp_path / "baseline.json").exists()


def test_a_capture_that_fails_or_goes_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(run: Any, real: bool) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(waits, "captured", refused)
    assert waits.attempt("pack", False).startswith("refused: RuntimeError: operation not permitted")
    monkeypatch.setattr(waits, "captured", lambda run, real: (run() + 1, lambda: None))
    assert waits.attempt("pack", False) == "replayed, other values"


def test_the_watch_for_waits_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        if mode == "warn":
            raise RuntimeError("with the mode set")

    monkeypatch.setattr(importlib.import_module("torch").cuda, "set_sync_debug_mode", set_mode)
    with syncs.watched("error"):
        assert modes == ["error"]
        with pytest.warns(UserWarning, match="synchronizing"):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    with pytest.raises(RuntimeError, match="mode set"), syncs.watched("warn"):
        pass
    assert modes == ["error", "default", "warn", "default"]


@pytest.mark.parametrize("workers", [1, 2])
def test_tests_of_a_step_fail_it(tmp_path: Path, workers: int) -> None:
    bench = Bench("tests", tmp_path, 60.0, True, None)
    for name, text in (("test_fails", "def test_it(): assert 0"), ("test_no_import", "import no_")):
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        with pytest.raises(RuntimeError, match="tests: 1 failed"):
            tests.run_tests(bench, str(file), workers=workers)
        ((test, why),) = bench.found["failures"].items()
        assert name in test
        assert ("assert 0" if name == "test_fails" else "no_") in why


@pytest.mark.parametrize("workers", [1, 2])
def test_tests_of_a_step_end_in_time(tmp_path: Path, workers: int) -> None:
    bench = Bench("tests", tmp_path, 60.0, True, None)
    file = tmp_path / "test_three.py"
    file.write_text(
        "import time\n"
        "from fedmap_sparse.triton_kernels import _tuning\n"
        "def test_a(): assert _tuning.STEP_DENSE == (1, 2, 3, 4)\n"
        "def test_b(): time.sleep(600)\n"
        "def test_c(): time.sleep(600)\n"
    )
    start = time.monotonic()
    settings = {"STEP_DENSE": (1, 2, 3, 4)}
    line = tests.run_tests(bench, str(file), settings=settings, seconds=25, workers=workers)
    assert line == "1 passed, then no time left"
    assert time.monotonic() - start < 45
    assert bench.found["collected"] == 3
    assert next(iter(bench.found["longest"])).endswith("::test_a")


def test_tests_of_a_step_need_no_xdist(tmp_path: Path) -> None:
    bench = Bench("tests", tmp_path, 60.0, True, None)
    file = tmp_path / "test_one.py"
    file.write_text("def test_it(): pass")
    assert tests.run_tests(bench, str(file), "-p", "no:xdist", workers=1) == "1 passed"


def test_stress_follows_tests_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **named: Any) -> None:
        raise RuntimeError("tests: 1 failed")

    monkeypatch.setattr(steps, "run_tests", fails)
    bench = Bench("contracts", tmp_path, 60.0, True, None)
    with pytest.raises(RuntimeError, match="1 failed"):
        steps.contracts(bench)
    assert bench.found["stress"] == {"selections": 2, "wrong": 0, "backends": ["reference"]}


def test_every_file_of_tests_has_its_worth() -> None:
    files = Path(__file__).parents[1].joinpath("gpu").glob("test_*.py")
    assert {path.stem.removeprefix("test_") for path in files} == set(steps._WORTH)


def test_stored_messages_want_nothing_that_a_borrowed_machine_lacks() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("hypothesis", "ambient", "rich", "sklearn", "safetensors")))
import stored_messages
for name in stored_messages.GOLDEN:
    stored_messages.decode(name, stored_messages.golden(name))
"""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent)])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)


def test_limits_grow_with_the_minutes_and_with_what_others_leave(tmp_path: Path) -> None:
    code = "import time; time.sleep(3)"
    slow = Step("slow", 2, "", (sys.executable, "-c", code))
    quick = Step("quick", 30, "", ("/bin/true",))
    hangs = Step("hangs", 3, "", ("/bin/sleep", "60"))
    for chosen, minutes, want in (
        ([slow], 8.0, "timed out"), ([slow], 80.0, "done"), ([quick, slow], 8.0, "done"),
        ([hangs, slow], 8.0, "timed out"),
    ):  # fmt: skip
        run = measure_gpu.conduct(chosen, tmp_path, minutes=minutes)
        assert run["steps"]["slow"]["state"] == want


def test_every_constant_is_swept() -> None:
    constants = {name for name in vars(_tuning) if name.isupper()}
    swept = {sweep.constant for sweep in sweeps.SWEEPS}
    # Where one warp is measured to be best; the rows of a refinement follow the decision's.
    assert constants - swept == {"PACK_SPARSE", "REFINE_ROWS"}


@pytest.mark.parametrize(
    ("base", "tried", "want"),
    [
        ({"a": 100.0, "b": 50.0}, {"a": 90.0, "b": 50.5}, True),
        ({"a": 100.0, "b": 50.0}, {"a": 80.0, "b": 52.0}, False),
        ({"a": 100.0}, {"a": 99.8}, False),
    ],
)
def test_a_winner_slows_nothing_down(
    base: dict[str, float], tried: dict[str, float], want: bool
) -> None:
    assert sweeps.better(base, tried) is want


def test_counters_are_read() -> None:
    text = "\n".join(
        [
            "==PROF== Connected to process 1",
            '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
            '"0","_read","gpu__time_duration.sum","nsecond","61,234"',
            '"0","_read","launch__registers_per_thread","register/thread","96"',
            '"1","void spin_kernel(long)","gpu__time_duration.sum","nsecond","2"',
            '"2","step","gpu__time_duration.sum","nsecond","9.5"',
            'workloads under ncu: ["select float32", "masked_sgd"]',
        ]
    )
    text = text.replace('"0","_read"', '"x","spin_kernel","a","","1"\n"0","_read"', 1)
    assert counters.table(text) == [
        {
            "workload": "select float32",
            "kernel": "_read",
            "gpu__time_duration.sum": 61234.0,
            "launch__registers_per_thread": 96.0,
        },
        {"workload": "masked_sgd", "kernel": "step", "gpu__time_duration.sum": 9.5},
    ]


def test_counters_are_of_workloads_that_there_are() -> None:
    code = counters._CHILD.format(n=9, names=counters.WORKLOADS, seconds=1, heading="x")
    compile(code, "child", "exec")
    device = importlib.import_module("torch").device("cpu")
    every = importlib.import_module("ladder.catalogue").each_workload(4096, device)
    names = {w.name for w in every} | {f"select float32{extras.MARK}"}
    assert set(counters.WORKLOADS) <= names


def test_cuda_selections_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(extras, "cuda_select", lambda: (lambda *given: calls.append(given[3]), ""))
    device = importlib.import_module("torch").device("cpu")
    names = [w.name for w in extras.each_extra(4096, device)]
    assert names[:5] == [f"select {what} (CUDA C++)" for what in (
        "float32", "bfloat16", "within 0.3", "of 8")] + ["select of 8"]  # fmt: skip
    assert steps.run("ties", tmp_path, time.time() + 60, True, None) == 0
    rows = json.loads((tmp_path / "ties.json").read_text())["ties"]
    assert list(rows)[:2] == ["normal float32 0.1 (CUDA C++)", "normal float32 0.1"]
    assert calls[:2] == [410, 2048]


def test_peers_lack_what_takes_too_long() -> None:
    @dataclass
    class Trial:
        peers: dict[str, int]

    got = peers.without(lambda setting: Trial({"torch.topk": 1, "torch.kthvalue": 2}))(None)
    assert got.peers == {"torch.topk": 1}


def test_the_commit_of_a_copy_is_what_was_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lent machine's checkout may be of another commit than the files in it."""
    monkeypatch.setenv("COMMIT", "abc")
    assert measure_gpu.commit() == "abc"
