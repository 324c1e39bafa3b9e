"""MaskedSGD and MaskedAdamW beside torch.optim, step by step, and what they notice."""

import copy

import pytest
import torch
from optim_steps import dense_state, loss_of, net, saved_state, train
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedAdamW, MaskedSGD

# float32 against torch.optim over 20 steps: parameters of size 1 move by some hundredths a step;
# torch's kernels contract and reorder, ours do not, so a step differs by some 1e-7.
FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}

SGD = {
    "plain": {"lr": 0.05},
    "momentum": {"lr": 0.05, "momentum": 0.9},
    "dampened": {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"lr": 0.03, "momentum": 0.7, "nesterov": True, "weight_decay": 0.02},
    "maximize": {"lr": 0.002, "momentum": 0.5, "maximize": True, "weight_decay": 0.1},
}
ADAMW = {
    "plain": {"lr": 0.01},
    "betas": {"lr": 0.02, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.2},
    "amsgrad": {"lr": 0.01, "betas": (0.8, 0.9), "amsgrad": True, "eps": 1e-4},
    "maximize": {"lr": 0.002, "maximize": True, "weight_decay": 0.0, "eps": 1e-4},
}
PAIRS = [
    *((MaskedSGD, torch.optim.SGD, kw, f"sgd-{name}") for name, kw in SGD.items()),
    *((MaskedAdamW, torch.optim.AdamW, kw, f"adamw-{name}") for name, kw in ADAMW.items()),
]
EACH = pytest.mark.parametrize(
    ("ours", "theirs", "kw"), [p[:3] for p in PAIRS], ids=[p[3] for p in PAIRS]
)


@EACH
def test_dense_mask_gives_torchs_result_over_20_steps(ours, theirs, kw):
    model = net()
    twin = copy.deepcopy(model)
    flat = fs.flatten(model)
    a, b = ours(flat, **kw), theirs(twin.parameters(), **kw)
    for seed in range(20):
        train(model, a, seed)
        train(twin, b, seed)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, **FLOAT32)
    by_name = dict(twin.named_parameters())
    names = [n for n in ours.state_names if saved_state(a, n)[0] is not None]
    for name in names:
        for e, mine in zip(flat.layout.entries, dense_state(a, name), strict=True):
            torch.testing.assert_close(mine, b.state[by_name[e.name]][name], **FLOAT32)
    assert bool(names) is (ours is MaskedAdamW or kw.get("momentum", 0) != 0)


@EACH
def test_masked_equals_torch_with_gradients_and_weights_masked(ours, theirs, kw):
    """The oracle: torch on the dense model, gradients and weights multiplied by the mask."""
    model = net()
    flat = fs.flatten(model)
    mask = fs.ops.prune_(flat.prunable, 90, within=flat.mask)
    twin = copy.deepcopy(model)
    a, b = ours(flat, mask, **kw), theirs(twin.parameters(), **kw)
    keep = flat.layout.mask_dict(mask)
    for seed in range(20):
        train(model, a, seed)
        b.zero_grad()
        loss_of(twin, seed).backward()
        for name, p in twin.named_parameters():
            if name in keep:
                p.grad *= keep[name]
        b.step()
        for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q, p, **FLOAT32)
            if name in keep:
                assert q[~keep[name]].view(torch.int32).eq(0).all()  # +0.0, never -0.0


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e38])
def test_pruned_weights_stay_zero_whatever_the_gradient(make, poison):
    flat = fs.flatten(net())
    mask = fs.ops.prune_(flat.prunable, 60, within=flat.mask)
    kw = {"momentum": 0.9} if make is MaskedSGD else {}
    optimizer = make(flat, mask, lr=0.1, weight_decay=0.5, **kw)
    keep = flat.layout.mask_dict(mask)
    for step in range(3):
        train(flat.module, optimizer, step)
        for name, p in flat.module.named_parameters():
            if name in keep:
                p.grad[~keep[name]] = poison
        optimizer.step()
        gone = flat.prunable[~mask.to_bool()]
        assert gone.view(torch.int32).eq(0).all()
        assert flat.values.isfinite().all()


