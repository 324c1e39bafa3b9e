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


class Unread(torch.Tensor):
    """As on a device: to read it is to wait, which fails here."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = {torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__float__}
        if func in reads | {torch.Tensor.__int__, torch.Tensor.tolist, torch.Tensor.cpu}:
            raise AssertionError(f"the host waited: {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


def scaled(flat: fs.FlatParameters, optimizer: Any, infinite: bool, unread: bool) -> None:
    """A step as GradScaler has it of an optimizer that takes part."""
    torch.manual_seed(7)
    for p in flat.parameters:
        p.grad = 4 * torch.randn_like(p)
    found, scale = torch.tensor(float(infinite)), torch.tensor(4.0)
    if unread:
        found, scale = found.as_subclass(Unread), scale.as_subclass(Unread)
    optimizer.found_inf, optimizer.grad_scale = found, scale
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale


@pytest.mark.parametrize("kind", MAKE)
def test_a_scaled_step_is_decided_on_the_device(kind: str) -> None:
    """Beside the same steps that the host decides on."""
    (_, flat), (_, other) = model(), model()
    ours, theirs = MAKE[kind](flat, capturable=True), MAKE[kind](other)
    assert ours._step_supports_amp_scaling
    assert not theirs._step_supports_amp_scaling
    for number, infinite in enumerate([False, False, True, False, True, True, False]):
        before = flat.values.clone()
        scaled(flat, ours, infinite, unread=number > 0)
        scaled(other, theirs, infinite, unread=False)
        torch.testing.assert_close(flat.values, other.values, rtol=1e-6, atol=1e-7)
        assert torch.equal(flat.values, before) is infinite
        for p, q in zip(flat.parameters, other.parameters, strict=True):
            assert torch.equal(p.grad, q.grad)  # divided, unless it was skipped
    a, b = ours.state_dict()["state"], theirs.state_dict()["state"]
    for number in a:
        assert a[number].keys() == b[number].keys()
        for name in a[number]:
            torch.testing.assert_close(a[number][name], b[number][name], rtol=1e-6, atol=1e-7)


def test_the_host_looks_where_a_scaled_step_is_another() -> None:
    """What the device cannot know: rates on the host, a mask, parameters without a gradient."""
    (_, flat), (_, other) = model(), model()
    ours, theirs = MAKE["adamw"](flat, capturable=True), MAKE["adamw"](other)

    def both(infinite: bool = False) -> None:
        scaled(flat, ours, infinite, unread=False)
        scaled(other, theirs, infinite, unread=False)
        torch.testing.assert_close(flat.values, other.values, rtol=1e-6, atol=1e-7)

    both()
    both(infinite=True)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["lr"] = 0.3
    both()
    both()
    for f in (flat, other):
        f.mask = fs.ops.prune_(f.prunable, 100, within=f.mask)
    both(infinite=True)
    both()
    assert flat.prunable[~flat.mask.to_bool()].eq(0).all()
    with torch.no_grad():  # a write to what is pruned
        for f in (flat, other):
            f.parameters[0].fill_(0.5)
    both()
    assert flat.prunable[~flat.mask.to_bool()].eq(0).all()
    for f, optimizer in ((flat, ours), (other, theirs)):
        f.parameters[0].grad = None
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        del optimizer.found_inf
    both()
    steps = [[float(s["step"]) for s in o.state_dict()["state"].values()] for o in (ours, theirs)]
    assert steps[0] == steps[1]
    assert len(set(steps[0])) == 2


def test_a_grad_scaler_in_what_a_graph_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own: scale, backward, step, update; one replay overflows."""
    net, flat = model()
    ours = MAKE["sgd"](flat, capturable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    factor = torch.tensor(1.0)
    x = torch.randn(8, 40)

    def step() -> None:
        ours.zero_grad()
        scaler.scale(net(x).square().mean() * factor).backward()
        scaler.step(ours)
        scaler.update()

    step()
    monkeypatch.setattr("fedmap_sparse.optim.optimizer.capturing", lambda device: True)
    before = flat.values.clone()
    step()
    assert not torch.equal(flat.values, before)
    assert scaler.get_scale() == 2.0**10
    before = flat.values.clone()
    factor.fill_(float("inf"))
    step()
    assert torch.equal(flat.values, before)
    assert scaler.get_scale() == 2.0**9
    factor.fill_(1.0)
    step()
    assert not torch.equal(flat.values, before)
