"""Names, buffers, ties: what a state dict has is what a layout and a message have."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fedmap_sparse as fs
from fedmap_sparse import FlatLayout

# torch.compile imports what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def with_buffer(b, persistent=True):
    m = nn.Sequential(nn.Linear(4, 4))
    m.register_buffer("table", b, persistent=persistent)
    return m


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.a = nn.Sequential(nn.Linear(4, 4), self.bn)


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        self.seen = state["seen"]


MODELS = {
    "shared batch norm": Shared,
    "complex": lambda: with_buffer(torch.polar(torch.ones(4), torch.arange(4.0))),
    "sparse": lambda: with_buffer(torch.eye(4).to_sparse()),
    "infinite": lambda: with_buffer(torch.full((4, 4), float("-inf")).triu(1)),
    "not persistent": lambda: with_buffer(torch.ones(3), persistent=False),
    "extra state": lambda: nn.Sequential(Stateful(4, 4)),
    "empty": lambda: with_buffer(torch.empty(0)),
    "one module twice": lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2),
    "compiled": lambda: torch.compile(nn.Linear(4, 4)),
    "compiled inside": lambda: nn.Sequential(torch.compile(nn.Linear(4, 4))),
    "data parallel": lambda: nn.DataParallel(nn.Linear(4, 4)),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_the_state_dict_comes_back_whole(make):
    m = make()
    flat = fs.flatten(m)
    state = flat.to_state_dict()
    assert list(state) == list(m.state_dict())
    m.load_state_dict(state)
    buffers = [b.name for b in flat.layout.buffers]
    again = FlatLayout.from_state_dict(m.state_dict(), buffers=buffers)
    assert flat.layout.difference(again) == ""


@pytest.mark.parametrize("name", ["complex", "sparse", "extra state"])
def test_what_a_message_cannot_carry_trains_and_is_refused_by_name(name):
    m = MODELS[name]()
    flat = fs.flatten(m)
    o = fs.optim.MaskedSGD(flat, lr=0.1)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    o.step()
    wanted = "_extra_state" if name == "extra state" else "table"
    for use in (lambda: fs.encode(flat, flat.mask), lambda: fs.FedMapServer(flat, None)):
        with pytest.raises(TypeError, match=wanted):
            use()


@pytest.mark.parametrize("wrap", ["compiled", "data parallel"])
def test_prefixes_of_wrappers_are_no_difference(wrap):
    plain, wrapped = fs.flatten(nn.Linear(4, 4)), fs.flatten(MODELS[wrap]())
    assert plain.layout.digest() == wrapped.layout.digest()
    data = fs.encode(plain, plain.mask)
    state = fs.decode(data, wrapped.layout).to_state_dict()
    wrapped.module.load_state_dict(state)
    assert torch.equal(wrapped.values, plain.values)


def test_a_plain_model_with_a_child_called_module_keeps_apart_what_differs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 4)
            self.head = nn.Linear(4, 4)

    names = [e.name for e in fs.flatten(Two()).layout.entries]
    assert "module.weight" in names
    assert fs.flatten(Two()).layout.difference(fs.flatten(Two()).layout) == ""


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), r"0\.weight: .*\[5, 4\]"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)), r"2\.weight"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), r"1\.running_mean"),
        (lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)), r"0\.bias"),
    ],
)
def test_difference_names_the_first_entry(other, says):
    base = fs.flatten(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))).layout
    there = fs.flatten(other()).layout
    found = base.difference(there)
    assert found
    import re

    assert re.search(says, found), found


@pytest.mark.parametrize(
    ("sender", "says"),
    [
        ({"prunable": lambda name, p: name == "0.weight"}, r"2\.weight: prunable here, not for"),
        ({"prunable": ["0.weight", "2.weight", "0.bias"]}, r"0\.bias: not prunable here, prunable"),
    ],
)
def test_a_message_of_another_layout_says_what_is_likely_to_differ(sender, says):
    def net():
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    theirs, ours = fs.flatten(net(), **sender), fs.flatten(net())
    with pytest.raises(fs.FormatError, match=says):
        fs.decode(fs.encode(theirs, theirs.mask), ours.layout)


def test_a_tied_sender_and_an_untied_receiver():
    class Tied(nn.Module):
        def __init__(self, tie):
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            if tie:
                self.b.weight = self.a.weight

    theirs, ours = fs.flatten(Tied(False)), fs.flatten(Tied(True))
    with pytest.raises(fs.FormatError, match=r"b\.weight: not tied for the sender"):
        fs.decode(fs.encode(theirs, theirs.mask), ours.layout)


@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_tied_by_their_memory_stay_tied(transposed):
    e, d = nn.Linear(8, 4), nn.Linear(4, 8) if transposed else nn.Linear(8, 4)
    d.weight.data = e.weight.data.t() if transposed else e.weight.data
    m = nn.ModuleList([e, d])
    flat = fs.flatten(m)
    assert flat.layout.aliases == (("1.weight", "0.weight"),)
    with torch.no_grad():
        e.weight[1, 2] = 7.0
    assert (d.weight[2, 1] if transposed else d.weight[1, 2]) == 7.0
    assert list(flat.to_state_dict()) == list(m.state_dict())
    assert flat.to_state_dict()["1.weight"].shape == d.weight.shape
    # both gradients count, once
    e.weight.grad, d.weight.grad = torch.ones_like(e.weight), 2 * torch.ones_like(d.weight)
    before = e.weight.detach().clone()
    fs.optim.MaskedSGD(flat, lr=0.1).step()
    torch.testing.assert_close(e.weight, before - 0.3)
    # across the wire, and in copies
    got = fs.decode(fs.encode(flat, flat.mask), flat.layout).to_state_dict()
    assert torch.equal(got["1.weight"], d.weight)
    assert FlatLayout.from_state_dict(m.state_dict()).digest() == flat.layout.digest()
    twin = copy.deepcopy(flat)
    twin.check_bound()  # bound at its first use
    with torch.no_grad():
        twin.module[0].weight.fill_(5.0)
    assert twin.module[1].weight.eq(5).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: [p[:20], p[10:30]], "a part of 0's"),
        (lambda p: [p[:1].expand(20)], "expanded"),
    ],
)
def test_memory_shared_in_part_is_refused(make, says):
    m = nn.ParameterList([nn.Parameter(t) for t in make(torch.ones(40))])
    with pytest.raises(ValueError, match=says):
        fs.flatten(m)


def test_meta_tensors_give_shapes():
    def build():
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    state = build().state_dict()
    with torch.device("meta"):
        like = build().state_dict()
        tied = build()
        tied[1].weight = tied[0].weight
    assert FlatLayout.from_state_dict(like).digest() == FlatLayout.from_state_dict(state).digest()
    assert FlatLayout.from_state_dict(tied.state_dict()).aliases == (("1.weight", "0.weight"),)
    got = fs.decode_state_dict(fs.encode_state_dict(state), like=like)
    assert torch.equal(got["0.weight"], state["0.weight"])


def a_round(make, change=lambda m: None):
    """One client's round; the server's and the client's modules."""
    models = [make(), make()]
    server = fs.FedMapServer(fs.flatten(models[0]), fs.schedule.Dense())
    client = fs.FedMapClient(fs.flatten(models[1]))
    server.begin_round()
    client.receive(server.broadcast(None))
    change(models[1])
    assert server.aggregate([(0, client.update(1))]).accepted == (0,)
    return models


