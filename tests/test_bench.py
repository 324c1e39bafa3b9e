"""The benchmark's machinery: what it writes, what it refuses, how it takes turns."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ambient import FROZEN, not_under

from fedmap_sparse import Mask, backends, ops
from fedmap_sparse._backends import native
from fedmap_sparse.bench import case, floors, formats, inputs, main, runner, timing
from fedmap_sparse.bench.case import Setting

if backends()["cpu"] != "available":
    pytest.skip(f"cpu backend: {backends()['cpu']}", allow_module_level=True)
pytest.importorskip("rich", reason="rich prints the table")

FIELDS = {
    "op", "n", "density", "dtype", "device", "threads", "inputs", "median_s", "p20_s", "p80_s",
    "bytes", "gbps", "floor_s", "ratio_to_floor", "peers",
}  # fmt: skip
SMALL = [one for one in runner.registry().values() if (one.fixed_n or 0) < 1000]


def bench(*words: str, into: Path) -> tuple[int, dict]:
    code = main([*words, "--quick", "--json", str(into)])
    return code, json.loads(into.read_text())


def test_json(tmp_path: Path) -> None:
    code, found = bench(
        "--ops", "pack,select", "--sizes", "5000,70001", "--densities", ".5,.1",
        "--dtypes", "float32,float16", "--threads", "1", "--inputs", "ties",
        into=tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0
    assert set(found) == {"header", "records", "refused"}
    assert {"machine", "isa", "versions", "commit", "threads", "cores", "others_cpus"} <= set(
        found["header"]
    )
    assert found["header"]["isa"] == native.isa()
    assert found["refused"] == []
    assert len(found["records"]) == 2 * 2 * 2 * 2
    for r in found["records"]:
        assert set(r) == FIELDS
        assert (r["threads"], r["device"], r["inputs"]) == (1, "cpu", "ties")
        assert 0 < r["p20_s"] <= r["median_s"] <= r["p80_s"]
        assert r["gbps"] == pytest.approx(r["bytes"] / r["median_s"] / 1e9)
        assert r["ratio_to_floor"] == pytest.approx(r["median_s"] / r["floor_s"])
        for peer in r["peers"].values():
            assert peer["speedup"] == pytest.approx(peer["median_s"] / r["median_s"])
    of_pack = [r for r in found["records"] if r["op"] == "pack"]
    assert all(set(r["peers"]) == {"masked_select", "index_select"} for r in of_pack)
    assert {(r["n"], r["density"], r["dtype"]) for r in of_pack} == {
        (n, d, t) for n in (5000, 70001) for d in (0.5, 0.1) for t in ("float32", "float16")
    }


def test_a_wrong_op_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = ops.pack

    def wrong(values, mask, *, out=None, backend=None):  # type: ignore[no-untyped-def]
        found = right(values, mask, out=out, backend=backend)
        if backend is None:
            found[7] = -0.0
        return found

    monkeypatch.setattr(ops, "pack", wrong)
    code, found = bench("--ops", "pack,select", into=tmp_path / "r.json")
    assert code == 1
    assert {r["op"] for r in found["records"]} == {"select"}
    (refused,) = found["refused"]
    assert refused["op"] == "pack"
    assert "first at 7" in refused["reason"]


def test_an_op_that_raises_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args, **kwargs):  # type: ignore[no-untyped-def]
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ops, "weighted_mean", broken)
    code, found = bench("--ops", "accumulate", into=tmp_path / "r.json")
    assert code == 1
    assert found["records"] == []
    assert "no such kernel" in found["refused"][0]["reason"]


@pytest.mark.parametrize(
    "words",
    [
        ["--ops", "sorting"],
        ["--dtypes", "float64"],
        ["--inputs", "lognormal"],
        ["--inputs", "trained:no-such-package-here"],
        ["--threads", "0"],
    ],
)
def test_wrong_values_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--quick"]) == 2
    message = capsys.readouterr().err
    assert words[1].removeprefix("trained:") in message


@pytest.mark.parametrize(
    "words",
    [["--bogus"], ["--sizes", "many"], ["--sizes", "0"], ["--densities", "1.5"], ["--device", "x"]],
)
def test_wrong_options_exit_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda", "--quick"]) == 2
    assert "CUDA device" in capsys.readouterr().err


def test_quick_covers_every_op_in_seconds(tmp_path: Path) -> None:
    start = time.perf_counter()
    code, found = bench(into=tmp_path / "r.json")
    assert code == 0, found["refused"]
    assert time.perf_counter() - start < 60  # about 6 on two quiet cores
    wanted = {n for n, one in runner.registry().items() if (one.fixed_n or 0) < 1_000_000}
    assert {r["op"] for r in found["records"]} == wanted


def test_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedmap_sparse.bench", "--quick", "--ops", "unpack"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "unpack" in done.stdout
    assert "masked_scatter_" in done.stdout


@not_under("inference", reason=FROZEN)
@pytest.mark.parametrize("one", SMALL, ids=lambda one: one.op)
@pytest.mark.parametrize("kind", ["normal", "sorted"])
def test_cases_hold_and_count_their_bytes(one: case.Case, kind: str) -> None:
    for dtype in one.dtypes:
        trial = one.build(Setting(5001, one.densities[-1], dtype, inputs=kind))
        trial.check()
        assert trial.nbytes > 0
        trial.floor()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peers_do_the_same_work(dtype: torch.dtype) -> None:
    """A peer that computed something else would be no peer."""
    cases = runner.registry()
    rough = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for op in ("pack", "unpack", "masked_sgd", "masked_adamw", "accumulate"):
        trial = cases[op].build(Setting(4000, 0.25, dtype))
        ours = trial.ours()
        assert isinstance(ours, torch.Tensor)
        for name, peer in trial.peers.items():
            theirs = peer.run()
            assert isinstance(theirs, torch.Tensor)
            assert torch.allclose(ours, theirs.detach(), rtol=rough, atol=rough), (op, name)


def test_select_peers_find_the_threshold() -> None:
    setting = Setting(4000, 0.1)
    trial = runner.registry()["select"].build(setting)
    mask = trial.ours()
    assert isinstance(mask, Mask)
    values = setting.values()
    least = float(values.abs()[mask.to_bool()].min())
    found = {name: peer.run() for name, peer in trial.peers.items()}
    assert float(found["torch.topk"][0].min()) == least  # type: ignore[index]
    assert float(found["torch.kthvalue"][0]) == least  # type: ignore[index]
    assert "numpy partition" in found


def test_large_selections_are_checked_against_a_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmap_sparse.bench import expected

    monkeypatch.setattr(expected, "SORTABLE", 10)
    for kind in inputs.SYNTHETIC:
        values = inputs.values(kind, 3001)
        for keep in (1, 300, 3000, 3001):
            exact = ops.magnitude_mask(values, keep, backend="reference")
            assert expected.expected_mask(values, keep) == exact


def test_rice_positions_can_be_read_back() -> None:

    for density in (0.5, 0.1, 0.004):
        keep = np.random.default_rng(1).random(20_000) < density
        bits = np.unpackbits(formats.rice(np.flatnonzero(keep), keep.size)).tolist()
        golden = math.log((math.sqrt(5) - 1) / 2)
        low = max(0, 1 + math.floor(math.log2(golden / math.log(1 - keep.mean()))))
        at, found, last = 0, [], -1
        for _ in range(int(keep.sum())):
            quotient = bits.index(0, at) - at
            at += quotient + 1
            rest = int("".join(map(str, bits[at : at + low])) or "0", 2)
            at += low
            last += 1 + (quotient << low) + rest
            found.append(last)
        assert found == np.flatnonzero(keep).tolist()
        entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density))
        assert at < 1.06 * 20_000 * entropy


def test_messages_beside_other_formats(tmp_path: Path) -> None:
    code, found = bench("--ops", "encode_full", "--sizes", "40000", into=tmp_path / "r.json")
    assert code == 0
    (record,) = found["records"]
    peers = {name: p["payload_bytes"] for name, p in record["peers"].items()}
    kept = 4000
    assert peers["COO int32"] == 8 * kept
    assert peers["bitmap"] == 40_000 // 8 + 4 * kept
    assert record["payload_bytes"] < min(peers.values())
    for package, (name, _, _) in formats.OPTIONAL.items():
        assert (name in peers) is (importlib.util.find_spec(package) is not None)
    lines = found["header"].get("skipped", [])
    missing = [name for name in formats.OPTIONAL if not importlib.util.find_spec(name)]
    line = f"encode_full: not timed beside {', '.join(missing)}, not installed here"
    assert lines == ([line] if missing else [])


def test_weights_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from fedmap_sparse.experiments import checkpoint

    dense, epoch = torch.randn(70), torch.randint(0, 4, (70,), dtype=torch.uint8)
    mask = Mask.from_bool(epoch == 0)
    server = {"values": dense[epoch == 0], "mask": mask.words, "pruned_at": epoch}
    checkpoint.save(tmp_path / "checkpoint.safetensors", {"arms": {"fedmap": {"server": server}}})
    values, before = inputs.run(str(tmp_path))
    assert torch.equal(values, dense * (epoch == 0))
    assert torch.equal(before, (epoch == 0) | (epoch == 3))
    with pytest.raises(RuntimeError, match="expected a run's folder"):
        inputs.run(str(tmp_path / "none"))


@pytest.mark.parametrize("model", ["sgd_resnet20", "adamw_resnet20"])
def test_model_steps_hold_less_state(model: str) -> None:
    one = runner.registry()[model]
    held = []
    for density in (1.0, 0.1):
        trial = one.build(Setting(one.fixed_n or 0, density))
        trial.check()
        held.append(trial.state_bytes or 0)
    assert held[0] > 5 * held[1] > 0


def test_models_have_the_published_sizes() -> None:
    from fedmap_sparse.bench import models

    for build, size in models.MODELS.values():
        with torch.device("meta"):
            assert sum(p.numel() for p in build().parameters()) == size


def test_same_compares_bits() -> None:
    nan = torch.tensor([math.nan, 1.0])
    case.same("x", nan, nan.clone())
    with pytest.raises(case.CheckFailed, match=r"1 of 2 elements differ.*first at 1"):
        case.same("x", torch.tensor([1.0, -0.0]), torch.tensor([1.0, 0.0]))
    with pytest.raises(case.CheckFailed, match="expected 2 float32, got 1 float32"):
        case.same("x", torch.zeros(1), torch.zeros(2))


def test_turns_are_taken_over_rotating_sets() -> None:
    turns: list[str] = []

    def note(name: str, seconds: float = 0.0) -> Callable[[], None]:
        def run() -> None:
            time.sleep(seconds)
            turns.append(name)

        return run

    fast = timing.Contender("fast", [note("f0"), note("f1")])
    slow = timing.Contender("slow", [note("s", 0.02)], [note("reset")])
    timing.interleave([fast, slow], timing.Plan(10, 0.04, 2), torch.device("cpu"))
    warm_up, turns = turns[:4], turns[4:]
    assert warm_up == ["f0", "f1", "reset", "s"]
    assert len(fast.samples) == 10
    assert len(slow.samples) == 2
    short = ["f0", "f1"]  # once to wake the threads, once timed, each on another set
    assert turns == [*short, "reset", "s", *short * 5, "reset", "s", *short * 4]
    assert slow.quantile(0.5) > 0.02


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat on this system")
def test_load_of_others_is_noticed() -> None:
    load = runner.OtherLoad()
    spin = "import time; t = time.time()\nwhile time.time() - t < 1.5: pass"
    subprocess.run([sys.executable, "-c", spin], timeout=60, check=True)
    assert load.cpus() > 0.3


def test_touched_bytes() -> None:
    keep = torch.zeros(100, dtype=torch.bool)
    keep[[0, 15, 16, 99]] = True
    mask = Mask.from_bool(keep)
    assert floors.touched_bytes(mask, 4) == 3 * 64
    assert floors.touched_bytes(mask, 2) == 2 * 64


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution whose code must not run, with room for weights."""
    (tmp_path / "weights_here").mkdir()
    (tmp_path / "weights_here" / "__init__.py").write_text("raise SystemExit('imported')")
    info = tmp_path / "weights_here-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weights-here\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    inputs.trained.cache_clear()
    return tmp_path


