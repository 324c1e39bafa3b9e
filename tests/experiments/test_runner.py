"""Runs on scikit-learn's digits: what they write, measure and leave alone."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from experiment_runs import StopAfter, quick, records, same_results, timeless
from torch import Tensor, nn

from fedmap_sparse import codec
from fedmap_sparse.engines.in_process import generator
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import arm as arm_module
from fedmap_sparse.experiments import runner, training
from fedmap_sparse.experiments.data import Dataset, Split, load
from fedmap_sparse.experiments.models import mlp
from fedmap_sparse.experiments.partition import iid
from fedmap_sparse.experiments.progress import Bar, Lines
from fedmap_sparse.federated import RoundFailed

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


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


def test_batches_evaluated_at_once_are_as_one_after_another() -> None:
    split = load("digits").train
    model = mlp((1, 8, 8), 10)
    one, other = (training.evaluate(model, split, at_once) for at_once in (1, 3))
    assert one[:2] == other[:2]
    assert torch.equal(one.right, other.right)


def test_validation_each_round_and_test_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    evaluate = training.evaluate

    def spy(module: nn.Module, split: Split, at_once: int) -> training.Evaluation:
        seen.append(len(split))
        return evaluate(module, split, at_once)

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


class StopArm(Lines):
    """Stops the first arm after two rounds, and looks at the model."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def round(self, record: dict[str, object]) -> None:
        assert self.module is not None
        self.seen.append(next(self.module.parameters()).detach().clone())
        self.stop = record["arm"] == "fedmap" and record["round"] == 1


def test_an_observer_sees_the_model_and_may_stop_an_arm(tmp_path: Path) -> None:
    watch = StopArm()
    summary = runner.run(quick(tmp_path), observer=watch)
    assert (summary["fedmap"]["rounds"], summary["dense"]["rounds"]) == (2, 4)
    assert len(watch.seen) == 6
    assert not torch.equal(watch.seen[0], watch.seen[1])
    assert runner.run(quick(tmp_path), resume=True)["fedmap"]["rounds"] == 4


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((self.folder, name, value, step))

        def flush(self) -> None:
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    runner.run(quick(tmp_path, tensorboard=True, rounds=2))
    values = {(f, n, s): v for f, n, v, s in written}
    for record in records(tmp_path):
        place = str(tmp_path / "tensorboard" / record["arm"])
        assert values[place, "accuracy", record["round"]] == record["accuracy"]
        assert values[place, "layers/1.weight", record["round"]] == record["layers"]["1.weight"]


def test_without_tensorboard_a_run_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedmap-sparse\[tensorboard\]'"):
        runner.run(quick(tmp_path / "out", tensorboard=True))
    assert not (tmp_path / "out").exists()


def test_processes_give_the_bits_of_one_after_another(tmp_path: Path) -> None:
    options = {"model": "cnn", "batch_size": 200, "rounds": 3, "baseline": False, "dropout": 0.2}
    options |= {"clients": 5, "participation": 0.8, "keep_optimizer": True, "uplink_dtype": "int8"}
    alone, together = (quick(tmp_path / f"{n}", processes=n, **options) for n in (1, 2))
    runner.run(alone)
    with pytest.raises(KeyboardInterrupt):
        runner.run(together, observer=StopAfter(2))
    runner.run(quick(together.folder, processes=1, **options), resume=True)
    same_results(alone.folder, together.folder)
    assert "wait" in records(together.folder)[0]["seconds"]


def test_an_adaptive_run_that_ends_short_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = quick(tmp_path, schedule="adaptive", settled=0.001, baseline=False)
    summary = runner.run(config, observer=Lines())
    assert summary["fedmap"]["density"] == 1.0
    assert "warning: FedMap: pruned 0.0% instead of 90.0%" in capsys.readouterr().out
