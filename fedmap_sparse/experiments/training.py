"""What a client does with its samples, and what the server does with held-out ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmap_sparse.codec import Message
from fedmap_sparse.engines.in_process import generator
from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.data import Split
from fedmap_sparse.experiments.partition import Index
from fedmap_sparse.federated import ClientId, FedMapClient, MakeOptimizer
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.optim import MaskedAdamW, MaskedOptimizer, MaskedSGD

_EVALUATION_BATCH = 500


class LocalTraining:
    """Epochs of minibatches over a client's samples, with cross-entropy.

    The order of samples, and torch's generator for what the model draws, depend on (seed, round,
    client) alone. The last batch of an epoch may be smaller.

    Args:
        samples: of each client, on the device to train on.
        phases: `train` is forward and backward, `step` the optimizer's, `batch` drawing samples.
    """

    def __init__(self, config: Config, samples: Mapping[ClientId, Split], phases: Phases) -> None:
        self._config = config
        self._samples = samples
        self._phases = phases
        self._order = {name: i for i, name in enumerate(sorted(samples))}
        self._device = next(iter(samples.values())).labels.device

    def __call__(
        self, name: ClientId, client: FedMapClient, message: Message
    ) -> tuple[int, float | None]:
        """Train `client` in place; its number of samples and its mean loss."""
        config, phases, samples = self._config, self._phases, self._samples[name]
        optimizer, module = client.optimizer, client.params.module
        assert optimizer is not None
        rng = generator(config.seed, 1, message.round, self._order[name])
        self._seed(int(rng.integers(2**63)))
        module.train()
        device = self._device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for _ in range(config.local_epochs):
            order = torch.from_numpy(rng.permutation(len(samples))).to(device)
            # torch takes no batch of 2^63 samples, and none is larger than all of them.
            for chosen in order.split(min(config.batch_size, len(samples))):
                with phases("batch"):
                    images, labels = samples.images[chosen], samples.labels[chosen]
                with phases("train"):
                    loss = F.cross_entropy(module(images), labels)
                    loss.backward()
                    total += loss.detach() * len(labels)
                with phases("step"):
                    optimizer.step()
                    optimizer.zero_grad()
        mean = total.item() / (config.local_epochs * len(samples))
        return len(samples), mean

    def _seed(self, seed: int) -> None:
        """Seed what the model may draw from: the generators of the CPU and of the device.

        `torch.manual_seed` seeds those of every device that could be there, which takes 0.27 ms,
        as long as a small client's step.
        """
        if self._device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)


def make_optimizer(config: Config) -> MakeOptimizer:
    """The optimizer that the options name, for a FedMapClient."""

    def make(params: FlatParameters, mask: Mask, lr: float | None) -> MaskedOptimizer:
        rate = config.learning_rate(0) if lr is None else lr
        if config.optimizer == "adamw":
            return MaskedAdamW(params, mask, lr=rate, weight_decay=config.weight_decay)
        assert config.momentum is not None
        return MaskedSGD(
            params, mask, lr=rate, momentum=config.momentum, weight_decay=config.weight_decay
        )

    return make


def share_out(split: Split, parts: list[Index], device: torch.device) -> dict[ClientId, Split]:
    """Each client's own samples: clients are numbered from 0."""
    chosen = [torch.from_numpy(part) for part in parts]
    return {
        i: Split(split.images[c].to(device), split.labels[c].to(device))
        for i, c in enumerate(chosen)
    }


class Evaluation(NamedTuple):
    """Accuracy, mean cross-entropy (None where it is not finite), and which samples were right."""

    accuracy: float
    loss: float | None
    right: Tensor


@torch.no_grad()
def evaluate(module: nn.Module, split: Split) -> Evaluation:
    """How a module does on held-out samples, in evaluation mode."""
    module.eval()
    right, total = [], 0.0
    for images, labels in zip(
        split.images.split(_EVALUATION_BATCH), split.labels.split(_EVALUATION_BATCH), strict=True
    ):
        logits: Tensor = module(images)
        right.append(logits.argmax(1) == labels)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
    found = torch.cat(right)
    loss = total / len(split)
    return Evaluation(int(found.sum()) / len(split), loss if math.isfinite(loss) else None, found)