def record(package: Path, *files: str) -> None:
    lines = "".join(f"weights_here/{f},,\n" for f in ("__init__.py", *files))
    (package / "weights_here-1.0.dist-info" / "RECORD").write_text(lines)


def test_trained_weights_are_read_not_run(package: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    first = {"b": torch.randn(30, 10), "a": torch.randn(50), "ids": torch.arange(9)}
    second, trap = torch.randn(2000), package / "sprung"
    save_file(first, package / "weights_here" / "a.safetensors")
    torch.save(
        {"w": second, "n": torch.tensor(3), "trap": Trap(str(trap))},
        package / "weights_here" / "b.pth",
    )
    record(package, "a.safetensors", "b.pth")
    weights = inputs.trained("weights-here")
    assert weights.numel() == 350 + 2000
    assert torch.equal(
        weights[:350].sort().values, torch.cat([first["a"], first["b"].view(-1)]).sort().values
    )
    assert torch.equal(weights[350:], second)
    assert not trap.exists()
    assert torch.equal(inputs.values("trained:weights-here", 100), weights[:100])
    assert runner.default_sizes("trained:weights-here", quick=False) == [2350]
    with pytest.raises(ValueError, match="expected at most 2350"):
        inputs.values("trained:weights-here", 2351)


def test_packages_without_weights(package: Path) -> None:
    record(package)
    with pytest.raises(RuntimeError, match="found none"):
        inputs.trained("weights-here")
    torch.save({"w": torch.zeros(5000, dtype=torch.float16)}, package / "weights_here" / "h.pt")
    record(package, "h.pt")
    with pytest.raises(RuntimeError, match="HalfStorage"):
        inputs.trained("weights-here")
    with pytest.raises(RuntimeError, match="pip install --no-deps not-there"):
        inputs.trained("not-there")
