"""Prune and regrow: the exchange, the mean over masks, and a run's messages."""

import math

import pytest
import torch
from experiment_runs import quick, records
from torch import nn

from fedmap_sparse import codec, flatten
from fedmap_sparse.experiments import runner
from fedmap_sparse.experiments.regrow import Plan, RegrowClient, RegrowServer, exchanged
from fedmap_sparse.federated import RoundFailed
from fedmap_sparse.mask import Mask

pytest.importorskip("safetensors", reason="safetensors is not installed")

PLAN = Plan(share=0.5, every=2, end=8)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 10), nn.ReLU(), nn.Linear(10, 4))


def server() -> RegrowServer:
    return RegrowServer(flatten(model()), 0.8, PLAN)


def client() -> RegrowClient:
    return RegrowClient(flatten(model()))


def test_the_share_falls_along_a_cosine_in_every_second_round() -> None:
    assert [PLAN.at(r) for r in (0, 1, 4, 8, 10)] == pytest.approx([0.5, 0, 0.25, 0, 0])


def test_the_model_is_sparse_from_the_start_by_erk() -> None:
    one = server()
    assert one.mask.nnz == 88  # a fifth of 440
    dense = one.mask.to_bool()
    first, second = (
        int(dense[e.offset : e.offset + e.numel].sum()) for e in one.layout.prunable_entries
    )
    assert second / 40 > 2 * first / 400


def test_the_smallest_go_and_those_of_the_largest_gradient_come() -> None:
    params = flatten(nn.Linear(4, 2, bias=False))
    layout = params.layout
    values, gradient, kept = (torch.zeros(layout.prunable_numel) for _ in range(3))
    kept[:4] = 1
    values[:4] = torch.tensor([3.0, -1.0, 2.0, -4.0])
    gradient[:8] = torch.tensor([9.0, 9.0, 9.0, 9.0, 0.1, -0.5, 0.2, 0.0])
    found = exchanged(values, gradient, Mask.from_bool(kept.bool()), layout, 0.5)
    assert found.to_bool()[:8].tolist() == [True, False, False, True, False, True, True, False]


def moved(one: RegrowClient, data: bytes, seed: int) -> RegrowClient:
    """A client after an exchange by a gradient that is drawn."""
    one.receive(data)
    torch.manual_seed(seed)
    for p in one.params.parameters:
        p.grad = torch.randn_like(p)
    one._make_optimizer = lambda params, mask, lr: None  # type: ignore[assignment,return-value]
    one.move(0.5, None)
    return one


def test_a_weight_is_averaged_over_the_clients_that_have_it() -> None:
    one = server()
    one.begin_round()
    data = one.broadcast()
    clients = [moved(client(), data, seed) for seed in (1, 2)]
    for k, each in enumerate(clients):
        with torch.no_grad():
            each.params.prunable.mul_(1 + k)
            each.params.prunable[each.params.mask.to_bool()] += 0.01 * (1 + k)
    before = [each.params.prunable.detach().clone() for each in clients]
    masks = [each.params.mask.to_bool() for each in clients]
    assert not torch.equal(masks[0], masks[1])
    updates = [(k, each.update(10 * (1 + k))) for k, each in enumerate(clients)]
    assert all("MASK" in {s.name for s in codec.inspect(d).sections} for _, d in updates)
    result = one.aggregate(updates)
    assert result.accepted == (0, 1)
    weight = 10 * masks[0] + 20 * masks[1]
    mean = (10 * before[0].double() + 20 * before[1].double()) / weight.clamp(min=1)
    kept = one.mask.to_bool()
    assert one.mask.nnz == 88
    assert not kept[weight == 0].any()
    assert torch.equal(one.params.prunable[kept], mean.float()[kept])
    for entry in one.layout.prunable_entries:
        own = slice(entry.offset, entry.offset + entry.numel)
        out = mean[own][~kept[own]].abs().max()
        assert mean[own][kept[own]].abs().min() >= out
    one.begin_round()
    again = clients[0].receive(one.broadcast(clients[0].have))
    assert again.mask == one.mask


def test_foreign_answers_are_refused_and_named() -> None:
    one, other = server(), server()
    one.begin_round()
    with torch.no_grad():
        other.params.prunable.mul_(2)
    other.begin_round()
    stray = client()
    stray.receive(other.broadcast())
    with pytest.raises(RoundFailed, match="at least 1 usable updates, got 0"):
        one.aggregate([(3, stray.update(5))])
    good = client()
    good.receive(one.broadcast())
    result = one.aggregate([(1, good.update(5)), (3, stray.update(5))])
    assert result.accepted == (1,)
    assert "this round's broadcast" in result.refused[3]


def test_a_run_keeps_its_density_and_moves_its_mask(tmp_path):  # type: ignore[no-untyped-def]
    runner.run(quick(tmp_path, method="feddst", target=0.8, regrow_every=2, baseline=False))
    found = records(tmp_path)
    assert {r["density"] for r in found} == {found[0]["density"]}
    assert found[0]["density"] == pytest.approx(0.2, abs=1e-4)
    masks = [r["bytes"].get("uplink mask", 0) for r in found]
    assert masks[0] > 0
    assert masks[1] == 0
    assert math.isclose(sum(found[0]["bytes"].values()), sum(
        found[0][k] for k in ("uplink_bytes", "downlink_bytes")
    ))  # fmt: skip
