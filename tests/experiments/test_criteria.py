"""Criteria: how many weights each layer keeps, and which ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedmap_sparse as fs
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import runner
from fedmap_sparse.experiments.config import build
from fedmap_sparse.experiments.criteria import CRITERIA, at_least
from fedmap_sparse.federated import Criterion
from fedmap_sparse.schedule import OneShot

SIZES = {"0.weight": 8 * 100, "1.weight": 50 * 8, "2.weight": 4 * 50}


def pruned(criterion: Criterion | None, keep: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before, and what one pruning keeps, by name."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(100, 8, bias=False), nn.Linear(8, 50, bias=False), nn.Linear(50, 4, bias=False)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    schedule = OneShot(1 - keep / 1400, at=0)
    server = fs.FedMapServer(fs.flatten(model), schedule, criterion=criterion)
    server.begin_round()
    assert server.mask.nnz == keep
    return before, server.layout.mask_dict(server.mask)


def counts(kept: dict[str, Tensor]) -> list[int]:
    return [int(kept[name].sum()) for name in SIZES]


def test_layerwise_gives_every_layer_the_same_density() -> None:
    before, kept = pruned(CRITERIA["layerwise"], 350)
    assert counts(kept) == [200, 100, 50]
    for name, weights in before.items():
        assert weights[kept[name]].abs().min() >= weights[~kept[name]].abs().max()


def test_erk_follows_its_formula_and_fills_small_layers() -> None:
    _, kept = pruned(CRITERIA["erk"], 220)
    # sum(shape) is 108, 58 and 54: 220 weights in proportion.
    assert counts(kept) == [108, 58, 54]
    _, kept = pruned(CRITERIA["erk"], 900)
    assert counts(kept)[2] == 200  # all of it; the rest in the proportion 108 : 58
    assert counts(kept)[0] == pytest.approx(700 * 108 / 166, abs=1)


def test_fan_in_undoes_the_scale_of_initial_weights() -> None:
    _, plain = pruned(None, 350)
    _, kept = pruned(CRITERIA["fan_in"], 350)
    assert counts(plain)[0] < 40  # of 800: the layer of the smallest weights loses nearly all
    assert counts(kept) == pytest.approx([200, 100, 50], abs=25)


def test_random_is_drawn_and_repeatable() -> None:
    _, one = pruned(CRITERIA["random"], 350)
    _, other = pruned(CRITERIA["random"], 350)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert counts(one) == pytest.approx([200, 100, 50], abs=35)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_layer_keeps_its_least_density(name: str) -> None:
    before, kept = pruned(at_least(0.1, CRITERIA[name]), 145)
    assert all(found >= size // 10 for found, size in zip(counts(kept), SIZES.values()))
    if name == "magnitude":
        for layer, weights in before.items():
            assert weights[kept[layer]].abs().min() >= weights[~kept[layer]].abs().max()


@pytest.mark.parametrize("name", CRITERIA)
def test_runs_with_each_criterion_resume_to_the_same_bits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    options: dict[str, Any] = {"dataset": "digits", "model": "mlp", "clients": 2, "rounds": 4}
    options |= {"threads": 1, "baseline": False, "batch_size": 200, "criterion": name}
    options |= {"min_layer_density": 0.02}
    whole, parts = (build({**options, "out": str(tmp_path / n)}) for n in ("whole", "parts"))
    summary = runner.run(whole)
    assert summary["fedmap"]["survivors"] == 5_480
    assert min(summary["fedmap"]["layers"].values()) >= 0.0199

    class Stop(runner.Observer):
        def round(self, record: dict[str, Any]) -> None:
            if record["round"] == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(parts, observer=Stop())
    runner.run(parts, resume=True)
    files = [path / "model.safetensors" for path in (whole.folder, parts.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_least_density_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_layer_density: expected at most 0\.1, the"):
        build({"min_layer_density": 0.2})
    with pytest.raises(ConfigError, match="criterion: goes with schedule="):
        build({"schedule": "dense", "criterion": "erk"})
