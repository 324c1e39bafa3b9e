"""Calls of torch that mean the same in an autocast region.

On the CPU `torch.cat` and `torch.stack` raise "Unexpected floating ScalarType" there for 16-bit
floats other than autocast's: a float16 model could not join a federation in a region of bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def outside(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, for what runs on this device."""
    kind = device.type
    # Of a device that has no autocast, as meta, torch refuses the second question.
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def cat(tensors: Sequence[Tensor]) -> Tensor:
    with outside(tensors[0].device):
        return torch.cat(list(tensors))


def stack(tensors: Sequence[Tensor]) -> Tensor:
    with outside(tensors[0].device):
        return torch.stack(list(tensors))
