"""A step inside a CUDA graph: what changes from one replay to the next lies on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmap_sparse.optim.parts import Part
from fedmap_sparse.optim.state import indices_of

if TYPE_CHECKING:
    from fedmap_sparse.optim.optimizer import MaskedOptimizer


@dataclass
class Captured:
    """Of the parts as they were laid out: their tables of scalars, which a graph's kernels read,
    and how many replays the host has not counted yet."""

    parts: list[Part]
    scalars: list[Tensor]
    replays: Tensor
    # The parameters of one group in each part, on the device: (part, group, rows).
    rows: list[tuple[int, dict[str, Any], Tensor]]
    #: What a graph has the addresses of. It lives as long as the optimizer or its next capture.
    held: list[Any]

    @staticmethod
    def refresh(optimizer: MaskedOptimizer) -> None:
        """After a step on the host: tables for a capture to come, as that step left them."""
        groups = optimizer.param_groups
        if not groups[0]["capturable"] or not all(group["capturable"] for group in groups):
            return
        old, parts = optimizer._captured, optimizer._parts
        if old is not None and old.parts is parts:
            for table, part in zip(old.scalars, parts, strict=True):
                table.copy_(part.segments.scalars)
            return
        device = optimizer.flat.values.device
        rows = []
        for n, part in enumerate(parts):
            for group in optimizer.param_groups:
                chosen = set(indices_of(optimizer.flat, group))
                mine = [row for row, i in enumerate(part.indices) if i in chosen]
                rows.append((n, group, torch.tensor(mine, dtype=torch.int64, device=device)))
        scalars = [part.segments.scalars.to(device, copy=True) for part in parts]
        replays = torch.zeros((), dtype=torch.int64, device=device)
        held = old.held if old is not None else []
        optimizer._captured = Captured(parts, scalars, replays, rows, held)

    def catch_up(self, optimizer: MaskedOptimizer) -> None:
        """Count the replays since. Waits for the device, once there is a graph."""
        if not self.held:
            return
        times = int(self.replays)
        if not times:
            return
        self.replays.zero_()
        for part in self.parts:
            if optimizer._counted:
                stepping = part.rows[:, 2] != 0
                optimizer._set_counts(part, optimizer._counts_of(part) + times * stepping)
                together = part.together is not None and bool(stepping.all())
                part.together = part.together + times if together else None  # type: ignore[operator]  # it is not None
        optimizer.flat.note_stepped(None)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def record(optimizer: MaskedOptimizer) -> None:
    """What a graph repeats: hyper-parameters from tensors, powers of the betas, counts, kernels.

    Raises:
        RuntimeError: something that a replay could not repeat; the message says what to do first.
    """
    flat, held = optimizer.flat, optimizer._captured
    for group in optimizer.param_groups:
        if not group["capturable"]:
            raise RuntimeError(
                "step: expected capturable=True while a CUDA graph is captured, got False: counts "
                "and hyper-parameters are on the host then, and a replay would repeat them"
            )
    if getattr(optimizer, "found_inf", None) is not None:
        raise RuntimeError(
            "step: expected no GradScaler while a CUDA graph is captured, got one: whether a step "
            "is left out is decided on the host. Capture forward and backward, and step outside"
        )
    if held is None or held.parts is not optimizer._parts or flat.mask is not optimizer.mask:
        raise RuntimeError(
            "step: expected a step before a CUDA graph is captured, with the mask and groups that "
            "the graph is to use, got none: make one, on a side stream as torch's guide shows"
        )
    found = [part.gradients(flat) for part in optimizer._parts]
    for part, grads in zip(optimizer._parts, found, strict=True):
        part.segments.rows[:, 2] = torch.tensor([g is not None for g in grads], device="cpu")
        if not optimizer._repeats(part):
            raise RuntimeError(
                "step: expected a step of every parameter that has a gradient before a CUDA graph "
                "is captured, got one whose momentum begins with this step: make one more"
            )
    for n, group, rows in held.rows:
        for column, value in enumerate(optimizer._hyper(group)):
            if isinstance(value, Tensor) and value.device == flat.values.device:
                held.scalars[n][rows, column] = value.to(torch.float64)
    held.replays.add_(1)
    held.held[:] = [held.scalars, held.replays, held.rows, optimizer._packed.tensors, flat.mask]
    for part, grads, scalars in zip(optimizer._parts, found, held.scalars, strict=True):
        if optimizer._counted:
            scalars[:, 5:7].mul_(scalars[:, 1:3])
        optimizer._run(part, grads, scalars)
