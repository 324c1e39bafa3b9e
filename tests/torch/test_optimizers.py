"""The optimizers are torch.optim.Optimizers in what a user can observe."""

import copy
import io
import pickle

import pytest
import torch
from small_training import net, same, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedAdamW, MaskedSGD

L = torch.optim.lr_scheduler
PAIRS = [
    pytest.param(MaskedSGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}, id="sgd"),
    pytest.param(MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}, id="adamw"),
]


@pytest.mark.parametrize(("ours", "theirs", "kw"), PAIRS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "copy the optimizer first"])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_train_on(ours, theirs, kw, how, steps):
    m = net()
    flat = fs.flatten(m)
    flat.mask = fs.ops.prune_(flat.prunable, 70, within=flat.mask)
    o = ours(flat, **kw)
    for i in range(steps):
        train(m, o, i)
    if how == "deepcopy":
        m2, o2 = copy.deepcopy((m, o))
    elif how == "pickle":
        m2, o2 = pickle.loads(pickle.dumps((m, o)))
    else:
        o2, m2 = copy.deepcopy((o, m))
    for i in range(2, 5):
        train(m, o, i)
        train(m2, o2, i)
    same(m, m2, rtol=0, atol=0)
    assert o2.flat.values.data_ptr() != flat.values.data_ptr()
    assert o2.flat.mask == flat.mask
    o2.flat.check_bound()


def test_a_module_that_holds_its_own_optimizer_is_copied():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.flat = fs.flatten(self)
            self.o = MaskedSGD(self.flat, lr=0.1, momentum=0.9)

    holder = Holder()
    train(holder.net, holder.o, 0)
    twin = copy.deepcopy(holder)
    train(holder.net, holder.o, 1)
    train(twin.net, twin.o, 1)
    same(holder, twin, rtol=0, atol=0)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs", "kw"), PAIRS)
