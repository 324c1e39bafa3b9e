"""Small tables that kernels read: addresses, sizes, hyper-parameters."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

_captured: list[Tensor] = []


def to_device(table: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """An int64 table there, flat, without waiting for the device.

    What one call has in common with an earlier one on the same stream is not copied again: steps
    of one model differ in little or nothing.
    """
    if device.type == "cpu":
        return torch.from_numpy(table).view(-1)
    content = table.tobytes()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(_pinned(content))  # the graph reads it at each replay
        return _captured[-1].to(device, non_blocking=True)
    return _kept(content, device, torch.cuda.current_stream(device).cuda_stream)


def _pinned(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.int64).pin_memory()


@functools.lru_cache(maxsize=64)
def _kept(content: bytes, device: torch.device, stream: int) -> Tensor:
    return _pinned(content).to(device, non_blocking=True)
