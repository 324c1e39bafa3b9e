"""Pruning at start: scores are those of plain torch, and they cost messages."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from experiment_runs import quick, records
from torch import nn

from fedmap_sparse import flatten
from fedmap_sparse.experiments import runner, snip
from fedmap_sparse.experiments.data import Split

pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def test_scores_are_the_mean_saliency_over_clients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    parts = [
        Split(torch.randn(n, 1, 4, 4), torch.randint(0, 3, (n,))) for n in (5, 300)
    ]  # fmt: skip
    config = quick(tmp_path, clients=2, method="snip")
    scores, done = snip.ask(model, config, dict(enumerate(parts)))
    wanted = torch.zeros(16 * 8 + 8 * 3)
    for part in parts:
        own = copy.deepcopy(model)
        F.cross_entropy(own(part.images), part.labels).backward()
        weights = [p for p in own.parameters() if p.dim() > 1]
        each = torch.cat([(p * p.grad).abs().flatten() for p in weights])  # type: ignore[operator]
        wanted += len(part) / 305 * each.detach()
    assert torch.allclose(scores, wanted, rtol=1e-4, atol=1e-8)
    assert done.uplink_bytes > 2 * 4 * len(wanted) * 0.8
    plain = flatten(copy.deepcopy(model))
    assert plain.layout.eligible == len(wanted)


def test_a_run_is_pruned_once_before_round_0(tmp_path: Path) -> None:
    runner.run(quick(tmp_path, method="snip", target=0.9))
    found = [r for r in records(tmp_path) if r["arm"] == "snip"]
    assert [r["keep"] for r in found] == [5_480] * 4
    assert found[0]["uplink_bytes"] > 4 * found[1]["uplink_bytes"]
    assert sum(found[0]["bytes"].values()) == sum(
        found[0][key] for key in ("uplink_bytes", "downlink_bytes")
    )


def test_other_data_give_another_mask(tmp_path: Path) -> None:
    for name, partition in (("a", "iid"), ("b", "pathological")):
        runner.run(quick(tmp_path / name, method="snip", partition=partition, baseline=False))
    one, other = (records(tmp_path / name)[0]["layers"] for name in "ab")
    assert one != other