def test_the_usual_checkpoint_restores_everything(ours, theirs, kw, dtype, order):
    def fresh():
        m = net().to(dtype)
        flat = fs.flatten(m)
        return m, flat, ours(flat, **kw)

    def train16(m, o, seed):
        o.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
        m(x).sub(1).square().mean().backward()
        o.step()

    m, flat, o = fresh()
    flat.mask = fs.ops.prune_(flat.prunable, 70, within=flat.mask)
    for i in range(3):
        train16(m, o, i)
    file = io.BytesIO()
    torch.save({"m": m.state_dict(), "o": o.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    m2, flat2, o2 = fresh()
    if order == "model first":
        m2.load_state_dict(saved["m"])
        o2.load_state_dict(saved["o"])
    else:
        o2.load_state_dict(saved["o"])
        m2.load_state_dict(saved["m"])
    assert flat2.mask == flat.mask
    for i in range(3, 6):
        train16(m, o, i)
        train16(m2, o2, i)
    assert torch.equal(flat.values, flat2.values)


@pytest.mark.parametrize(("ours", "theirs", "kw"), PAIRS)
@pytest.mark.parametrize("pruned", [False, True])
def test_torchs_own_state_loads(ours, theirs, kw, pruned):
    m = net()
    twin = copy.deepcopy(m)
    flat = fs.flatten(m)
    if pruned:
        flat.mask = fs.ops.prune_(flat.prunable, 70, within=flat.mask)
    keep = flat.layout.mask_dict(flat.mask)
    b = theirs(twin.parameters(), **kw)
    for i in range(3):
        train(twin, b, i)
    m.load_state_dict(twin.state_dict())
    a = ours(flat, **kw)
    a.load_state_dict(b.state_dict())
    if not pruned:
        for i in range(3, 6):
            train(twin, b, i)
            train(m, a, i)
        same(m, twin)
        b.load_state_dict(a.state_dict())  # and the way back
        return
    train(m, a, 3)
    name = "momentum_buffer" if ours is MaskedSGD else "exp_avg"
    assert a.state[m[0].weight][name].numel() == int(keep["0.weight"].sum())


@pytest.mark.parametrize(("ours", "theirs", "kw"), PAIRS)
def test_state_is_views_that_may_be_written_replaced_and_deleted(ours, theirs, kw):
    m = net()
    twin = copy.deepcopy(m)
    a, b = ours(fs.flatten(m), **kw), theirs(twin.parameters(), **kw)
    name = "momentum_buffer" if ours is MaskedSGD else "exp_avg"

    def both(change, seed):
        for model, o in ((m, a), (twin, b)):
            change(o, model[0].weight)
            train(model, o, seed)
        same(m, twin)

    both(lambda o, p: None, 0)
    for p, q in zip(m.parameters(), twin.parameters(), strict=True):
        assert set(a.state[p]) == set(b.state[q])
        torch.testing.assert_close(a.state[p][name], b.state[q][name])
    both(lambda o, p: o.state[p][name].mul_(0.5), 1)
    both(lambda o, p: o.state[p].__setitem__(name, torch.ones_like(p)), 2)
    both(lambda o, p: o.state.pop(p), 3)
    both(lambda o, p: o.state.clear(), 4)


def test_hooks_run_as_torchs_do():
    def run(o):
        calls = []
        o.register_state_dict_pre_hook(lambda o: calls.append("saves"))
        o.register_state_dict_post_hook(lambda o, s: calls.append("saved"))
        o.register_load_state_dict_pre_hook(lambda o, s: calls.append("loads"))
        o.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
        o.register_step_pre_hook(lambda *a: calls.append("steps"))
        o.register_step_post_hook(lambda *a: calls.append("stepped"))
        o.load_state_dict(o.state_dict())
        o.step()
        return calls

    m = net()
    wanted = run(torch.optim.SGD(net().parameters(), lr=0.1))
    assert run(MaskedSGD(fs.flatten(m), lr=0.1)) == wanted


def test_global_hooks_and_profilers_see_a_step():
    """A step that nobody watches goes past torch's wrapper (optim/hooks.py)."""
    from torch.optim import optimizer as of_torch

    optimizer = MaskedSGD(fs.flatten(net()), lr=0.1)
    calls = []
    added = [
        of_torch.register_optimizer_step_pre_hook(lambda *a: calls.append("before")),
        of_torch.register_optimizer_step_post_hook(lambda *a: calls.append("after")),
    ]
    optimizer.step()
    for hook in added:
        hook.remove()
    optimizer.step()
    assert calls == ["before", "after"]
    with torch.profiler.profile(acc_events=True) as profile:
        optimizer.step()
    name = "Optimizer.step#MaskedSGD.step"
    assert name in {event.key for event in profile.key_averages()}


def test_hooks_may_replace_what_is_saved_and_loaded():
    m = net()
    o = MaskedSGD(fs.flatten(m), lr=0.1)
    o.register_state_dict_post_hook(lambda o, s: {**s, "note": 1})
    assert o.state_dict()["note"] == 1
    o.register_load_state_dict_pre_hook(
        lambda o, s: {**s, "param_groups": [{**g, "lr": 0.5} for g in s["param_groups"]]}
    )
    o.load_state_dict(o.state_dict())
    assert o.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("ours", "theirs", "kw"), PAIRS)
@pytest.mark.parametrize("stepped", [False, True])
def test_distributed_checkpoint(ours, theirs, kw, stepped):
    m = net()
    flat = fs.flatten(m)
    flat.mask = fs.ops.prune_(flat.prunable, 70, within=flat.mask)
    o = ours(flat, **kw)
    if stepped:
        train(m, o, 0)
    saved = get_optimizer_state_dict(m, o)
    assert set(saved["state"]) == {n for n, _ in m.named_parameters()}
    m2 = copy.deepcopy(m)
    o2 = ours(fs.flatten(m2), **kw)
    set_optimizer_state_dict(m2, o2, saved)
    assert o2.flat.mask == flat.mask
    train(m, o, 1)
    train(m2, o2, 1)
    same(m, m2)


SCHEDULERS = {
    "OneCycleLR": lambda o: L.OneCycleLR(o, 0.1, total_steps=30),
    "CyclicLR": lambda o: L.CyclicLR(o, 0.001, 0.1, step_size_up=3, cycle_momentum=True),
    "ReduceLROnPlateau": lambda o: L.ReduceLROnPlateau(o, patience=1),
    "LambdaLR": lambda o: L.LambdaLR(o, lambda i: 0.9**i),
    "MultiplicativeLR": lambda o: L.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: L.StepLR(o, 3),
    "MultiStepLR": lambda o: L.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: L.ConstantLR(o),
    "LinearLR": lambda o: L.LinearLR(o),
    "ExponentialLR": lambda o: L.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: L.CosineAnnealingLR(o, 10),
    "PolynomialLR": lambda o: L.PolynomialLR(o),
    "CosineAnnealingWarmRestarts": lambda o: L.CosineAnnealingWarmRestarts(o, 4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("ours", "theirs", "kw"), PAIRS)
def test_every_scheduler_of_torch(ours, theirs, kw, name):
    m = net()
    twin = copy.deepcopy(m)
    pairs = [(m, ours(fs.flatten(m), **kw)), (twin, theirs(twin.parameters(), **kw))]
    schedulers = [SCHEDULERS[name](o) for _, o in pairs]
    for i in range(15):
        for (model, o), s in zip(pairs, schedulers, strict=True):
            train(model, o, i)
            s.step(1.0) if name == "ReduceLROnPlateau" else s.step()
    same(m, twin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs", "kw"), PAIRS)
def test_lr_as_a_tensor_and_capturable(ours, theirs, kw):
    m = net()
    twin = copy.deepcopy(m)
    a = ours(fs.flatten(m), **{**kw, "lr": torch.tensor(kw["lr"])}, capturable=True)
    b = theirs(twin.parameters(), **kw)
    for i in range(4):
        if i == 2:
            a.param_groups[0]["lr"].fill_(0.001)
            b.param_groups[0]["lr"] = 0.001
        train(m, a, i)
        train(twin, b, i)
    same(m, twin)


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scale_and_found_inf(overflow):
    m = net()
    flat = fs.flatten(m)
    twin = copy.deepcopy(m)
    a, b = MaskedSGD(flat, lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    for p, q in zip(m.parameters(), twin.parameters(), strict=True):
        p.grad, q.grad = torch.full_like(p, 8.0), torch.full_like(q, 2.0)
    a.grad_scale, a.found_inf = torch.tensor(4.0), torch.tensor(float(overflow))
    before = flat.values.clone()
    a.step()
    b.step()
    if overflow:
        assert torch.equal(flat.values, before)
    else:
        same(m, twin)


def test_groups_may_be_edited_in_place():
    m = net()
    o = MaskedSGD(fs.flatten(m), lr=0.1, momentum=0.9, groups=[{"params": [m[0].weight]}])
    train(m, o, 0)
    kept = o.state[m[0].weight]["momentum_buffer"].clone()
    o.param_groups[0]["params"].append(m[2].weight)
    assert torch.equal(o.state[m[0].weight]["momentum_buffer"], kept)
    before = m[2].weight.detach().clone()
    train(m, o, 1)
    assert not torch.equal(m[2].weight, before)


def test_a_parameter_may_take_the_place_of_another_in_its_group():
    m = net()
    first, second = m[0].weight, m[2].weight
    groups = [{"params": [first]}, {"params": [second], "lr": 0.0}]
    o = MaskedSGD(fs.flatten(m), lr=0.1, momentum=0.9, groups=groups)
    train(m, o, 0)
    one, two = (group["params"] for group in o.param_groups)
    one[0], two[0] = two[0], one[0]
    before = first.detach().clone(), second.detach().clone()
    train(m, o, 1)
    assert torch.equal(first, before[0])
    assert not torch.equal(second, before[1])
    one[0] = m[0].bias
    before = m[0].bias.detach().clone(), second.detach().clone()
    train(m, o, 2)
    assert torch.equal(second, before[1])
    assert not torch.equal(m[0].bias, before[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "groups of this optimizer"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(3)), "exp_avg"),
        (lambda s: s["state"][0].update(momentum_buffer=torch.ones(3)), "momentum_buffer"),
        (lambda s: s["state"][0].update(mask=torch.ones(1, dtype=torch.int32)), "mask"),
        (lambda s: s["state"].update({99: {}}), "99"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, says):
    m = net()
    o = MaskedSGD(fs.flatten(m), lr=0.1, momentum=0.9)
    train(m, o, 0)
    saved = o.state_dict()
    wrong = copy.deepcopy(saved)
    change(wrong)
    with pytest.raises(ValueError, match=says):
        o.load_state_dict(wrong)
    after = o.state_dict()
    assert torch.equal(after["state"][0]["momentum_buffer"], saved["state"][0]["momentum_buffer"])
