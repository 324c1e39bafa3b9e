"""An optimizer's state as users and tools treat it: own entries, edits in place, DCP, capture."""

import copy
import types

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_training import net, same, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedAdamW, MaskedSGD

PAIRS = [
    pytest.param(MaskedSGD, {"lr": 0.05, "momentum": 0.9}, id="sgd"),
    pytest.param(MaskedAdamW, {"lr": 0.01, "amsgrad": True}, id="adamw"),
]


def pruned(m):
    flat = fs.flatten(m)
    flat.mask = fs.ops.prune_(flat.prunable, 70, within=flat.mask)
    return flat


@pytest.mark.parametrize(("ours", "kw"), PAIRS)
def test_state_is_shown_under_a_default_dtype_that_numpy_lacks(ours, kw):
    m = net()
    o = ours(pruned(m), **kw)
    train(m, o, 0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = o.state
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(found) == set(m.parameters())


@pytest.mark.parametrize(("ours", "kw"), PAIRS)
def test_a_users_entries_are_kept_saved_copied_and_loaded(ours, kw):
    m = net()
    o = ours(pruned(m), **kw)
    train(m, o, 0)
    for p in m.parameters():
        o.state[p]["seen"] = torch.ones(2)
    train(m, o, 1)
    fresh = net()
    again = ours(fs.flatten(fresh), **kw)
    again.load_state_dict(o.state_dict())
    twin, copied = copy.deepcopy((m, o))
    for model, each in ((m, o), (fresh, again), (twin, copied)):
        for p in model.parameters():
            assert each.state[p]["seen"].eq(1).all()
    fresh.load_state_dict(m.state_dict())
    for model, each in ((m, o), (fresh, again), (twin, copied)):
        train(model, each, 2)
    same(m, fresh, rtol=0, atol=0)
    same(m, twin, rtol=0, atol=0)


T = torch.optim
OTHERS = [
    *((ours, theirs, {}) for ours in (MaskedSGD, MaskedAdamW) for theirs in (T.Adagrad, T.RMSprop)),
    (MaskedSGD, T.RMSprop, {"momentum": 0.9}),
    (MaskedAdamW, T.Adamax, {}),
    (MaskedAdamW, T.NAdam, {}),
]


@pytest.mark.parametrize(("ours", "theirs", "kw"), OTHERS)
def test_the_state_of_another_optimizer_is_refused(ours, theirs, kw):
    m = net()
    twin = copy.deepcopy(m)
    other = theirs(twin.parameters(), lr=0.1, **kw)
    train(twin, other, 0)
    with pytest.raises(ValueError, match=r"state\[0\]: expected the state"):
        ours(fs.flatten(m), lr=0.1).load_state_dict(other.state_dict())


def test_a_count_that_was_written_in_place_counts():
    m = net()
    twin = copy.deepcopy(m)
    a, b = MaskedAdamW(fs.flatten(m), lr=0.01), torch.optim.AdamW(twin.parameters(), lr=0.01)
    for change in (None, 0.0, 40.0):
        for model, o in ((m, a), (twin, b)):
            for of_one in list(o.state.values()):
                of_one["step"].fill_(change)
            train(model, o, 1)
        same(m, twin)
    assert {float(s["step"]) for s in a.state.values()} == {41.0}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("ours", "kw"), PAIRS)
@pytest.mark.parametrize("way", ["flattened", "files"])
def test_packed_state_through_dcp_under_the_mask_it_was_saved_with(ours, kw, way, tmp_path):
    """Neither way carries masks: one asks for the names in `state[p]`, one for the same sizes."""
    options = StateDictOptions(flatten_optimizer_state_dict=way == "flattened")
    m = net()
    flat = pruned(m)
    o = ours(flat, **kw)
    train(m, o, 0)
    of_model, of_optimizer = get_state_dict(m, o, options=options)
    fresh = net()
    again = ours(fs.flatten(fresh), **kw)
    if way == "flattened":
        with pytest.raises(ValueError, match=r"0\.weight.*set the mask"):
            set_state_dict(
                fresh,
                again,
                model_state_dict=of_model,
                optim_state_dict=of_optimizer,
                options=options,
            )
    again.flat.mask = flat.mask
    if way == "files":
        dcp.save({"m": of_model, "o": of_optimizer}, checkpoint_id=tmp_path, no_dist=True)
        of_model, of_optimizer = get_state_dict(fresh, again)
        dcp.load({"m": of_model, "o": of_optimizer}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        fresh, again, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options
    )
    train(m, o, 1)
    train(fresh, again, 1)
    same(m, fresh, rtol=0, atol=0)


@pytest.mark.parametrize("ours", [MaskedSGD, MaskedAdamW])
def test_a_step_in_a_cuda_graph_is_refused(ours, monkeypatch):
    """No GPU here: a buffer says that it is on one, and torch that a capture is under way."""
    m = net()
    o = ours(fs.flatten(m), lr=0.1)
    before = o.flat.values.clone()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    train(m, o, 0)  # on a CPU: none of its business
    assert not torch.equal(o.flat.values, before)
    o.flat.values = types.SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"expected capturable=True while a CUDA graph"):
        o.step()


def test_adams_weight_decay_is_not_adamws():
    m = net()
    o = MaskedAdamW(fs.flatten(m), lr=0.1)
    other = T.Adam(net().parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="decoupled_weight_decay: expected AdamW's"):
        o.load_state_dict(other.state_dict())
    assert o.param_groups[0]["weight_decay"] == MaskedAdamW(o.flat).param_groups[0]["weight_decay"]


def test_states_of_torch_load_one_after_another():
    o = MaskedAdamW(fs.flatten(net()), lr=0.1)
    for options in ({"foreach": True}, {}, {"fused": True}, {"amsgrad": True}):
        o.load_state_dict(T.AdamW(net().parameters(), lr=0.1, **options).state_dict())


@pytest.mark.parametrize("lr", ["0.1", None, 1j, torch.ones(2), 10**400, float("inf"), -1.0])
@pytest.mark.parametrize("ours", [MaskedSGD, MaskedAdamW])
def test_a_learning_rate_is_a_finite_number(ours, lr):
    flat = fs.flatten(net())
    with pytest.raises((TypeError, ValueError), match="lr: expected"):
        ours(flat, lr=lr)
    o = ours(flat, lr=0.1)
    with pytest.raises((TypeError, ValueError), match="lr: expected"):
        o.add_param_group({"params": [], "lr": lr})
    saved = o.state_dict()
    saved["param_groups"][0]["lr"] = lr
    with pytest.raises((TypeError, ValueError), match="lr: expected"):
        o.load_state_dict(saved)
    assert o.param_groups[0]["lr"] == 0.1
