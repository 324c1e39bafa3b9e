"""The exact masks that selections are checked against, at any size."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops.select import magnitude_key

#: Above this the reference of select, a stable sort, costs seconds and 30 bytes per element.
SORTABLE = 1 << 21
#: Elements that a check of more looks at together.
CHUNK = 1 << 24


def expected_mask(values: Tensor, keep: int) -> Mask:
    """The exact mask by numpy's partition: what is above the keep-th key, then ties in order."""
    if keep == 0 or values.numel() <= SORTABLE:
        return ops.magnitude_mask(values, keep, backend="reference")
    if values.element_size() == 2:
        return _by_counting(values.reshape(-1), keep)
    key = magnitude_key(values.reshape(-1))
    if values.device.type == "cpu":
        host = key.numpy().copy()
        host.partition(host.size - keep)
        threshold = int(host[host.size - keep])
    else:
        threshold = int(key.topk(keep, sorted=True).values[-1])
    kept = key > threshold
    ties = (key == threshold).nonzero().view(-1)
    kept[ties[: keep - int(kept.sum())]] = True
    return Mask.from_bool(kept)


def _by_counting(values: Tensor, keep: int) -> Mask:
    """The same of 16-bit values, by how many have each key: a byte per element beside them."""
    highest = int(torch.iinfo(torch.int16).max)
    parts = values.split(CHUNK)
    counts = values.new_zeros(highest + 1, dtype=torch.int64)
    for part in parts:
        counts += magnitude_key(part).bincount(minlength=highest + 1)
    reached = counts.flip(0).cumsum(0)
    threshold = highest - int((reached < keep).sum())
    ties = keep - int(counts[threshold + 1 :].sum())
    kept = torch.empty(values.numel(), dtype=torch.bool, device=values.device)
    for part, out in zip(parts, kept.split(CHUNK), strict=True):
        key = magnitude_key(part)
        torch.gt(key, threshold, out=out)
        tied = (key == threshold).nonzero().view(-1)[:ties]
        out[tied] = True
        ties -= tied.numel()
    return Mask.from_bool(kept)
