import copy
import pickle

import numpy as np
import pytest
import torch
from flat_models import Tied, small
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.flat import flatten
from fedmap_sparse.layout import FlatLayout


def test_offsets_padding_and_counts():
    layout = flatten(small()).layout
    found = [(e.name, e.shape, e.offset, e.numel) for e in layout.entries]
    assert found == [
        ("0.weight", (3, 1, 3, 3), 0, 27),
        ("3.weight", (5, 3), 128, 15),
        ("0.bias", (3,), 256, 3),
        ("1.weight", (3,), 264, 3),
        ("1.bias", (3,), 272, 3),
        ("3.bias", (5,), 280, 5),
    ]
    assert (layout.prunable_numel, layout.numel, layout.tail_numel) == (256, 288, 32)
    assert layout.eligible == 42
    assert [(b.name, b.shape, b.kind) for b in layout.buffers] == [
        ("1.running_mean", (3,), "float"),
        ("1.running_var", (3,), "float"),
        ("1.num_batches_tracked", (), "int"),
    ]


def test_a_device_keeps_the_initial_mask_and_pickles_do_not():
    layout = flatten(small()).layout
    there = layout.initial_mask("meta:0")
    assert there.words.device.type == "meta"
    assert layout.initial_mask("meta:0") is there
    assert layout.initial_mask().words.device.type == "cpu"
    for copied in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert copied == layout
        assert copied.initial_mask("meta:0") is not there


@pytest.mark.parametrize("make", [small, Tied])
def test_from_state_dict_gives_the_same_digest(make):
    model = make()
    state = model.state_dict()
    assert FlatLayout.from_state_dict(state).digest() == flatten(make()).layout.digest()
    arrays = {name: t.numpy() for name, t in state.items()}
    assert FlatLayout.from_state_dict(arrays).digest() == flatten(model).layout.digest()
    # What crossed a wire shares no memory: ties are named then.
    apart = {name: np.array(a) for name, a in arrays.items()}
    ties = dict(flatten(make()).layout.aliases)
    assert (
        FlatLayout.from_state_dict(apart, aliases=ties).digest() == flatten(make()).layout.digest()
    )


def test_digest_says_names_shapes_order_and_buffers_but_not_dtype():
    base = flatten(small()).layout.digest()
    assert flatten(small().to(torch.bfloat16)).layout.digest() == base
    wider = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 6))
    unbuffered = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(3, 5)
    )
    swapped = nn.Sequential(nn.Linear(3, 5), nn.Conv2d(1, 3, 3))
    others = [flatten(m).layout.digest() for m in (wider, unbuffered, swapped)]
    others.append(flatten(small(), prunable=lambda name, p: p.ndim == 2).layout.digest())
    assert len({base, *others}) == 5


def test_json_comes_back_equal():
    for make in (small, Tied):
        layout = flatten(make()).layout
        read = FlatLayout.from_json(layout.to_json(), max_numel=10_000)
        assert read == layout
        assert read.digest() == layout.digest()


def _json(**change):
    import json

    return json.dumps(json.loads(flatten(small()).layout.to_json()) | change)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "JSON of a layout"),
        ("[]", "JSON of a layout"),
        ("{}", "JSON of a layout"),
        ("[" * 100_000, "JSON of a layout"),
        (_json(parameters=[["w", [1 << 50, 1 << 50], True]]), "expected"),
        (_json(parameters=[["w", [-1], True]]), "JSON of a layout"),
        (_json(parameters=[["w", [True], True]]), "JSON of a layout"),
        (_json(parameters=[["w", [2], 1]]), "JSON of a layout"),
        (_json(parameters=[[3, [2], True]]), "JSON of a layout"),
        (_json(aliases=[["a", "nothing"]]), "expected"),
        (_json(names=["nothing"]), "names"),
        (_json(buffers=[["b", [100_000], "float"]], names=[]), "at most 1000 elements"),
    ],
)
def test_json_is_not_trusted(text, says):
    with pytest.raises(ValueError, match=says):
        FlatLayout.from_json(text, max_numel=1000)


def test_slice_mask_is_the_part_over_one_tensor():
    flat = flatten(small())
    mask = fs.ops.prune_(flat.prunable, 20, within=flat.mask)
    for name, keep in flat.layout.mask_dict(mask).items():
        assert torch.equal(flat.layout.slice_mask(mask, name).to_bool(), keep.flatten())
    for name in ("0.bias", "nothing"):
        with pytest.raises(ValueError, match=name):
            flat.layout.slice_mask(mask, name)
    with pytest.raises(ValueError, match="256"):
        flat.layout.slice_mask(fs.Mask.full(3), "0.weight")
