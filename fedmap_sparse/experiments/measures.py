"""What one accuracy does not tell: where weights are left, and how each client fares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmap_sparse.engines.in_process import generator
from fedmap_sparse.experiments.data import Split, draw_out
from fedmap_sparse.experiments.partition import Index, class_counts
from fedmap_sparse.experiments.training import evaluate
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask

#: Rounds over which `last` values are averaged: one round of a small validation set is noise.
LAST = 3
_CLIENTS = ("mean", "std", "worst", "q25", "median", "q75", "best", "worst_client")


def layer_survivors(layout: FlatLayout, mask: Mask) -> dict[str, int]:
    """How many weights of each prunable tensor are left, by name. O(numel)."""
    kept = mask.to_bool()
    return {e.name: int(kept[e.offset : e.offset + e.numel].sum()) for e in layout.prunable_entries}


def starving(layout: FlatLayout, survivors: dict[str, int]) -> dict[str, str]:
    """A line for each tensor that has fewer weights left than outputs; none left is dead.

    With fewer weights than outputs (rows of a linear layer, filters of a convolution) some outputs
    have no input at all.
    """
    lines = {}
    for e in layout.prunable_entries:
        left, outputs = survivors[e.name], e.shape[0]
        if left < min(outputs, e.numel):
            state = "starving" if left else "dead"
            lines[e.name] = (
                f"{e.name} is {state}: {left:,} of {e.numel:,} weights left for {outputs:,} outputs"
            )
    return lines


def hold_out(
    parts: Sequence[Index], labels: NDArray[np.int64], share: float, seed: int
) -> tuple[list[Index], list[Index]]:
    """What each client trains on, and what it holds out: `share` of each of its classes, rounded.

    Drawn from (seed, 3, client). A client keeps at least one sample to train on; one whose classes
    are all too small to share holds out nothing.
    """
    stay, held = [], []
    for client, part in enumerate(parts):
        kept, drawn = draw_out(labels[part], lambda n: round(share * n), generator(seed, 3, client))
        stay.append(part[kept])
        held.append(part[drawn])
    return stay, held


class ClientAccuracy:
    """Accuracy of the global model for each client, after a round.

    On the client's own held-out samples where it has some. Else it is the accuracy on validation
    for the client's mix of classes: the accuracy of each class, weighted by the share of it in the
    client's samples. That tells skewed labels, and nothing about clients whose images differ.

    Args:
        train: all training samples.
        parts: the samples that each client trains on.
        held: those that each holds out, empty where it has none.
        classes: how many there are.
        device: where the model is.
    """

    def __init__(
        self,
        train: Split,
        parts: Sequence[Index],
        held: Sequence[Index],
        classes: int,
        device: torch.device,
    ) -> None:
        counts = class_counts(parts, train.labels.numpy(), classes)
        self._mix = torch.from_numpy(counts / counts.sum(axis=1, keepdims=True))
        self._owner = torch.from_numpy(np.repeat(np.arange(len(held)), [len(h) for h in held]))
        self._held: Split | None = None
        if len(self._owner):
            chosen = torch.from_numpy(np.concatenate(held))
            self._held = Split(train.images[chosen].to(device), train.labels[chosen].to(device))

    @property
    def on(self) -> str:
        """What it is measured on, in words."""
        if self._held is None:
            return "validation, by each client's mix of classes"
        return "each client's held-out samples"

    def __call__(self, module: nn.Module, validation: Split, right: Tensor) -> dict[str, Any]:
        """`right` says which validation samples the module has right.

        Returns:
            `mean` and `std` over clients (each counts the same), `worst` and `worst_client`,
            and the other quartiles: `q25`, `median`, `q75` and `best`.
        """
        if self._held is None:
            found = self._by_mix(validation.labels.cpu(), right.cpu())
        else:
            found = self._own(evaluate(module, self._held).right.cpu())
        worst = int(found.nan_to_num(2.0).argmin())
        known = found[~found.isnan()]
        if not len(known):
            return dict.fromkeys(_CLIENTS)
        quartiles = known.quantile(torch.linspace(0, 1, 5, dtype=known.dtype)).tolist()
        values = (known.mean().item(), known.std(correction=0).item(), *quartiles, worst)
        return dict(zip(_CLIENTS, values, strict=True))

    def _own(self, right: Tensor) -> Tensor:
        clients = len(self._mix)
        hits = torch.bincount(self._owner, weights=right.double(), minlength=clients)
        return hits / torch.bincount(self._owner, minlength=clients)

    def _by_mix(self, labels: Tensor, right: Tensor) -> Tensor:
        classes = self._mix.shape[1]
        totals = torch.bincount(labels, minlength=classes)
        hits = torch.bincount(labels, weights=right.double(), minlength=classes)
        mix = self._mix * (totals > 0)  # a class that validation lacks is not measured
        return (mix @ (hits / totals.clamp(min=1))) / mix.sum(dim=1)


def over_rounds(accuracies: Sequence[float]) -> dict[str, Any]:
    """The last validation accuracy, the mean of the last three, and the best with its round."""
    best = max(range(len(accuracies)), key=lambda i: accuracies[i])
    tail = accuracies[-LAST:]
    return {
        "validation_accuracy": accuracies[-1],
        "validation_last_mean": sum(tail) / len(tail),
        "validation_best": accuracies[best],
        "validation_best_round": best,
    }
