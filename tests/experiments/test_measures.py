"""Where weights are left and how clients fare, beside counts that a reader can check by eye."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedmap_sparse as fs
from fedmap_sparse.experiments import measures, runner
from fedmap_sparse.experiments.config import build
from fedmap_sparse.experiments.data import Split, draw_out
from fedmap_sparse.experiments.progress import Lines

CPU = torch.device("cpu")


def test_survivors_of_each_layer_are_counted() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 10, bias=False))
    params = fs.flatten(model)
    mask = fs.ops.magnitude_mask(params.prunable, 20, within=params.mask)
    found = measures.layer_survivors(params.layout, mask)
    kept = {name: int(keep.sum()) for name, keep in params.layout.mask_dict(mask).items()}
    assert found == kept
    assert sum(found.values()) == 20


@pytest.mark.parametrize(
    ("left", "said"),
    [(0, "dead: 0 of 40"), (1, "starving: 1 of 40"), (9, "starving: 9 of 40"), (10, None)],
)
def test_a_layer_with_fewer_weights_than_outputs_starves(left: int, said: str | None) -> None:
    layout = fs.flatten(nn.Linear(4, 10, bias=False)).layout
    lines = measures.starving(layout, {"weight": left})
    if said is None:
        assert lines == {}
    else:
        assert f"weight is {said} weights left for 10 outputs" == lines["weight"]


def test_a_run_says_once_which_layer_starves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    options: dict[str, Any] = {"dataset": "digits", "model": "mlp", "clients": 2, "rounds": 3}
    options |= {"threads": 1, "target": 0.999, "baseline": False, "out": str(tmp_path)}
    summary = runner.run(build(options), observer=Lines())
    lines = [t for t in capsys.readouterr().out.splitlines() if "weights left for" in t]
    logged = [t for t in lines if "round " in t]
    assert len(logged) == len(summary["fedmap"]["starving"]) > 0
    assert len(lines) == 2 * len(logged)  # in the log, and in the summary at the end
    records = [json.loads(t) for t in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["starving"] == {}
    assert records[0]["layers"] == dict.fromkeys(records[0]["layers"], 1.0)
    sizes = {"1.weight": 12_800, "3.weight": 40_000, "5.weight": 2_000}
    last = records[-1]["layers"]
    assert round(sum(last[name] * n for name, n in sizes.items())) == summary["fedmap"]["survivors"]


def split(labels: list[int]) -> Split:
    return Split(torch.zeros(len(labels), 1, 1, 1), torch.tensor(labels))


class Says(nn.Module):
    """Answers with what its samples hold."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x.flatten().long(), 3).float()


def test_a_client_without_samples_of_its_own_has_the_accuracy_of_its_mix() -> None:
    train = split([0, 0, 0, 1, 2])
    parts = [np.array([0, 1, 2, 3]), np.array([4])]
    measure = measures.ClientAccuracy(train, parts, [parts[0][:0]] * 2, 3, CPU)
    validation = split([0, 0, 1, 1, 1, 1, 2])
    right = torch.tensor([True, True, True, False, False, False, False])
    found = measure(nn.Identity(), validation, right)
    first = 3 / 4 * 1.0 + 1 / 4 * 0.25
    assert found["mean"] == pytest.approx(first / 2)
    assert found["std"] == pytest.approx(first / 2)
    assert (found["worst"], found["worst_client"]) == (0.0, 1)


def test_a_class_that_validation_lacks_is_not_measured() -> None:
    parts = [np.array([0, 1]), np.array([2])]
    measure = measures.ClientAccuracy(split([0, 2, 2]), parts, [parts[0][:0]] * 2, 3, CPU)
    found = measure(nn.Identity(), split([0, 0]), torch.tensor([True, False]))
    assert (found["mean"], found["std"], found["worst"], found["worst_client"]) == (0.5, 0, 0.5, 0)
    nobody = measures.ClientAccuracy(split([2]), [np.array([0])], [np.array([], int)], 3, CPU)
    assert nobody(nn.Identity(), split([0]), torch.tensor([True]))["mean"] is None


def test_own_samples_are_what_a_client_is_measured_on() -> None:
    labels = [0, 1, 2, 0, 1, 2]
    images = torch.tensor([0, 1, 2, 1, 1, 0.0]).reshape(6, 1, 1, 1)
    parts, held = [np.array([0]), np.array([3])], [np.array([1, 2]), np.array([4, 5])]
    measure = measures.ClientAccuracy(Split(images, torch.tensor(labels)), parts, held, 3, CPU)
    assert measure.on == "each client's held-out samples"
    found = measure(Says(), split([0]), torch.tensor([False]))
    assert found == {
        "mean": 0.75, "std": 0.25, "worst": 0.5, "q25": 0.625, "median": 0.75, "q75": 0.875,
        "best": 1.0, "worst_client": 1,
    }  # fmt: skip


def test_held_out_samples_are_stratified_seeded_and_never_trained_on() -> None:
    labels = np.repeat([0, 1, 2], [50, 20, 1])
    part = np.arange(71)
    (stay,), (held,) = measures.hold_out([part], labels, 0.2, seed=4)
    assert sorted([*stay, *held]) == part.tolist()
    assert np.bincount(labels[held], minlength=3).tolist() == [10, 4, 0]
    (_,), (again,) = measures.hold_out([part], labels, 0.2, seed=4)
    (_,), (other,) = measures.hold_out([part], labels, 0.2, seed=5)
    assert np.array_equal(held, again)
    assert not np.array_equal(held, other)
    (all_,), (none,) = measures.hold_out([part], labels, 0.0, seed=4)
    assert (len(all_), len(none)) == (71, 0)


def test_what_is_drawn_out_is_not_the_tail_of_a_file() -> None:
    labels = np.zeros(1000, int)
    _, held = draw_out(labels, lambda n: n // 10, np.random.default_rng(0))
    assert len(held) == 100
    assert 30 < np.sum(held < 500) < 70


def test_over_rounds() -> None:
    found = measures.over_rounds([0.1, 0.9, 0.5, 0.6, 0.7])
    assert found["validation_accuracy"] == 0.7
    assert found["validation_last_mean"] == pytest.approx(0.6)
    assert (found["validation_best"], found["validation_best_round"]) == (0.9, 1)
    assert measures.over_rounds([0.4])["validation_last_mean"] == 0.4


def test_a_run_with_holdout_trains_on_fewer_samples(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    options: dict[str, Any] = {"dataset": "digits", "model": "mlp", "clients": 3, "rounds": 1}
    options |= {"threads": 1, "baseline": False, "partition": "dirichlet", "holdout": 0.2}
    summary = runner.run(build({**options, "out": str(tmp_path)}))
    clients = summary["fedmap"]["clients"]
    assert clients["on"] == "each client's held-out samples"
    assert 0 <= clients["worst"] <= clients["mean"] <= 1
