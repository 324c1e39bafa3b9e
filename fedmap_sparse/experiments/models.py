"""Models for experiments, by name. Any ``torch.nn.Module`` works through the Python API."""

from collections.abc import Callable
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]


def build(name: str, shape: Shape, classes: int) -> nn.Module:
    """The model ``name`` for samples of ``shape`` and so many classes.

    Maps float32 [batch, *shape] to logits [batch, classes]. Images are (channels, height, width);
    an mlp takes any shape. Initial weights come from torch's global generator. Raises ValueError
    for a name or a size it cannot be.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}: it is one of {', '.join(MODELS)}")
    if min(shape) < 1 or classes < 2:
        raise ValueError(f"cannot build {name} for samples of {shape} and {classes} classes")
    if len(shape) != 3 and name != "mlp":
        raise ValueError(
            f"{name} takes images (channels, height, width), and samples are {shape}; mlp takes any"
        )
    return MODELS[name](shape, classes)


def mlp(shape: Shape, classes: int) -> nn.Module:
    """Two hidden layers of 200: 0.2 M parameters on 28×28 (the 2NN of McMahan et al., 2017)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(prod(shape), 200),
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


def lenet(shape: Shape, classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling: 61,706 parameters on 28×28."""
    channels, height, width = shape
    if min(height, width) < 12:
        raise ValueError(f"lenet takes images of 12×12 or more, not {shape}")
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
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


def resnet56(shape: Shape, classes: int) -> nn.Module:
    """Nine blocks a stage: 853,018 parameters on three channels with 10 classes."""
    return _resnet(9, shape, classes)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, one filter a channel, narrow; a shortcut where shapes agree."""

    def __init__(self, channels_in: int, channels: int, stride: int, widen: int) -> None:
        super().__init__()
        hidden = widen * channels_in
        self.is_residual = stride == 1 and channels_in == channels
        layers: list[nn.Module] = []
        if widen > 1:
            layers += [
                nn.Conv2d(channels_in, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(),
            ]
        self.layers = nn.Sequential(
            *layers,
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.is_residual else y


#: Of MobileNetV2 (table 2 of Sandler et al., 2018): widening, channels, blocks, stride.
_MOBILENET = (
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip


def mobilenetv2(shape: Shape, classes: int) -> nn.Module:
    """MobileNetV2 for 32×32: the first two strides are 1, as is usual on CIFAR. 2,236,682
    parameters on three channels with 10 classes."""
    blocks = []
    channels_in = 32
    for widen, channels, count, stride in _MOBILENET:
        for block in range(count):
            step = stride if block == 0 else 1
            blocks.append(InvertedResidual(channels_in, channels, step, widen))
            channels_in = channels
    return nn.Sequential(
        nn.Conv2d(shape[0], 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        *blocks,
        nn.Conv2d(channels_in, 1280, 1, bias=False),
        nn.BatchNorm2d(1280),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1280, classes),
    )


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "lenet": lenet,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "mobilenetv2": mobilenetv2,
}

#: Models that a CPU computes faster on images that are NHWC in memory: those of convolutions. A
#: step took 0.74 (cnn), 0.89 (lenet), 0.90 (resnet8), 0.84 (resnet20) and 0.67 (mobilenetv2) of its
#: CPU time in NCHW, evaluation of the cnn 0.44 (one thread of an EPYC, torch 2.13).
NHWC = frozenset(MODELS) - {"mlp"}
