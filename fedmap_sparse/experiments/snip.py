"""Pruning at start: what each weight matters to the clients before any training.

SNIP's saliency |weight × gradient| (Lee et al., arXiv 1810.02340), asked of the clients in one
exchange before round 0 and averaged by samples, as SSFL does (Ohib et al., arXiv 2405.09037).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmap_sparse import ops
from fedmap_sparse.codec import Coding, Message
from fedmap_sparse.codec.container import MAX_INTEGER
from fedmap_sparse.engines.in_process import InProcessEngine, Round, generator
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.data import Split
from fedmap_sparse.federated import ClientId, FedMapClient, FedMapServer
from fedmap_sparse.flat import flatten
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask
from fedmap_sparse.schedule import Dense

_BATCH = 256


def ask(
    template: nn.Module, config: Config, samples: Mapping[ClientId, Split]
) -> tuple[Tensor, Round]:
    """The saliency of every prunable weight, and the round of messages that it took.

    The model goes out dense, an answer is as large: float32 scores in the place of weights. The
    cohort and the dropouts are those of round 0.

    Args:
        template: the untrained model; not changed.
        samples: of each client; all of them are used, in one pass.

    Returns:
        float32[eligible], in the order of a dense model's survivors; the round.

    Raises:
        RoundFailed: too few clients answered.
    """
    coding = cast(Coding, config.coding)
    server = FedMapServer(
        flatten(copy.deepcopy(template)),
        Dense(),
        min_updates=config.min_updates,
        coding=coding,
        max_samples=MAX_INTEGER,
    )
    local = flatten(copy.deepcopy(template))
    engine = InProcessEngine(
        server,
        {name: FedMapClient(local, coding=coding) for name in samples},
        _Saliency(config, samples),
        cohort=config.cohort,
        dropout=config.dropout,
        attempts=config.attempts,
        seed=config.seed,
    )
    done = engine.round()
    return ops.pack(server.params.prunable.detach(), server.mask), done


class _Saliency:
    """The clients' side: scores take the place of the weights, so that a message carries them."""

    def __init__(self, config: Config, samples: Mapping[ClientId, Split]) -> None:
        self._seed = config.seed
        self._samples = samples
        self._order = {name: i for i, name in enumerate(sorted(samples))}

    def __call__(
        self, name: ClientId, client: FedMapClient, message: Message
    ) -> tuple[int, float | None]:
        module, samples = client.params.module, self._samples[name]
        torch.manual_seed(int(generator(self._seed, 6, self._order[name]).integers(2**63)))
        module.train()
        module.zero_grad()
        for images, labels in zip(
            samples.images.split(_BATCH), samples.labels.split(_BATCH), strict=True
        ):
            loss = F.cross_entropy(module(images), labels, reduction="sum") / len(samples)
            loss.backward()
        layout = client.params.layout
        with torch.no_grad():
            for p, entry in zip(client.params.parameters, layout.entries, strict=True):
                if entry.offset < layout.prunable_numel:
                    p.copy_(torch.zeros_like(p) if p.grad is None else (p * p.grad).abs())
        module.zero_grad()
        return len(samples), None


class Scores:
    """The answers as a server's `criterion=`, for its one pruning before round 0."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def __call__(self, values: Tensor, mask: Mask, layout: FlatLayout) -> Tensor:
        """Raises RuntimeError before `values` is set, or where the model was pruned before."""
        if self.values is None or len(self.values) != len(values):
            raise RuntimeError("snip: expected scores of the dense model, got none")
        return self.values.to(values.device)