BUFFERS = {
    "expanded": lambda: torch.arange(5).expand(3, -1),
    "expanded floats": lambda: torch.ones(1).expand(3),
    "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
    "uint16": lambda: torch.tensor([0, 65535], dtype=torch.uint16),
    "uint32": lambda: torch.tensor([0, 2**32 - 1], dtype=torch.uint32),
    "uint64": lambda: torch.tensor([0, 2**62], dtype=torch.uint64),
    "float64": lambda: torch.tensor([1 / 3], dtype=torch.float64),
}


@pytest.mark.parametrize("make", BUFFERS.values(), ids=list(BUFFERS))
def test_buffers_of_every_kind_go_round(make):
    for m in a_round(lambda: with_buffer(make())):
        assert m.table.dtype == make().dtype
        assert torch.equal(m.table, make())


def test_an_expanded_buffer_that_would_change_is_refused_by_name():
    server = fs.FedMapServer(fs.flatten(with_buffer(torch.arange(3.0))), fs.schedule.Dense())
    flat = fs.flatten(with_buffer(torch.ones(1).expand(3)))
    before = flat.values.clone()
    server.begin_round()
    with pytest.raises(fs.FormatError, match=r"table: .*expanded.*clone"):
        fs.FedMapClient(flat).receive(server.broadcast(None))
    assert torch.equal(flat.values, before)


def test_buffers_that_share_memory_stay_one():
    def make():
        m = with_buffer(torch.arange(6.0))
        m[0].register_buffer("part", m.table[:3])
        return m

    server, _ = a_round(make, lambda m: m.table.add_(1))
    assert torch.equal(server.table, torch.arange(6.0) + 1)
    assert torch.equal(server[0].part, server.table[:3])


@pytest.mark.parametrize("whole", [False, True])
def test_activation_checkpointing_is_no_difference(whole):
    def make(wrapped):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Linear(8, 4))
        if wrapped:
            m[0] = checkpoint_wrapper(m[0])
        return checkpoint_wrapper(m) if wrapped and whole else m

    plain, wrapped = fs.flatten(make(False)), fs.flatten(make(True))
    assert wrapped.layout == plain.layout
    assert wrapped.layout.reasons == plain.layout.reasons
    assert list(wrapped.to_state_dict()) == list(make(True).state_dict())
    server = fs.FedMapServer(plain, fs.schedule.OneShot(0.5, 0))
    server.begin_round()
    client = fs.FedMapClient(wrapped)
    client.receive(server.broadcast())
    wrapped.module(torch.ones(3, 8)).sum().backward()
    fs.optim.MaskedSGD(wrapped, lr=0.1).step()
    assert server.aggregate([(0, client.update(1))]).accepted == (0,)


def test_a_model_flattened_without_memory_gets_some():
    with torch.device("meta"):
        m = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    flat = fs.flatten(m)
    m.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"rebind\(\)"):
        flat.check_bound()
    flat.rebind()
    assert flat.mask == flat.layout.initial_mask()
    m(torch.ones(2, 8)).sum().backward()
    fs.optim.MaskedSGD(flat, lr=0.1).step()
