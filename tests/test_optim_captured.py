"""A step that a CUDA graph captures: on a CPU what a replay repeats is called again by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedAdamW, MaskedSGD, captured

MAKE: dict[str, Callable[..., Any]] = {
    "sgd": lambda flat, **kw: MaskedSGD(flat, **{"lr": 0.1, "momentum": 0.9, **kw}),
    "adamw": lambda flat, **kw: MaskedAdamW(flat, **{"lr": 0.01, "amsgrad": True, **kw}),
}


def model() -> tuple[nn.Module, fs.FlatParameters]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 5))
    flat = fs.flatten(net)
    flat.mask = fs.ops.prune_(flat.prunable, 400, within=flat.mask)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return net, flat


@pytest.mark.parametrize("kind", MAKE)
def test_replays_are_steps(kind: str) -> None:
    _, flat = model()
    _, other = model()
    lr = torch.tensor(0.1)
    ours = MAKE[kind](flat, lr=lr, capturable=True)
    theirs = MAKE[kind](other, lr=0.1)
    for optimizer in (ours, theirs):
        optimizer.step()
    for number in range(6):
        now = 0.1 / (1 + number)
        lr.fill_(now)
        theirs.param_groups[0]["lr"] = now
        captured.record(ours)
        theirs.step()
    # The powers of the betas are products here, rounded six times in float64.
    torch.testing.assert_close(flat.values, other.values, rtol=1e-6, atol=1e-7)
    assert flat.prunable[~flat.mask.to_bool()].eq(0).all()
    a, b = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert a.keys() == b.keys()
    for number in a:
        assert a[number].get("step") == b[number].get("step")
    # The host goes on from there, and a mask that shrinks wants another capture.
    for optimizer in (ours, theirs):
        optimizer.step()
    torch.testing.assert_close(flat.values, other.values, rtol=1e-6, atol=1e-7)
    flat.mask = fs.ops.prune_(flat.prunable, 100, within=flat.mask)
    with pytest.raises(RuntimeError, match="expected a step before a CUDA graph is captured"):
        captured.record(ours)
    ours.step()
    captured.record(ours)
    assert flat.prunable[~flat.mask.to_bool()].eq(0).all()


def test_what_cannot_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, flat = model()
    plain = MAKE["sgd"](flat)
    plain.step()
    monkeypatch.setattr("fedmap_sparse.optim.optimizer.capturing", lambda device: True)
    before = flat.values.clone()
    with pytest.raises(RuntimeError, match="expected capturable=True"):
        plain.step()
    fresh = MAKE["sgd"](flat, capturable=True)
    with pytest.raises(RuntimeError, match="expected a step before"):
        fresh.step()
    monkeypatch.undo()
    fresh.step()
    before = flat.values.clone()
    monkeypatch.setattr("fedmap_sparse.optim.optimizer.capturing", lambda device: True)
    fresh.found_inf = torch.zeros(())
    with pytest.raises(RuntimeError, match="expected no GradScaler"):
        fresh.step()
    assert torch.equal(flat.values, before)


def test_momentum_that_begins_is_no_repetition() -> None:
    net, flat = model()
    gradient, net[1].weight.grad = net[1].weight.grad, None
    ours = MAKE["sgd"](flat, capturable=True)
    ours.step()
    net[1].weight.grad = gradient
    before = flat.values.clone()
    with pytest.raises(RuntimeError, match="whose momentum begins with this step"):
        captured.record(ours)
    assert torch.equal(flat.values, before)
    ours.step()
    captured.record(ours)
    assert not torch.equal(flat.values, before)


def test_steps_do_not_wait_for_replays_where_no_graph_was_captured() -> None:
    _, flat = model()
    ours = MAKE["sgd"](flat, capturable=True)
    ours.step()
    ours._captured.replays = None  # to read it would raise
    ours.step()


def test_groups_have_their_own_rates() -> None:
    net, flat = model()
    rates = [torch.tensor(0.0), torch.tensor(0.5)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(
        (net[0].weight, net[1].weight), rates, strict=True)]  # fmt: skip
    ours = MaskedSGD(flat, groups=groups, capturable=True)
    ours.step()
    first, second = net[0].weight.clone(), net[1].weight.clone()
    captured.record(ours)
    assert torch.equal(net[0].weight, first)
    assert not torch.equal(net[1].weight, second)
    rates[1].zero_()
    second = net[1].weight.clone()
    captured.record(ours)
    assert torch.equal(net[1].weight, second)
