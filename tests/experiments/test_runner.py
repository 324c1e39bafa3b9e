"""Runs on scikit-learn's digits: what they write, and that a killed one ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmap_sparse import codec
from fedmap_sparse.engines.in_process import generator
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import arm as arm_module
from fedmap_sparse.experiments import checkpoint, runner, training
from fedmap_sparse.experiments.config import Config, build
from fedmap_sparse.experiments.data import Dataset, Split, load
from fedmap_sparse.experiments.models import mlp
from fedmap_sparse.experiments.partition import iid
from fedmap_sparse.experiments.progress import Bar, Lines, Observer
from fedmap_sparse.federated import RoundFailed

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

ROOT = Path(__file__).parent.parent.parent


def quick(out: Path, **options: Any) -> Config:
    """Two seconds at most; one thread, as the tensors are tiny."""
    small = {"dataset": "digits", "model": "mlp", "clients": 4, "rounds": 4, "batch_size": 64}
    return build({**small, "threads": 1, "out": str(out), **options})


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records(out)]


def same_results(one: Path, other: Path) -> None:
    """Everything but seconds, bit for bit."""
    assert timeless(one) == timeless(other)
    for name in ("model.safetensors", "broadcast.fedmap"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [checkpoint.load(out / "checkpoint.safetensors")["arms"] for out in (one, other)]
    for arms in states:
        for arm in arms.values():
            for _, client in arm["clients"]:
                # A kept optimizer follows a new mask at its next step, a loaded one at once.
                client["optimizer"] = client["optimizer"] is not None
    _same(states[0], states[1])
    timed = {"seconds", "phases", "overhead"}
    kept = []
    for out in (one, other):
        summary = json.loads((out / "summary.json").read_text())
        kept.append(
            {n: {k: v for k, v in arm.items() if k not in timed} for n, arm in summary.items()}
        )
    assert kept[0] == kept[1]


def _same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            _same(a, b)
    else:
        assert one == other


class StopAfter(Observer):
    """Interrupts a run as Ctrl-C would, once so many rounds have ended."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def round(self, record: dict[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_run_writes_what_it_says(tmp_path: Path) -> None:
    config = quick(tmp_path / "a")
    summary = runner.run(config)
    out = config.folder
    assert {p.name for p in out.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "checkpoint.safetensors",
        "broadcast.fedmap",
        "model.safetensors",
        "model-dense.safetensors",
        "checkpoint.previous.safetensors",
        ".lock",
    }
    assert json.loads((out / "summary.json").read_text()) == summary
    assert list(summary) == ["fedmap", "dense"]
    lines = records(out)
    assert [(r["arm"], r["round"]) for r in lines] == [
        (arm, round) for arm in ("fedmap", "dense") for round in range(4)
    ]
    wanted = {"accuracy", "loss", "density", "survivors", "prunable", "uplink_bytes"}
    wanted |= {"downlink_bytes", "seconds", "rounds", "seed"}
    for name, arm in summary.items():
        own = [r for r in lines if r["arm"] == name]
        assert wanted <= arm.keys()
        assert arm["uplink_bytes"] == sum(r["uplink_bytes"] for r in own)
        assert arm["downlink_bytes"] == sum(r["downlink_bytes"] for r in own)
        assert arm["seconds"] == pytest.approx(sum(r["seconds"]["total"] for r in own))
        assert (arm["rounds"], arm["seed"], arm["prunable"]) == (4, 0, 54_800)
        phases = {"select", "encode", "decode", "batch", "train", "step", "aggregate", "evaluate"}
        assert phases | {"save", "total"} == arm["phases"].keys()
        total = arm["phases"]["total"]
        assert 0.5 * total < sum(arm["phases"].values()) - total <= total
        busy = arm["phases"]["train"] + arm["phases"]["evaluate"]
        assert arm["overhead"] == pytest.approx(1 - busy / total)
    assert summary["fedmap"]["survivors"] == 5_480
    assert summary["fedmap"]["density"] == 0.1
    assert summary["dense"]["survivors"] == 54_800
    assert summary["fedmap"]["uplink_bytes"] < summary["dense"]["uplink_bytes"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_file_is_a_state_dict_with_the_survivors(tmp_path: Path) -> None:
    config = quick(tmp_path, baseline=False)
    summary = runner.run(config)
    model = mlp((1, 8, 8), 10)
    model.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    accuracy, loss, _ = training.evaluate(model, load("digits").test)
    assert accuracy == summary["fedmap"]["accuracy"]
    assert loss == pytest.approx(summary["fedmap"]["loss"])
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    assert int((weights != 0).sum()) <= summary["fedmap"]["survivors"]


def test_the_saved_broadcast_is_the_last_one_and_self_contained(tmp_path: Path) -> None:
    runner.run(quick(tmp_path, baseline=False))
    found = codec.inspect((tmp_path / "broadcast.fedmap").read_bytes())
    assert found.header.round == 3
    assert found.survivors == 5_480
    assert "MASK" in {s.name for s in found.sections}
    assert found.meta["lr"] == 0.05


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        runner.run(quick(tmp_path / name, seed=seed, rounds=2, baseline=False))
    same_results(tmp_path / "a", tmp_path / "b")
    assert timeless(tmp_path / "a") != timeless(tmp_path / "c")


def test_a_run_leaves_random_state_and_threads_alone(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    runner.run(quick(tmp_path, rounds=1, baseline=False))
    assert torch.equal(torch.rand(3), wanted)
    assert torch.get_num_threads() == 2


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


@pytest.mark.parametrize("options", [{}, STATEFUL, {"model": "resnet8", "optimizer": "adamw"}])
@pytest.mark.parametrize("stop", [(1,), (3, 2)])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    options: dict[str, Any], stop: tuple[int, ...], tmp_path: Path
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


class Custom(nn.Module):
    """Batch normalisation (buffers), dropout (random draws) and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.middle = nn.Linear(32, 32)
        self.again = self.middle
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.norm(self.first(x.flatten(1)))), 0.2, self.training)
        return self.last(torch.relu(self.again(torch.relu(self.middle(x)))))  # type: ignore[no-any-return]


def test_what_a_module_draws_resumes_too(tmp_path: Path) -> None:
    whole, parts = (quick(tmp_path / name, rounds=3) for name in ("whole", "parts"))
    runner.run(whole, model=Custom)
    with pytest.raises(KeyboardInterrupt):
        runner.run(parts, model=Custom, observer=StopAfter(2))
    runner.run(parts, model=Custom, resume=True)
    same_results(whole.folder, parts.folder)


def two_classes() -> Dataset:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 2, 300))
    images = torch.from_numpy(rng.normal(size=(300, 1, 8, 8)).astype(np.float32))
    images += labels[:, None, None, None] * 0.5
    parts = [Split(images[a:b], labels[a:b]) for a, b in ((0, 200), (200, 250), (250, 300))]
    return Dataset("made up", 2, parts[0], parts[1], parts[2], "made up")


def test_any_module_and_any_data(tmp_path: Path) -> None:
    torch.manual_seed(3)
    instance = Custom()
    before = [p.detach().clone() for p in instance.parameters()]
    config = quick(tmp_path / "a", rounds=4, target=0.5, local_epochs=4, batch_size=10)
    summary = runner.run(config, model=instance, data=two_classes())
    assert summary["fedmap"]["accuracy"] > 0.8
    assert summary["fedmap"]["prunable"] == 64 * 32 + 32 * 32 + 32 * 10
    assert summary["fedmap"]["survivors"] == summary["fedmap"]["prunable"] // 2
    for old, p in zip(before, instance.parameters()):
        assert torch.equal(old, p), "the caller's module is copied, not trained"
    text = (tmp_path / "a" / "config.toml").read_text()
    assert text.startswith("# from Python, whatever is said below: model Custom, data made up\n")
    made = runner.run(quick(tmp_path / "b", rounds=1), model=Custom, data=two_classes())
    assert made["dense"]["prunable"] == summary["dense"]["prunable"]


def test_dense_is_plain_fedavg(tmp_path: Path) -> None:
    """FedAvg in plain torch: state dicts, the step and the mean in the stated arithmetic."""
    config = quick(
        tmp_path, rounds=3, schedule="dense", weight_decay=0.01, local_epochs=2, batch_size=40
    )
    assert config.lr == 0.05
    assert config.momentum == 0.9
    summary = runner.run(config)
    assert list(summary) == ["dense"]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = load("digits")
    torch.manual_seed(0)
    model = mlp(data.shape, 10)
    parts = [torch.from_numpy(p) for p in iid(data.train.labels.numpy(), 4, seed=0)]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for round in range(3):
        answers = []
        for client, part in enumerate(parts):
            model.load_state_dict(state)
            images, labels = data.train.images[part], data.train.labels[part]
            rng = generator(0, 1, round, client)
            rng.integers(2**63)  # torch's seed, which a model without dropout does not use
            momenta: dict[str, Tensor] = {}
            for _ in range(2):
                for chosen in torch.from_numpy(rng.permutation(len(part))).split(40):
                    model.zero_grad()
                    F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                    with torch.no_grad():
                        for name, p in model.named_parameters():
                            assert p.grad is not None
                            g = p.grad + 0.01 * p
                            m = 0.9 * momenta[name] + g if name in momenta else g
                            momenta[name] = m
                            p.copy_(p - 0.05 * m)
            answers.append({name: t.clone() for name, t in model.state_dict().items()})
        total = sum(map(len, parts))
        state = {
            name: (sum(len(p) * a[name].double() for p, a in zip(parts, answers)) / total).float()
            for name in state
        }
    torch.set_num_threads(threads)
    found = safetensors.load_file(tmp_path / "model.safetensors")
    assert found.keys() == state.keys()
    for name, t in state.items():
        assert torch.equal(found[name].view(torch.int32), t.view(torch.int32)), name


def test_validation_each_round_and_test_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    evaluate = training.evaluate

    def spy(module: nn.Module, split: Split) -> training.Evaluation:
        seen.append(len(split))
        return evaluate(module, split)

    monkeypatch.setattr(arm_module, "evaluate", spy)
    runner.run(quick(tmp_path, rounds=3))
    assert seen == [140, 140, 140, 355] * 2


def test_the_arms_start_alike(tmp_path: Path) -> None:
    runner.run(quick(tmp_path, rounds=3, participation=0.5, dropout=0.3, seed=4))
    fedmap, dense = records(tmp_path)[:3], records(tmp_path)[3:]
    for one, other in zip(fedmap, dense):
        assert (one["cohort"], one["dropped"]) == (other["cohort"], other["dropped"])
    for key in ("accuracy", "loss", "train_loss"):
        assert fedmap[0][key] == dense[0][key]  # nothing is pruned in the first round


def test_a_diverging_run_fails_with_reasons(tmp_path: Path) -> None:
    with pytest.raises(RoundFailed, match=r"at least 1 usable updates, got 0 .*expected finite"):
        runner.run(quick(tmp_path, lr=1e30))


def test_without_matplotlib_a_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    runner.run(quick(tmp_path, rounds=1, baseline=False), observer=Lines())
    assert (tmp_path / "summary.json").exists()
    assert not (tmp_path / "curves.png").exists()
    assert "pip install 'fedmap-sparse[plots]'" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [Lines, Bar])
def test_progress_shows_accuracy_density_and_bytes(
    kind: type[Lines], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind is Bar:
        pytest.importorskip("rich", reason="rich is not installed")
    watch = kind()
    runner.run(quick(tmp_path, rounds=2, dropout=0.4, seed=2), observer=watch)
    watch.close()
    text = capsys.readouterr().out
    for expected in ("accuracy", "density 10.00%", "kB", "no answer from", "test accuracy", "2/2"):
        assert expected in text, expected
    assert "not forward, backward, evaluation" in text


def test_impossible_options_are_found_before_the_folder(tmp_path: Path) -> None:
    for options, message in (
        ({"clients": 5000}, "partition=iid: clients must be from 1 to the 1302 samples"),
        ({"device": "cuda:77"}, "device: expected one that torch has here, got 'cuda:77'"),
        ({"device": "toaster"}, "device: expected one that torch has here, got 'toaster'"),
    ):
        with pytest.raises(ConfigError, match=message):
            runner.run(quick(tmp_path / "x", **options))
        assert not (tmp_path / "x").exists()


def test_checkpoints_hold_any_tree_and_share_equal_tensors(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    big = torch.arange(1000, dtype=torch.int32)
    state = {
        "a": [big, big.clone(), {"b": torch.tensor(2.5, dtype=torch.bfloat16)}],
        "n": [1, 2.5, True, None, "text", 1e-300],
        "empty": torch.empty(0),
        "floats": big.view(torch.float32),
    }
    checkpoint.save(path, state)
    _same(checkpoint.load(path), state)
    assert path.stat().st_size < 3 * 4000
    with pytest.raises(TypeError, match=r"x: expected plain values and tensors, got set"):
        checkpoint.save(path, {"x": {1}})
    with pytest.raises(TypeError, match="expected keys that are text"):
        checkpoint.save(path, {"x": {1: 2}})
    _same(checkpoint.load(path), state)


def test_a_write_that_fails_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"before")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    safetensors.save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(checkpoint.CheckpointError, match="it has no checksum"):
        checkpoint.load(path)
    checkpoint.save(path, {"x": torch.zeros(3)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.load(path)
