"""Models for experiments, by name. Any ``torch.nn.Module`` works through the Python API."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]


def build(name: str, shape: Shape, classes: int) -> nn.Module:
    """The model ``name`` for images of ``shape`` (channels, height, width) and so many classes.

    Maps float32 [batch, channels, height, width] to logits [batch, classes]. Initial weights come
    from torch's global generator. Raises ValueError for a name or a size it cannot be.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}: it is one of {', '.join(MODELS)}")
    if min(shape) < 1 or classes < 2:
        raise ValueError(f"cannot build {name} for images of {shape} and {classes} classes")
    return MODELS[name](shape, classes)


def mlp(shape: Shape, classes: int) -> nn.Module:
    """Two hidden layers of 200: 0.2 M parameters on 28×28 (the 2NN of McMahan et al., 2017)."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, classes),
    )


def cnn(shape: Shape, classes: int) -> nn.Module:
    """Two convolutions and two linear layers: 824,458 parameters on 28×28 with 10 classes."""
    channels, height, width = shape
    if min(height, width) < 4:
        raise ValueError(f"cnn halves its images twice: they must be 4×4 or more, not {shape}")
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut without parameters."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if channels_in == channels else 2
        self.added_channels = channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        # The shortcut skips every other pixel and adds channels of zeros (option A of the paper).
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, 0, self.added_channels)))


def _resnet(blocks: int, shape: Shape, classes: int) -> nn.Module:
    """The CIFAR form of He et al. (2016): three stages of ``blocks``, 6 × blocks + 2 layers."""
    stages = [
        ResidualBlock(channels_in if block == 0 else channels, channels)
        for channels_in, channels in ((16, 16), (16, 32), (32, 64))
        for block in range(blocks)
    ]
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def resnet8(shape: Shape, classes: int) -> nn.Module:
    """One block a stage: 75,002 parameters on one channel with 10 classes."""
    return _resnet(1, shape, classes)


def resnet20(shape: Shape, classes: int) -> nn.Module:
    """Three blocks a stage: 269,722 parameters on three channels with 10 classes."""
    return _resnet(3, shape, classes)


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet8": resnet8,
    "resnet20": resnet20,
}
