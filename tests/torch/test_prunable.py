"""The default rule: which parameters are pruned, by the type of the module that owns them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fedmap_sparse as fs
from fedmap_sparse import FlatLayout
from fedmap_sparse.bench.models import MODELS
from fedmap_sparse.experiments.models import build


class Own(nn.Module):
    def __init__(self, **parameters):
        super().__init__()
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


class Relative(nn.Module):
    def __init__(self):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(32, 4)
        self.pos_encoding = nn.Embedding(32, 4)
        self.q = nn.Linear(4, 4)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(9, 4), nn.Embedding(5, 4)
        self.position_embeddings = nn.Embedding(5, 4)


CASES = {
    "linear": (nn.Linear(4, 1), ["weight"]),
    "bilinear": (nn.Bilinear(2, 3, 4), ["weight"]),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), ["weight"]),
    "one by one": (nn.Conv1d(1, 4, 1), ["weight"]),
    "transposed": (nn.ConvTranspose3d(2, 3, 2), ["weight"]),
    "embedding bag": (nn.EmbeddingBag(9, 4), ["weight"]),
    "lstm": (
        nn.LSTM(4, 8, proj_size=2),
        ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"],
    ),
    "gru cell": (nn.GRUCell(3, 4), ["weight_ih", "weight_hh"]),
    "attention": (
        nn.MultiheadAttention(8, 2, add_bias_kv=True),
        ["in_proj_weight", "out_proj.weight"],
    ),
    "attention of other widths": (
        nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    "layer norm of an image": (nn.LayerNorm([8, 6, 6]), []),
    "batch norm": (nn.BatchNorm2d(4), []),
    "rms norm": (nn.RMSNorm((4, 4)), []),
    "a norm of somebody's": (LlamaRMSNorm(), []),
    "prelu": (nn.PReLU(4), []),
    "layer scale": (Own(layer_scale=(8, 1, 1), gamma=(4, 4)), []),
    "tokens": (Own(cls_token=(1, 1, 8), mask_token=(1, 1, 8)), []),
    "positions": (Own(pos_embed=(1, 16, 8), relative_position_bias_table=(9, 4)), []),
    "relative positions": (Relative(), ["q.weight"]),
    "tables of positions": (Positions(), ["wte.weight"]),
    "a matrix of somebody's": (Own(w=(4, 5), bias=(4, 5)), ["w"]),
    "experts": (Own(experts=(3, 4, 5)), ["experts"]),
    "weight norm": (
        parametrizations.weight_norm(nn.Linear(4, 5)),
        ["parametrizations.weight.original1"],
    ),
    "spectral norm": (
        parametrizations.spectral_norm(nn.Linear(4, 5)),
        ["parametrizations.weight.original"],
    ),
    "parametrised norm": (
        parametrizations.spectral_norm(nn.LayerNorm([4, 4])),
        [],
    ),
}


@pytest.mark.parametrize(("module", "wanted"), CASES.values(), ids=list(CASES))
def test_by_module_type(module, wanted):
    layout = fs.flatten(module).layout
    assert [e.name for e in layout.prunable_entries] == wanted
    text = layout.describe()
    assert len(text.splitlines()) == 1 + len(layout.entries) + len(layout.aliases) + len(
        layout.buffers
    )
    for e, reason in zip(layout.entries, layout.reasons, strict=True):
        assert reason
        assert f"{e.name} " in text


def matrices(name, tensor):
    return tensor.ndim > 1


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet8", "resnet20"])
def test_layouts_of_the_models_of_experiments_are_as_they_were(name):
    model = build(name, (3, 32, 32), 10)
    assert FlatLayout.from_state_dict(model.state_dict()) == fs.flatten(model).layout
    assert fs.flatten(model, prunable=matrices).layout == fs.flatten(model).layout


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
def test_layouts_of_the_models_of_benchmarks_are_as_they_were(name):
    model = MODELS[name][0]()
    assert fs.flatten(model, prunable=matrices).layout == fs.flatten(model).layout


def test_names_as_the_rule():
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layout = fs.flatten(m, prunable=["1.weight"]).layout
    assert [e.name for e in layout.prunable_entries] == ["1.weight"]
    state = m.state_dict()
    assert FlatLayout.from_state_dict(state, prunable=["1.weight"]) == layout
    with pytest.raises(ValueError, match=r"\['2\.weight'\]"):
        fs.flatten(m, prunable=["2.weight"])
