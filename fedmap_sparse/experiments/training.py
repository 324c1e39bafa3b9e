"""What a client does with its samples, and what the server does with held-out ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn

from fedmap_sparse.codec import Coding, Message
from fedmap_sparse.engines.in_process import generator
from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.data import Split
from fedmap_sparse.experiments.replay import CudaGraphs, Graphs, ReplayedTraining, gradients
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
        phases: `train` is forward and backward, `step` the optimizer's, `batch` drawing samples;
            of replayed steps `train` is all.
        graphs: with `config.graphs`, what captures steps. None: CUDA graphs on that device.
    """

    def __init__(
        self,
        config: Config,
        samples: Mapping[ClientId, Split],
        phases: Phases,
        graphs: Graphs | None = None,
    ) -> None:
        self._config = config
        self._samples = samples
        self._phases = phases
        self._device = next(iter(samples.values())).labels.device
        self._replayed: ReplayedTraining | None = None
        if config.graphs:
            self._replayed = ReplayedTraining(
                config.batch_size, CudaGraphs(self._device) if graphs is None else graphs
            )

    def __call__(
        self, name: ClientId, client: FedMapClient, message: Message
    ) -> tuple[int, float | None]:
        """Train `client` in place; its number of samples and its mean loss."""
        config, phases, samples = self._config, self._phases, self._samples[name]
        optimizer, module = client.optimizer, client.params.module
        assert optimizer is not None
        rng = generator(config.seed, 1, message.round, int(name))
        self._seed(int(rng.integers(2**63)))
        module.train()
        batches = self._batches(message.round, name, len(samples), rng)
        if self._replayed is not None:
            with phases("train"):
                drawn = ((_drawn(samples.images, c), samples.labels[c]) for c in batches)
                return len(samples), self._replayed(client, drawn)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        seen = 0
        for chosen in batches:
            with phases("batch"):
                images, labels = _drawn(samples.images, chosen), samples.labels[chosen]
            with phases("train"):
                gradients(module, images, labels, total)
                seen += len(labels)
            with phases("step"):
                optimizer.step()
                optimizer.zero_grad()
        return len(samples), total.item() / seen

    def _batches(
        self, at_round: int, name: ClientId, samples: int, rng: Generator
    ) -> Iterator[Tensor]:
        """Indices of each step's samples; a straggler's end early."""
        config = self._config
        # torch takes no batch of 2^63 samples, and none is larger than all of them.
        size = min(config.batch_size, samples)
        left = config.local_epochs * -(-samples // size)
        if config.stragglers:
            drawn = generator(config.seed, 7, at_round, int(name)).random()
            if drawn < config.stragglers:
                left = max(1, round(config.straggler_steps * left))
        for _ in range(config.local_epochs):
            order = torch.from_numpy(rng.permutation(samples)).to(self._device)
            for chosen in order.split(size):
                if not left:
                    return
                left -= 1
                yield chosen

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
    common: dict[str, Any] = {"weight_decay": config.weight_decay, "capturable": config.graphs}

    def make(params: FlatParameters, mask: Mask, lr: float | None) -> MaskedOptimizer:
        rate = config.learning_rate(0) if lr is None else lr
        if config.optimizer == "adamw":
            return MaskedAdamW(params, mask, lr=rate, **common)
        assert config.momentum is not None
        return MaskedSGD(params, mask, lr=rate, momentum=config.momentum, **common)

    return make


def make_client(config: Config, params: FlatParameters) -> FedMapClient:
    """A client that the options describe, over a local model that others may share."""
    return FedMapClient(
        params,
        optimizer=make_optimizer(config),
        keep_optimizer=config.keep_optimizer,
        dtype=config.uplink_dtype or config.dtype,
        delta=config.delta,
        coding=cast(Coding, config.coding),
        prox_mu=config.prox_mu,
    )


class Evaluation(NamedTuple):
    """Accuracy, mean cross-entropy (None where it is not finite), and which samples were right."""

    accuracy: float
    loss: float | None
    right: Tensor


def evaluate(module: nn.Module, split: Split, at_once: int = 1) -> Evaluation:
    """How a module does on held-out samples, in evaluation mode.

    Args:
        at_once: batches that are computed at a time, each in a thread of its own with as many
            threads of torch as the caller has: the bits are the same. The module's forward must
            allow it: one that keeps what it computes in itself does not.
    """
    module.eval()
    batches = list(
        zip(
            split.images.split(_EVALUATION_BATCH),
            split.labels.split(_EVALUATION_BATCH),
            strict=True,
        )
    )

    @torch.no_grad()
    def one(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
        logits: Tensor = module(batch[0])
        loss = F.cross_entropy(logits, batch[1], reduction="sum").item()
        return logits.argmax(1) == batch[1], loss

    if at_once == 1 or len(batches) == 1:
        results = list(map(one, batches))
    else:
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(
            at_once, initializer=torch.set_num_threads, initargs=(threads,)
        ) as pool:
            results = list(pool.map(one, batches))
    found = torch.cat([right for right, _ in results])
    loss = sum(part for _, part in results) / len(split)
    return Evaluation(int(found.sum()) / len(split), loss if math.isfinite(loss) else None, found)


def _drawn(images: Tensor, chosen: Tensor) -> Tensor:
    """Some of the samples, in the layout of all of them; indexing alone would make it NCHW."""
    if images.dim() == 4 and images.stride(1) == 1:
        return images.permute(0, 2, 3, 1)[chosen].permute(0, 3, 1, 2)
    return images[chosen]
