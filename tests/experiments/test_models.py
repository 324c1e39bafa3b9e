"""experiments/models.py: shapes, sizes, and what can be pruned in them."""

import pytest
import torch
from torch import nn

from fedmap_sparse.experiments import models


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (2, 9, 13)])
def test_maps_images_to_logits_and_every_parameter_learns(name: str, shape) -> None:
    if name == "lenet" and min(shape[1:]) < 12:
        with pytest.raises(ValueError, match="lenet takes images of 12×12 or more"):
            models.build(name, shape, classes=7)
        return
    if name in ("resnet56", "mobilenetv2") and shape[1] > 9:
        pytest.skip("large models on small images: seconds otherwise")
    model = models.build(name, shape, classes=7)
    logits = model(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 6])).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("mlp", (1, 28, 28), 199_210),  # the paper's 2NN
        ("cnn", (1, 28, 28), 824_458),
        ("lenet", (1, 28, 28), 61_706),  # LeNet-5 of LeCun et al., with full connections
        ("resnet8", (1, 28, 28), 75_002),
        ("resnet20", (3, 32, 32), 269_722),  # 0.27 M in table 6 of He et al.
        ("resnet56", (3, 32, 32), 853_018),  # 0.85 M, likewise
        ("mobilenetv2", (3, 32, 32), 2_236_682),
    ],
)
def test_sizes(name: str, shape, count: int) -> None:
    assert parameters(models.build(name, shape, classes=10)) == count


def test_the_seed_decides_the_weights() -> None:
    for name in models.MODELS:
        weights = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            weights.append(
                nn.utils.parameters_to_vector(models.build(name, (1, 12, 12), 10).parameters())
            )
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


def test_mobilenet_blocks_narrow_and_halve() -> None:
    block = models.InvertedResidual(16, 16, 1, 6).eval()
    nn.init.zeros_(block.layers[-1].weight)  # leaves the shortcut alone
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x), x)
    assert models.InvertedResidual(16, 24, 2, 6)(x).shape == (2, 24, 4, 4)


@pytest.mark.parametrize("shape", [(40,), (12, 5)])
def test_tables_and_sequences_go_to_the_mlp_alone(shape: tuple[int, ...]) -> None:
    assert models.build("mlp", shape, 3)(torch.rand(2, *shape)).shape == (2, 3)
    with pytest.raises(ValueError, match="cnn takes images"):
        models.build("cnn", shape, 3)


@pytest.mark.parametrize("shape", [(1, 6, 6), (1, 7, 5)])
def test_residual_shortcut_is_the_input_thinned_and_padded(shape) -> None:
    block = models.ResidualBlock(16, 32).eval()
    nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone
    x = torch.rand(2, 16, *shape[1:])
    y = block(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert torch.equal(y[:, 16:], torch.zeros_like(y[:, 16:]))


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_depth_is_in_the_name(name: str) -> None:
    model = models.build(name, (3, 32, 32), 10)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "message"),
    [
        ("vgg", (1, 28, 28), 10, "no model 'vgg': it is one of mlp, cnn, lenet, resnet8"),
        ("cnn", (1, 28, 3), 10, "4×4 or more"),
        ("mlp", (0, 28, 28), 10, "cannot build mlp"),
        ("mlp", (1, 28, 28), 1, "and 1 classes"),
    ],
)
def test_impossible(name: str, shape, classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(name, shape, classes)
