"""What pruning ranks weights by, beside magnitude: functions for a server's `criterion=`.

Each takes the survivors, their mask and the layout, and gives one score for each survivor; the
server keeps the largest. Scores come from the weights and the mask alone, so a run that goes on
needs no state of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from fedmap_sparse.federated import Criterion
from fedmap_sparse.layout import Entry, FlatLayout
from fedmap_sparse.mask import Mask

_LARGEST = torch.finfo(torch.float32).max


def fan_in(values: Tensor, mask: Mask, layout: FlatLayout) -> Tensor:
    """Magnitude × sqrt(fan-in), the inputs of an output: undoes the scale of the initial weights.

    Layers start with weights of about 1 / sqrt(fan-in). With little training before it, pruning by
    magnitude takes most from the layer with most inputs.
    """
    scores = values.abs()
    for entry, part in _parts(mask, layout):
        scores[part] *= prod(entry.shape[1:]) ** 0.5
    return scores


def layerwise(values: Tensor, mask: Mask, layout: FlatLayout) -> Tensor:
    """Magnitude within the layer: every layer has the same density."""
    return _ranked(values, mask, layout, lambda entry: 1.0)


def erk(values: Tensor, mask: Mask, layout: FlatLayout) -> Tensor:
    """Magnitude within the layer; the density of a layer is proportional to
    sum(shape) / prod(shape), at most 1 (Erdős-Rényi kernel: Evci et al., arXiv 1911.11134)."""
    return _ranked(values, mask, layout, lambda entry: sum(entry.shape) / entry.numel)


def random(values: Tensor, mask: Mask, layout: FlatLayout) -> Tensor:
    """No rank at all: what is kept is drawn, seeded by the digest of the mask."""
    seed = int.from_bytes(mask.digest()[:7], "little")
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(len(values), generator=rng).to(values.device)


def _ranked(
    values: Tensor, mask: Mask, layout: FlatLayout, weight: Callable[[Entry], float]
) -> Tensor:
    """Minus the place in the layer (0 for the largest) as a share of its size, over its weight.

    The largest `keep` of these are, for some t, the first `t * weight * numel` of each layer, or
    all of it where that is more than it has.
    """
    scores = torch.empty_like(values)
    for entry, part in _parts(mask, layout):
        order = values[part].abs().argsort(descending=True, stable=True)
        places = torch.arange(len(order), dtype=torch.float64, device=values.device)
        share = torch.empty_like(places)
        share[order] = places / (entry.numel * weight(entry))
        scores[part] = -share.float()
    return scores


def at_least(density: float, criterion: Criterion | None) -> Criterion:
    """A criterion (None: magnitude) that leaves each layer at least `density` of its weights.

    Its best ones: they count as larger than all others, so the rest of the model gives way. The
    model's own density must not be less.
    """

    def scores(values: Tensor, mask: Mask, layout: FlatLayout) -> Tensor:
        found = values.abs() if criterion is None else criterion(values, mask, layout)
        for entry, part in _parts(mask, layout):
            own = found[part]
            safe = min(int(density * entry.numel), len(own))
            own[own.argsort(descending=True, stable=True)[:safe]] = _LARGEST
        return found

    return scores


def _parts(mask: Mask, layout: FlatLayout) -> Iterator[tuple[Entry, slice]]:
    """Each prunable tensor with where its survivors lie among all."""
    kept = mask.to_bool()
    start = 0
    for entry in layout.prunable_entries:
        left = int(kept[entry.offset : entry.offset + entry.numel].sum())
        yield entry, slice(start, start + left)
        start += left


#: By the name of the option; magnitude is the server's own.
CRITERIA: dict[str, Criterion | None] = {
    "magnitude": None,
    "fan_in": fan_in,
    "layerwise": layerwise,
    "erk": erk,
    "random": random,
}
