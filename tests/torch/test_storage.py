"""Storage that leaks: what is saved of a flat model costs what is saved, not the buffer a view."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

import fedmap_sparse as fs


def net():
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(10)])


def pickled(x):
    return len(pickle.dumps(x))


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    return file.tell()


def tensors(x):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    return len(safetensors.save(x))


@pytest.mark.parametrize("size", [pickled, saved, tensors])
@pytest.mark.parametrize("part", [lambda m: m, lambda m: m[3]], ids=["whole", "a layer"])
def test_a_state_dict_costs_itself(size, part):
    m = net()
    before = size(part(m).state_dict())
    fs.flatten(m)
    assert size(part(m).state_dict()) < 1.1 * before + 1000


def test_one_tensor_of_a_state_dict_costs_itself():
    m = net()
    before = saved(m.state_dict()["0.weight"].clone())
    fs.flatten(m)
    assert saved(m.state_dict()["0.weight"]) < 1.1 * before


def test_tied_tensors_are_saved_once():
    m = nn.ModuleList([nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)])
    m[1].weight = m[0].weight
    before = saved(m.state_dict())
    fs.flatten(m)
    assert saved(m.state_dict()) < 1.1 * before


@pytest.mark.parametrize("size", [pickled, saved])
def test_optimizer_state_and_flat_state_cost_themselves(size):
    m = net()
    flat = fs.flatten(m)
    o = fs.optim.MaskedAdamW(flat)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    o.step()
    values = 4 * sum(p.numel() for p in m.parameters())
    assert size(o.state_dict()) < 2.2 * values
    assert size(flat.to_state_dict()) < 1.1 * values


def test_a_state_dict_is_the_parameters_memory():
    m = net()
    flat = fs.flatten(m)
    state = m.state_dict()
    state["0.weight"].fill_(3.0)
    assert flat.values[: 64 * 64].eq(3).all()
    assert state["0.weight"].data_ptr() == m[0].weight.data_ptr()
    assert m.state_dict(keep_vars=True)["0.weight"] is m[0].weight
    del m, flat
    assert state["0.weight"].eq(3).all()  # it keeps the memory alive


def test_copies_of_modules_are_ordinary():
    m = net()
    flat = fs.flatten(m)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        with torch.no_grad():
            twin[0].weight.fill_(9.0)
        assert not flat.values.eq(9).any()
        fs.flatten(twin).check_bound()


@pytest.mark.parametrize("size", [pickled, saved])
@pytest.mark.parametrize(
    "part",
    [lambda m: m, lambda m: m[3], lambda m: m[0].weight, lambda m: dict(m.named_parameters())],
    ids=["module", "submodule", "parameter", "named parameters"],
)
def test_modules_and_parameters_cost_themselves(size, part):
    m = net()
    before = size(part(m))
    flat = fs.flatten(m)
    assert size(part(m)) < 1.1 * before + 1000
    assert size((m, flat)) < 1.1 * size(m) + 5000


def test_pickled_parameters_are_what_they_were():
    m = net()
    m[1].weight = m[0].weight
    m[2].requires_grad_(False)
    m[3].weight.note = "kept"
    fs.flatten(m)
    twin = pickle.loads(pickle.dumps(m))
    assert twin[1].weight is twin[0].weight
    assert twin[3].weight.note == "kept"
    for p, q in zip(m.parameters(), twin.parameters(), strict=True):
        assert type(q) is nn.Parameter
        assert torch.equal(p, q)
        assert p.requires_grad is q.requires_grad
        assert q.data_ptr() != p.data_ptr()


def test_what_was_decoded_costs_itself():
    m = net()
    flat = fs.flatten(m)
    state = fs.decode(fs.encode(flat, flat.mask), flat.layout).to_state_dict()
    assert pickled(state) < 1.1 * pickled(m.state_dict())
    assert torch.equal(state["3.weight"], m[3].weight)


def test_another_process_gets_the_buffer_once():
    """torch's own way passes a view's file each time, which `Process(args=(model,))` refuses."""
    m = net()
    m[1].weight = m[0].weight
    fs.flatten(m)
    twin = pickle.loads(ForkingPickler.dumps(m))
    assert twin[1].weight is twin[0].weight
    assert len({p.untyped_storage().data_ptr() for p in twin.parameters()}) == 1
    with torch.no_grad():
        m[3].bias.fill_(7.0)  # shared, as parameters that are sent are
    for p, q in zip(m.parameters(), twin.parameters(), strict=True):
        assert type(q) is nn.Parameter
        assert torch.equal(p, q)
    m[0].weight = nn.Parameter(torch.ones(64, 64))
    m[2].weight.data = torch.ones(64, 64)
    twin = pickle.loads(ForkingPickler.dumps(m))
    assert torch.equal(twin[0].weight, twin[2].weight)
