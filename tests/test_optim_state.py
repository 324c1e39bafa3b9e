"""What MaskedSGD and MaskedAdamW keep: packed state, its memory, how it is saved and taken up."""

import copy
import io

import pytest
import torch
from optim_steps import dense_state, net, saved_state, train
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedAdamW, MaskedSGD


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
def test_state_follows_the_nested_mask(make):
    flat = fs.flatten(net())
    kw = {"momentum": 0.9} if make is MaskedSGD else {"amsgrad": True}
    optimizer = make(flat, lr=0.05, **kw)
    train(flat.module, optimizer, 0)
    before = {n: dense_state(optimizer, n) for n in optimizer.state_names}
    mask = fs.ops.magnitude_mask(flat.prunable, 77, within=flat.mask)
    values = flat.values.clone()
    optimizer.set_mask(mask)
    assert torch.equal(flat.values, values)  # set_mask touches the state alone
    assert flat.mask is mask
    keep = flat.layout.mask_dict(mask)
    for name, old in before.items():
        sizes = [t.numel() for t in saved_state(optimizer, name)]
        assert sum(sizes) == 77 + sum(e.numel for e in flat.layout.tail_entries)
        for e, was, now in zip(flat.layout.entries, old, dense_state(optimizer, name), strict=True):
            wanted = was * keep[e.name] if e.name in keep else was
            assert torch.equal(now, wanted)
    with pytest.raises(ValueError, match="subset of the parent"):
        optimizer.set_mask(flat.layout.initial_mask())
    assert optimizer.mask is mask


def test_a_step_follows_a_mask_set_on_the_parameters():
    flat = fs.flatten(net())
    optimizer = MaskedSGD(flat, lr=0.1, momentum=0.9)
    train(flat.module, optimizer, 0)
    flat.mask = fs.ops.prune_(flat.prunable, 50, within=flat.mask)
    train(flat.module, optimizer, 1)
    assert optimizer.mask is flat.mask
    sizes = [t.numel() for t in saved_state(optimizer, "momentum_buffer")]
    assert sum(sizes) == 50 + sum(e.numel for e in flat.layout.tail_entries)
    assert int(flat.prunable.count_nonzero()) <= 50


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_the_step_after_a_mask_was_replaced_is_the_one_after_set_mask(make, whole, pruned):
    """Nothing of it is lost: not even where the new mask keeps the same, as after a checkpoint."""
    ends = []
    for tell in (True, False):
        torch.manual_seed(0)
        flat = fs.flatten(net())
        groups = None if whole else [{"params": flat.parameters[:2]}]
        kw = {"momentum": 0.9} if make is MaskedSGD else {}
        optimizer = make(flat, lr=0.1, groups=groups, **kw)
        train(flat.module, optimizer, 0)
        keep = 50 if pruned else flat.layout.eligible
        mask = fs.ops.prune_(flat.prunable, keep, within=flat.mask)
        before = flat.values.clone()
        if tell:
            optimizer.set_mask(mask)
        else:
            flat.mask = mask
        train(flat.module, optimizer, 1)
        assert not torch.equal(flat.values, before)
        state = optimizer.state_dict()["state"]
        ends.append([flat.values, *(one[optimizer.state_names[0]] for one in state.values())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("make", "kw", "tensors"),
    [
        (MaskedSGD, {}, 0),
        (MaskedSGD, {"momentum": 0.9}, 1),
        (MaskedAdamW, {}, 2),
        (MaskedAdamW, {"amsgrad": True}, 3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_memory_by_allocation(make, kw, tensors, dtype):
    """Counted by torch's own allocator profile, not by our formula."""
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)).to(dtype)
    flat = fs.flatten(model)
    keep = flat.layout.eligible // 10
    mask = fs.ops.prune_(flat.prunable, keep, within=flat.mask)
    optimizer = make(flat, mask, lr=0.1, **kw)
    for p in flat.parameters:
        p.grad = torch.ones_like(p)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        optimizer.step()
    left = sum(e.self_cpu_memory_usage for e in profile.events() if e.name == "[memory]")
    left = left or sum(e.self_cpu_memory_usage for e in profile.key_averages())
    held = 4 * (keep + flat.layout.tail_numel) * (tensors + (dtype == torch.bfloat16))
    assert held <= left <= held + 4096
    dense = 4 * flat.layout.eligible * max(tensors, 1)
    assert held < dense / 4


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("shrink", [False, True])
def test_state_dict_round_trip_also_into_another_density(make, shrink):
    kw = {"momentum": 0.9} if make is MaskedSGD else {}
    flat = fs.flatten(net())
    a = make(flat, lr=0.05, **kw)
    for seed in range(3):
        train(flat.module, a, seed)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = fs.flatten(copy.deepcopy(flat.module))
    mask = other.layout.initial_mask()
    if shrink:
        mask = fs.ops.prune_(other.prunable, 70, within=mask)
        fs.ops.prune_(flat.prunable, 70, within=flat.mask)
        a.set_mask(mask)
    b = make(other, mask, lr=99.0, **kw)
    b.load_state_dict(saved)  # with the dense mask that it was saved under
    b.set_mask(mask)
    assert b.param_groups[0]["lr"] == 0.05
    for seed in range(3, 6):
        train(flat.module, a, seed)
        train(other.module, b, seed)
    assert torch.equal(flat.values.view(torch.int32), other.values.view(torch.int32))
    broken = copy.deepcopy(saved)
    broken["param_groups"][0]["params"] = [0]
    with pytest.raises(ValueError, match="groups of this optimizer"):
        b.load_state_dict(broken)


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_earlier_state_is_taken_up_again(make, steps):
    kw = {"momentum": 0.9} if make is MaskedSGD else {}
    flat = fs.flatten(net())
    optimizer = make(flat, lr=0.05, **kw)
    for seed in range(steps):
        train(flat.module, optimizer, seed)
    model, state = copy.deepcopy(flat.module.state_dict()), optimizer.state_dict()
    results = []
    for _ in range(2):
        flat.module.load_state_dict(model)
        optimizer.load_state_dict(state)
        for seed in range(steps, steps + 3):
            train(flat.module, optimizer, seed)
        results.append(flat.values.clone())
    assert torch.equal(*results)


def test_bfloat16_master_copies_catch_small_steps():
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    flat = fs.flatten(model)
    mask = fs.ops.prune_(flat.prunable, 2048, within=flat.mask)
    optimizer = MaskedSGD(flat, mask, lr=1e-4)
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    # each step alone would be lost: 1 - 1e-4 rounds back to 1 in bfloat16
    assert flat.prunable[:2048].eq(torch.tensor(0.99, dtype=torch.bfloat16)).all()
    assert flat.prunable[2048:].eq(0).all()
    with torch.no_grad():
        model.load_state_dict({"weight": torch.full((64, 64), 2.0)})
    optimizer.step()  # the masters start again from what was loaded
    assert flat.prunable[:2048].eq(2.0).all()
    assert flat.prunable[2048:].eq(0).all()
