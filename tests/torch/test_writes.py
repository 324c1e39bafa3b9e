"""Who wrote to the weights: every way to write is seen, and only what was written counts."""

import copy

import pytest
import torch
from ambient import FROZEN, not_under
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedAdamW, MaskedSGD


def by_data(p, value):
    p.data.copy_(value)


def by_detach(p, value):
    p.detach().copy_(value)


def by_numpy(p, value):
    if p.dtype == torch.bfloat16:
        pytest.skip("NumPy has no bfloat16")
    p.detach().numpy()[...] = value.numpy()


def by_copy(p, value):
    with torch.no_grad():
        p.copy_(value)


def by_foreach(p, value):
    torch._foreach_copy_([p.data], [value])


WRITES = [by_data, by_detach, by_numpy, by_copy, by_foreach]


def model_of(dtype, keep=40):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8)).to(dtype)
    flat = fs.flatten(m)
    flat.mask = fs.ops.prune_(flat.prunable, keep, within=flat.mask)
    return m, flat


def step(m, o, g=0.0):
    for p in m.parameters():
        p.grad = torch.full_like(p, g)
    o.step()


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("write", WRITES)
def test_what_was_written_is_what_a_step_starts_from(write, dtype, make):
    m, flat = model_of(dtype)
    o = make(flat, lr=0.0, weight_decay=0.0)
    step(m, o)
    dense = torch.randn(64, 64).to(dtype)
    write(m[0].weight, dense)
    step(m, o)
    keep = flat.layout.mask_dict(flat.mask)["0.weight"]
    assert torch.equal(m[0].weight, torch.where(keep, dense, torch.zeros_like(dense)))
    assert m[0].weight[~keep].view(torch.int16).eq(0).all()


@not_under("inference", reason=FROZEN)
@pytest.mark.parametrize("where", ["values", "prunable", "state_dict", "load", "swap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_through_other_doors(where, dtype):
    m, flat = model_of(dtype)
    o = MaskedSGD(flat, lr=0.0)
    step(m, o)
    if where == "values":
        flat.values.fill_(0.25)
    elif where == "prunable":
        flat.prunable.fill_(0.25)
    elif where == "state_dict":
        m.state_dict()["0.weight"].fill_(0.25)
    elif where == "load":
        m.load_state_dict({k: torch.full_like(v, 0.25) for k, v in m.state_dict().items()})
    else:  # an EMA's weights, swapped in for evaluation
        for p, q in zip(m.parameters(), copy.deepcopy(m).parameters(), strict=True):
            p.data.copy_(q.data.fill_(0.25))
    step(m, o)
    keep = flat.layout.mask_dict(flat.mask)["0.weight"]
    assert m[0].weight[keep].eq(0.25).all()
    assert m[0].weight[~keep].eq(0).all()


def test_one_pruned_weight_written_by_data_is_zero_after_the_step():
    m, flat = model_of(torch.float32)
    o = MaskedSGD(flat, lr=0.0)
    step(m, o)
    keep = flat.layout.mask_dict(flat.mask)["0.weight"]
    for at in (~keep).nonzero()[::501].tolist():
        m[0].weight.data[tuple(at)] = 1e-30
        step(m, o)
        assert m[0].weight[~keep].eq(0).all(), at


def test_a_large_sparse_model_is_looked_at_in_turns():
    """Below 3.6% density: a tensor written all over is found at once, one weight in 64 steps."""
    m = nn.Linear(512, 512, bias=False)
    flat = fs.flatten(m)
    flat.mask = fs.ops.prune_(flat.prunable, 1000, within=flat.mask)
    o = MaskedSGD(flat, lr=0.0)
    step(m, o)
    gone = ~flat.mask.to_bool()
    m.weight.data.fill_(1.0)
    step(m, o)
    assert flat.prunable[gone].eq(0).all()
    one = int(gone.nonzero()[12345])
    m.weight.data.view(-1)[one] = 1.0
    for _ in range(64):
        step(m, o)
    assert flat.prunable[one] == 0


@pytest.mark.parametrize("bits", [torch.bfloat16, torch.float16])
def test_other_parameters_keep_their_masters(bits):
    """Written: one of two layers. The other's hundred steps of 1e-4 must not be lost."""
    m = nn.ModuleDict({k: nn.Linear(16, 16, bias=False) for k in "ab"}).to(bits)
    for p in m.parameters():
        nn.init.ones_(p)
    o = MaskedSGD(fs.flatten(m), lr=1e-4)
    for i in range(100):
        step(m, o, 1.0)
        if i % 10 == 5:
            m["b"].weight.data.fill_(1.0)
    assert abs(m["a"].weight[0, 0].item() - 0.99) < 0.004
    assert m["b"].weight[0, 0].item() > 0.99


def two_optimizers(m, flat):
    return [MaskedSGD(flat, lr=0.1, groups=[{"params": list(m[k].parameters())}]) for k in "ab"]


def test_autograd_raises_only_where_torch_would():
    m = nn.ModuleDict({k: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)) for k in "ab"})
    flat = fs.flatten(m)
    flat.mask = fs.ops.prune_(flat.prunable, 20, within=flat.mask)
    first, second = two_optimizers(m, flat)
    losses = [m[k](torch.randn(3, 4)).square().mean() for k in "ab"]
    losses[0].backward()
    first.step()
    losses[1].backward()  # its weights are as they were
    again = m["b"](torch.randn(3, 4)).square().mean()
    second.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        again.backward()


def test_an_optimizer_has_the_state_of_its_own_parameters_alone():
    m = nn.Sequential(*[nn.Linear(32, 32) for _ in range(8)])
    flat = fs.flatten(m)
    flat.mask = fs.ops.prune_(flat.prunable, 2000, within=flat.mask)
    whole = MaskedAdamW(flat, lr=0.1)
    single = {p: MaskedAdamW(flat, lr=0.1, groups=[{"params": [p]}]) for p in m.parameters()}
    step(m, whole)
    for o in single.values():
        o.step()
    held = sum(t.numel() for o in single.values() for t in o._packed.tensors.values())
    assert held == sum(t.numel() for t in whole._packed.tensors.values())


def test_optimizers_in_backward_hooks_train_as_one():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    twin = copy.deepcopy(m)
    flat = fs.flatten(m)
    each = {p: MaskedAdamW(flat, lr=0.01, groups=[{"params": [p]}]) for p in m.parameters()}

    def hook(p):
        each[p].step()
        each[p].zero_grad()

    for p in m.parameters():
        p.register_post_accumulate_grad_hook(hook)
    o = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for i in range(5):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
        m(x).square().mean().backward()
        o.zero_grad()
        twin(x).square().mean().backward()
        o.step()
    for p, q in zip(m.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_pruned_weights_of_a_frozen_layer_are_zeroed_too():
    """A step does not write what has no gradient, whatever its density."""
    m, flat = model_of(torch.float32, keep=3000)
    m[0].weight.requires_grad_(False)
    o = MaskedSGD(flat, lr=0.1)
    for p in m[1].parameters():
        p.grad = torch.ones_like(p)
    o.step()
    m[0].weight.data.fill_(1.0)
    o.step()
    keep = flat.layout.mask_dict(flat.mask)["0.weight"]
    assert m[0].weight[keep].eq(1).all()
    assert m[0].weight[~keep].eq(0).all()
