import copy

import pytest
import torch
from flat_models import Tied, small
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.flat import flatten
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.ops._segments import Segments


def test_parameters_are_views_and_the_model_behaves_as_before():
    torch.manual_seed(0)
    model = small().eval()
    x = torch.randn(2, 1, 3, 3)
    before, state = model(x), copy.deepcopy(model.state_dict())
    flat = flatten(model)
    assert torch.equal(model(x), before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    flat.values.mul_(2)
    assert torch.equal(model[3].weight, 2 * state["3.weight"])
    with torch.no_grad():
        model[0].weight.fill_(5.0)
    assert flat.prunable[:27].eq(5).all()
    held = flat.layout.initial_mask().to_bool()
    assert flat.prunable[~held].eq(0).all()
    model.load_state_dict(state)
    flat.check_bound()
    assert torch.equal(flat.prunable[:27].view(3, 1, 3, 3), state["0.weight"])
    assert list(flat.to_state_dict()) == list(state)
    for name, value in flat.to_state_dict().items():
        assert torch.equal(value, state[name])


def test_tied_parameters_are_stored_once_and_stay_tied():
    model = Tied()
    flat = flatten(model)
    assert flat.layout.aliases == (("head.weight", "embed.weight"),)
    assert flat.layout.eligible == 77
    assert model.head.weight is model.embed.weight
    assert set(flat.to_state_dict()) == set(model.state_dict())
    assert "scratch" not in flat.buffers
    assert [b.kind for b in flat.layout.buffers] == ["bool", "float", "float", "int"]
    clone = copy.deepcopy(model)  # an ordinary model: not bound to the buffer
    with torch.no_grad():
        clone.embed.weight.zero_()
    assert flat.prunable.any()
    assert flatten(clone).layout == flat.layout


def test_prunable_predicate_moves_tensors_to_the_tail():
    flat = flatten(small(), prunable=lambda name, p: name == "3.weight")
    assert [e.name for e in flat.layout.prunable_entries] == ["3.weight"]
    assert flat.layout.eligible == 15
    everything_dense = flatten(small(), prunable=lambda name, p: False)
    assert everything_dense.layout.eligible == 0
    assert everything_dense.density == 1.0


def test_mask_and_density():
    flat = flatten(small())
    assert flat.density == 1.0
    flat.mask = fs.ops.prune_(flat.prunable, 21, within=flat.mask)
    assert flat.density == 0.5
    parts = flat.layout.mask_dict(flat.mask)
    assert {n: tuple(m.shape) for n, m in parts.items()} == {
        "0.weight": (3, 1, 3, 3),
        "3.weight": (5, 3),
    }
    assert sum(int(m.sum()) for m in parts.values()) == 21
    with pytest.raises(ValueError, match="padding"):
        flat.mask = fs.Mask.full(256)
    with pytest.raises(ValueError, match="256"):
        flat.mask = fs.Mask.full(255)


def test_empty_and_zero_dimensional_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.none = nn.Parameter(torch.empty(0, 4))
            self.scale = nn.Parameter(torch.tensor(3.0))
            self.weight = nn.Parameter(torch.ones(2, 2))

    flat = flatten(Odd())
    flat.check_bound()
    assert flat.layout.eligible == 4
    assert flat.module.scale == 3.0


def halves(t: torch.Tensor) -> torch.Tensor:
    """Another dtype at the same address, of the same shape."""
    return t.view(-1).view(torch.float16)[: t.numel()].view(t.shape)


@pytest.mark.parametrize(
    ("break_it", "mend"),
    [
        (lambda m: m.to(torch.bfloat16), True),
        (lambda m: m.to(memory_format=torch.channels_last), True),
        (lambda m: setattr(m[3], "weight", nn.Parameter(torch.ones(5, 3))), True),
        (lambda m: setattr(m[3].weight, "data", torch.ones(5, 3)), True),
        (lambda m: setattr(m[3].weight, "data", m[3].weight.data.as_strided((5, 3), (1, 5))), True),
        (lambda m: setattr(m[3].weight, "data", m[3].weight.data[1:4]), False),
        (lambda m: setattr(m[3].weight, "data", m[3].weight.data[:4]), False),
        (lambda m: setattr(m[3].weight, "data", halves(m[3].weight.data)), False),
        (lambda m: setattr(m[3], "weight", nn.Parameter(torch.ones(5, 4))), False),
    ],
    ids=[
        "half",
        "channels_last",
        "replaced",
        "data",
        "strides",
        "moved",
        "shortened",
        "retyped",
        "reshaped",
    ],
)
def test_lost_views_are_noticed_and_rebind_mends(break_it, mend):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 5))
    flat = flatten(model)
    rows = Segments(*zip(*((e.offset, e.numel) for e in flat.layout.entries))).rows
    assert flat.read_gradients(flat.values, rows) == 0
    break_it(model)
    with pytest.raises(RuntimeError, match=r"rebind\(\)"):
        flat.check_bound()
    assert flat.read_gradients(flat.values, rows) < 0
    if not mend:
        values = flat.values.clone()
        with pytest.raises((ValueError, TypeError), match=r"3\.weight: expected"):
            flat.rebind()
        assert torch.equal(flat.values, values)
        return
    wanted = {name: t.detach().clone() for name, t in model.state_dict().items()}
    flat.rebind()
    flat.check_bound()
    assert flat.values.dtype == model[3].weight.dtype
    for name, value in flat.to_state_dict().items():
        assert torch.equal(value, wanted[name].contiguous())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: setattr(p, "grad", p.grad.t().contiguous().t()),
        lambda p: setattr(p, "grad", p.grad.to_sparse()),
        lambda p: setattr(p.grad, "data", p.grad[:4]),
        lambda p: setattr(p.grad, "data", p.grad.double()),
        lambda p: setattr(p.grad, "data", p.grad.view(torch.int32)),
    ],
    ids=["strides", "sparse", "size", "width", "dtype"],
)
def test_addresses_are_read_of_gradients_that_kernels_can_use(spoil):
    flat = flatten(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    rows = Segments(*zip(*((e.offset, e.numel) for e in flat.layout.entries))).rows
    first, second = flat.parameters[:2]
    first.grad, second.grad = torch.ones(5, 3), torch.ones(2, 5)
    assert flat.read_gradients(flat.values, rows) == 2
    assert rows[:, 2].tolist() == [first.grad.data_ptr(), second.grad.data_ptr(), 0, 0]
    second.grad = None
    assert flat.read_gradients(flat.values, rows) == 1
    assert rows[:, 2].tolist() == [first.grad.data_ptr(), 0, 0, 0]
    spoil(first)
    flat.check_bound()
    assert flat.read_gradients(flat.values, rows) < 0


def test_rebind_zeroes_what_the_mask_has_pruned():
    flat = flatten(small())
    flat.mask = fs.ops.prune_(flat.prunable, 10, within=flat.mask)
    flat.module[3].weight = nn.Parameter(torch.ones(5, 3))
    flat.rebind()
    assert int(flat.prunable.count_nonzero()) <= 10
    flat.module.load_state_dict(small().state_dict())
    flat.zero_pruned()
    assert flat.prunable[~flat.mask.to_bool()].view(torch.int32).eq(0).all()


def test_autograd_sees_writes_through_the_flat_buffer():
    flat = flatten(nn.Sequential(nn.Linear(3, 3)))
    loss = flat.module(flat.module(torch.randn(2, 3))).sum()
    flat.mark_written()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_be_flat_says_so():
    with pytest.raises(ValueError, match="at least one parameter"):
        flatten(nn.ReLU())
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"1\.weight: expected float32 on cpu.*got bfloat16"):
        flatten(mixed)
    with pytest.raises(TypeError, match="float64"):
        flatten(nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="lazy"):
        flatten(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="'nothing'"):
        FlatLayout.from_state_dict({"a": torch.ones(2)}, buffers=["nothing"])
    with pytest.raises(TypeError, match="complex64"):
        flatten(nn.ParameterList([torch.ones(2, 2, dtype=torch.complex64)]))
