"""Views that are none any more: refused at every use, by name and with the remedy, or followed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedSGD

# torch.compile imports what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

REBIND, REFLATTEN = r"rebind\(\)", r"fs\.flatten\(model\)"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def old_weight_norm(m):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(m[0])


BREAKS = {
    # what a user does: the tensor that is named, the remedy
    "half": (lambda m: m.bfloat16(), "0.weight", REBIND),
    "data": (lambda m: setattr(m[2].weight, "data", torch.ones(4, 8)), "2.weight", REBIND),
    "replaced parameter": (
        lambda m: setattr(m[2], "bias", nn.Parameter(torch.ones(4))),
        "2.bias",
        REBIND,
    ),
    "replaced layer": (lambda m: m.__setitem__(2, nn.Linear(8, 4)), "2.weight", REBIND),
    "assigned state": (
        lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
        "0.weight",
        REBIND,
    ),
    "vector_to_parameters": (
        lambda m: nn.utils.vector_to_parameters(
            torch.ones(sum(p.numel() for p in m.parameters())), m.parameters()
        ),
        "0.weight",
        REBIND,
    ),
    "flattened again": (lambda m: fs.flatten(m), "0.weight", REBIND),
    "to_empty": (lambda m: m.to_empty(device="cpu"), "0.weight", REBIND),
    "another head": (lambda m: m.__setitem__(2, nn.Linear(8, 3)), "2.weight", REFLATTEN),
    "removed layer": (lambda m: m.__delitem__(2), "2.weight", REFLATTEN),
    "added layer": (lambda m: m.append(nn.Linear(4, 4)), "3.weight", REFLATTEN),
    "added parameter": (
        lambda m: m[0].register_parameter("extra", nn.Parameter(torch.ones(2))),
        "0.extra",
        REFLATTEN,
    ),
    "bias taken away": (lambda m: setattr(m[0], "bias", None), "0.bias", REFLATTEN),
    "spectral norm": (
        lambda m: parametrizations.spectral_norm(m[0]),
        "0.weight",
        REFLATTEN,
    ),
    "weight norm": (lambda m: parametrizations.weight_norm(m[0]), "0.weight", REFLATTEN),
    "old weight norm": (old_weight_norm, "0.weight", REFLATTEN),
    "torch's prune": (
        lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
        "0.weight",
        REFLATTEN,
    ),
}


def step_of(flat):
    o = MaskedSGD(flat, lr=0.1)
    for p in flat.parameters:
        p.grad = torch.zeros_like(p)
    return o.step


def server_of(flat):
    return fs.FedMapServer(flat, fs.schedule.Dense())


def received(flat):
    other = server_of(fs.flatten(net()))
    other.begin_round()
    client = fs.FedMapClient(flat)
    return client, other.broadcast(None)


def uses(flat):
    """Each use of a flat model, made before the model is broken."""
    client, data = received(flat)
    answering, more = received(flat)
    answering.receive(more)
    server = server_of(flat)
    return {
        "step": step_of(flat),
        "encode": lambda: fs.encode(flat, flat.mask),
        "state export": flat.to_state_dict,
        "begin_round": server.begin_round,
        "receive": lambda: client.receive(data),
        "update": lambda: answering.update(1),
        "snapshot": server.snapshot,
    }


@pytest.mark.parametrize("use", list(uses(fs.flatten(net()))))
@pytest.mark.parametrize("name", BREAKS)
def test_each_use_names_the_parameter_and_the_remedy(name, use):
    broken, parameter, remedy = BREAKS[name]
    m = net()
    flat = fs.flatten(m)
    call = uses(flat)[use]
    call_again = uses(flat)[use]
    if use != "update":
        call()
    broken(m)
    with pytest.raises(RuntimeError, match=rf"(?s){parameter.replace('.', '[.]')}.*{remedy}"):
        call_again()


@pytest.mark.parametrize("name", BREAKS)
def test_rebind_follows_or_says_what_to_do(name):
    broken, parameter, remedy = BREAKS[name]
    m = net()
    flat = fs.flatten(m)
    broken(m)
    if remedy == REFLATTEN:
        before = flat.values.clone()
        with pytest.raises(ValueError, match=parameter.replace(".", "[.]")):
            flat.rebind()
        assert torch.equal(flat.values, before)
        flat = fs.flatten(m)
    else:
        wanted = copy.deepcopy(m.state_dict())
        flat.rebind()
        for key, value in wanted.items():
            torch.testing.assert_close(m.state_dict()[key], value, equal_nan=True)
    flat.check_bound()


def test_aggregate_is_refused_too_and_the_round_can_go_on():
    m = net()
    server = server_of(fs.flatten(m))
    client = fs.FedMapClient(fs.flatten(net()))
    server.begin_round()
    client.receive(server.broadcast(None))
    update = client.update(1)
    weight = m[0].weight
    m[0].weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        server.aggregate([(0, update)])
    m[0].weight = weight
    assert server.aggregate([(0, update)]).accepted == (0,)


def test_an_added_metric_without_parameters_is_followed():
    m = net()
    step = step_of(fs.flatten(m))
    m.add_module("metric", nn.Identity())
    m[0].register_buffer("seen", torch.zeros(1), persistent=False)
    step()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m[1].register_buffer("more", torch.ones(2)), "1.more: expected no buffer"),
        (lambda m: setattr(m[1], "running_mean", torch.ones(9)), "1.running_mean"),
        (lambda m: setattr(m[1], "running_mean", torch.ones(8, dtype=torch.int64)), "int"),
        (lambda m: delattr(m[1], "running_var"), "1.running_var"),
        (lambda m: setattr(m[1].running_mean, "data", torch.ones(2, 4)), "1.running_mean"),
        (lambda m: setattr(m[1].running_mean, "data", torch.ones(8, dtype=torch.int64)), "int"),
        (
            lambda m: m[1].register_buffer("running_var", m[1].running_var, persistent=False),
            "1.running_var: expected a buffer",
        ),
    ],
)
@pytest.mark.parametrize("looks", [0, 1, 3])
def test_changed_buffers_are_refused_by_name(change, says, looks):
    m = net()
    flat = fs.flatten(m)
    for _ in range(looks):  # what was seen before does not hide it
        assert flat.buffers.keys() == dict(m.named_buffers()).keys()
    change(m)
    with pytest.raises(RuntimeError, match=says.replace(".", "[.]")):
        fs.encode(flat, flat.mask)


def test_a_replaced_buffer_is_the_one_that_is_read():
    m = net()
    flat = fs.flatten(m)
    for value in (2.0, 3.0, 4.0):
        for _ in range(2):
            m[1].running_mean = torch.full((8,), value)
            assert flat.buffers["1.running_mean"] is m[1].running_mean
        flat.buffers.clear()  # the caller's own


def test_what_torch_wraps_stays_bound():
    m = net()
    flat = fs.flatten(m)
    torch.compile(m)
    nn.DataParallel(m)
    m.share_memory()
    m.train()
    m.requires_grad_(False)
    m.load_state_dict(net().state_dict())
    m.to("cpu").float()
    flat.check_bound()


def test_a_scripted_module_is_refused_by_name():
    with pytest.raises(TypeError, match="ScriptModule"):
        fs.flatten(torch.jit.script(nn.Linear(4, 4)))


def test_a_model_without_memory_reaches_no_kernel():
    flat = fs.flatten(nn.Linear(4, 4).to("meta"))
    o = MaskedSGD(flat, lr=0.1)
    for p in flat.parameters:
        p.grad = torch.zeros_like(p)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        o.step()


def test_a_renamed_layer_is_named_by_both_names():
    m = nn.ModuleDict({"a": nn.Linear(8, 4), "c": nn.Linear(4, 4)})
    step = step_of(fs.flatten(m))
    m["b"] = m.pop("a")
    with pytest.raises(RuntimeError, match=r"a\.weight: .*none, but b\.weight"):
        step()


class Viewing(nn.Linear):
    """Keeps a view of its weight: as an attribute, a buffer, or a buffer of a part of it."""

    def __init__(self, how):
        super().__init__(8, 4)
        if how == "attribute":
            self.seen = self.weight.t()
        else:
            part = self.weight.data if how == "buffer" else self.weight.data[2:]
            self.register_buffer("seen", part, persistent=how == "buffer")


@pytest.mark.parametrize("how", ["attribute", "buffer", "part"])
def test_a_view_that_would_keep_the_old_memory_is_refused_by_name(how):
    m = nn.Sequential(nn.Linear(8, 8), Viewing(how))
    with pytest.raises(ValueError, match=r"1\.seen: expected memory of its own.* 1\.weight"):
        fs.flatten(m)
    m[1].seen = m[1].seen.detach().clone()
    fs.flatten(m).check_bound()


def test_a_view_that_a_hook_makes_anew_is_none_to_refuse():
    m = nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 4))
    flat = fs.flatten(m)
    m(torch.ones(2, 8)).sum().backward()
    MaskedSGD(flat, lr=0.1).step()


@pytest.mark.parametrize("how", ["one Parameter", "one memory"])
def test_a_tie_that_is_made_after_flatten_is_refused_by_name(how):
    m = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    flat = fs.flatten(m)
    step = step_of(flat)
    if how == "one Parameter":
        m[1].weight = m[0].weight
    else:
        m[1].weight.data = m[0].weight.data
    with pytest.raises(RuntimeError, match=r"1\.weight .*rebind\(\)"):
        step()
    with pytest.raises(ValueError, match=rf"1\.weight: .* 0\.weight's.*{REFLATTEN}"):
        flat.rebind()
    assert len(fs.flatten(m).layout.aliases) == 1


def test_memory_that_processes_share_stays_shared():
    m = net()
    m.share_memory()
    fs.flatten(m)
    assert all(p.is_shared() for p in m.parameters())
    assert not any(p.is_shared() for p in fs.flatten(net()).parameters)