def test_groups_schedulers_and_parameters_of_no_group():
    model = net()
    twin = copy.deepcopy(model)
    flat = fs.flatten(model)

    def groups(m):
        return [
            {"params": [m[0].weight, m[0].bias], "lr": 0.2, "momentum": 0.5},
            {"params": [m[3].weight], "weight_decay": 0.3, "nesterov": True},
        ]

    a = MaskedSGD(flat, lr=0.05, momentum=0.9, groups=groups(model))
    b = torch.optim.SGD(groups(twin), lr=0.05, momentum=0.9)
    sa = torch.optim.lr_scheduler.StepLR(a, 3, gamma=0.5)
    sb = torch.optim.lr_scheduler.StepLR(b, 3, gamma=0.5)
    alone = model[3].bias.detach().clone()
    model[3].bias.register_hook(lambda g: g * float("nan"))  # not even multiplied by 0
    for seed in range(12):
        if seed == 6:
            late = {"lr": 0.01, "dampening": 0.5}  # which a first step leaves out
            a.add_param_group({"params": [model[1].weight], **late})
            b.add_param_group({"params": [twin[1].weight], **late})
        train(model, a, seed)
        train(twin, b, seed)
        sa.step()
        sb.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, **FLOAT32)
    assert torch.equal(model[3].bias, alone)
    assert [g["lr"] for g in a.param_groups] == [g["lr"] for g in b.param_groups]


@pytest.mark.parametrize("pair", [(MaskedSGD, torch.optim.SGD), (MaskedAdamW, torch.optim.AdamW)])
def test_frozen_missing_and_tied_parameters_behave_as_in_torch(pair):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(12, 8)
            self.middle = nn.Linear(8, 8)
            self.unused = nn.Linear(3, 3)
            self.head = nn.Linear(8, 12)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.middle(self.embed(x)))

    model = Tied()
    model.middle.bias.requires_grad_(False)
    twin = copy.deepcopy(model)
    kw = {"lr": 0.01, "weight_decay": 0.1}
    if pair[0] is MaskedSGD:
        kw["momentum"] = 0.9
    a, b = pair[0](fs.flatten(model), **kw), pair[1](twin.parameters(), **kw)
    for step in range(6):
        for m, o in ((model, a), (twin, b)):
            o.zero_grad()
            out = m(torch.tensor([1, 5, 7]))
            if step >= 3:  # its gradient, and so its state, begins late
                out = out.mean() + m.unused(torch.ones(3)).mean()
            out.square().mean().backward()
            o.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, **FLOAT32)


@pytest.mark.parametrize("pair", [(MaskedSGD, torch.optim.SGD), (MaskedAdamW, torch.optim.AdamW)])
def test_closure_accumulation_and_zero_grad_in_place(pair):
    model = net()
    twin = copy.deepcopy(model)
    a, b = pair[0](fs.flatten(model), lr=0.05), pair[1](twin.parameters(), lr=0.05)
    for step in range(4):
        one, two = train(model, a, step, closure=True), train(twin, b, step, closure=True)
        torch.testing.assert_close(one, two)
        for m, o in ((model, a), (twin, b)):
            o.zero_grad(set_to_none=step % 2 == 0)
            for seed in (step, step + 50):
                loss_of(m, seed).backward()
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, **FLOAT32)


def test_clip_grad_norm_counts_survivors():
    flat = fs.flatten(net())
    mask = fs.ops.prune_(flat.prunable, 30, within=flat.mask)
    optimizer = MaskedSGD(flat, mask, lr=0.1)
    loss_of(flat.module, 0).backward()
    keep = flat.layout.mask_dict(mask)
    kept = [p.grad[keep[n]] if n in keep else p.grad for n, p in flat.module.named_parameters()]
    wanted = torch.cat([g.reshape(-1) for g in kept]).norm()
    norm = optimizer.clip_grad_norm_(0.01)
    torch.testing.assert_close(norm, wanted)
    total = torch.cat([p.grad.reshape(-1) for p in flat.parameters]).norm()
    torch.testing.assert_close(total, torch.tensor(0.01), rtol=1e-3, atol=0)


def test_grad_scaler_and_autocast():
    model = net()
    flat = fs.flatten(model)
    optimizer = MaskedSGD(flat, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = flat.values.clone()
    for seed in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, seed)
        scaler.scale(loss).backward()
        if seed == 1:
            model[0].weight.grad[0, 0] = float("inf")
            held = flat.values.clone()
        scaler.step(optimizer)
        scaler.update()
        if seed == 1:
            assert torch.equal(flat.values, held)  # an overflow skips the step
    assert not torch.equal(flat.values, before)


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
def test_stale_views_raise_and_rebind_mends(make):
    model = net()
    flat = fs.flatten(model)
    optimizer = make(flat, lr=0.1)
    train(model, optimizer, 0)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"rebind\(\)"):
        train(model, optimizer, 1)
    flat.rebind()
    train(model, optimizer, 1)
    assert flat.values.dtype == torch.bfloat16
    model[3].weight = nn.Parameter(torch.ones(6, 40, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"3\.weight"):
        train(model, optimizer, 2)
    flat.rebind()
    train(model, optimizer, 2)
    assert not model[3].weight.eq(1).all()  # the new Parameter is the one that trains


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
def test_a_model_read_by_python_takes_the_same_steps(make, monkeypatch):
    """C++ reads addresses of ordinary gradients; what it leaves to Python gives the same bits."""
    torch.manual_seed(0)
    flat = fs.flatten(net())
    mask = fs.ops.prune_(flat.prunable, 90, within=flat.mask)
    other = fs.flatten(copy.deepcopy(flat.module))
    monkeypatch.setattr(other, "read_gradients", lambda *_: -1)
    for f in (flat, other):
        f.module[1].weight.requires_grad_(False)
        grouped = [p for p in f.parameters if p is not f.module[3].bias]
        optimizer = make(f, mask, groups=[{"params": grouped}], lr=0.1)
        for seed in range(4):
            train(f.module, optimizer, seed)
    assert flat.module[3].bias.grad is not None
    assert torch.equal(flat.values.view(torch.int32), other.values.view(torch.int32))


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
def test_gradients_that_no_kernel_takes_change_nothing(make):
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3))
    flat = fs.flatten(model)
    optimizer = make(flat, lr=0.1)
    before = flat.values.clone()
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"dense gradients, got torch\.sparse_coo"):
        optimizer.step()
    model[0].weight.grad = None
    model[1].weight.grad.data = model[1].weight.grad.double()
    with pytest.raises(TypeError, match="expected dtype float32, got float64"):
        optimizer.step()
    assert torch.equal(flat.values, before)
    assert not optimizer.state


def test_channels_last_inputs_and_gradients():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    twin = copy.deepcopy(model)
    a = MaskedSGD(fs.flatten(model), lr=0.1, momentum=0.9)
    b = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 4, 9, 9).to(memory_format=torch.channels_last)
    for _ in range(3):
        for m, o in ((model, a), (twin, b)):
            o.zero_grad()
            m(x).square().mean().backward()
            for p in m.parameters():
                if p.ndim == 4:
                    p.grad = p.grad.to(memory_format=torch.channels_last)
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, **FLOAT32)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: MaskedSGD(f, lr=-1), "lr: expected at least 0"),
        (lambda f: MaskedSGD(f, nesterov=True), "nesterov"),
        (lambda f: MaskedAdamW(f, betas=(0.9, 1.0)), "betas"),
        (lambda f: MaskedSGD(f, fs.Mask.full(3)), "384 elements, got 3"),
        (
            lambda f: MaskedSGD(f, groups=[{"params": [nn.Parameter(torch.ones(2))]}]),
            "parameters of the flattened module",
        ),
    ],
)
def test_bad_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make(fs.flatten(nn.Linear(16, 20)))
    with pytest.raises(TypeError, match="FlatParameters"):
        MaskedSGD(nn.Linear(2, 2).parameters())
