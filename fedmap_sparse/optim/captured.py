"""A step inside a CUDA graph: what changes from one replay to the next lies on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse.ops._segments import SKIPPED
from fedmap_sparse.optim.hooks import divide
from fedmap_sparse.optim.parts import Array, Part
from fedmap_sparse.optim.parts import stepped as parameters_stepped
from fedmap_sparse.optim.state import indices_of, same_parameters

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
    numbers: list[Any]  # of the last step on the host: see `_on_host`

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
            old.numbers = _on_host(optimizer)
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
        optimizer._captured = Captured(parts, scalars, replays, rows, held, _on_host(optimizer))

    def is_current(self, optimizer: MaskedOptimizer) -> bool:
        """Whether nothing has changed since the last step on the host, as far as the host knows."""
        flat = optimizer.flat
        return (
            self.parts is optimizer._parts
            and flat.mask is optimizer.mask
            and optimizer._bound is flat.parameters
            and same_parameters(optimizer.param_groups, optimizer._seen)
            and optimizer._pending is None
            and optimizer._shown is None
            and self.numbers == _on_host(optimizer)
        )

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
    if held is None or held.parts is not optimizer._parts or flat.mask is not optimizer.mask:
        raise RuntimeError(
            "step: expected a step before a CUDA graph is captured, with the mask and groups that "
            "the graph is to use, got none: make one, on a side stream as torch's guide shows"
        )
    for part in held.parts:
        part.rows[:, 2] = _stepping(optimizer, part)
    if not all(optimizer._repeats(part) for part in held.parts):
        raise RuntimeError(
            "step: expected a step of every parameter that has a gradient before a CUDA graph "
            "is captured, got one whose momentum begins with this step: make one more"
        )
    _repeat(optimizer, held)


@torch.no_grad()
def left_to_device(optimizer: MaskedOptimizer) -> bool:
    """A step under a GradScaler as a graph repeats it: the host need not know whether it counts.

    False: not done, as something has changed that the host has to look at. So it is at the first
    step, and where mask, groups, numbers on the host or the parameters with a gradient are others
    than at the step before, or `state` was looked at.
    """
    flat, held = optimizer.flat, optimizer._captured
    found = getattr(optimizer, "found_inf", None)
    if not _is_there(found, optimizer) or held is None or not held.is_current(optimizer):
        return False
    flat.check_bound()
    for part in held.parts:
        # The steps since are counted by who had a gradient in the last one on the host.
        same = ((part.rows[:, 2] != 0) == _stepping(optimizer, part)).all()
        if not same or not optimizer._repeats(part):
            return False
    flat.zero_written()
    _repeat(optimizer, held)
    flat.note_stepped(parameters_stepped(held.parts))
    return True


def _stepping(optimizer: MaskedOptimizer, part: Part) -> Array:
    """Which of the part's parameters have a gradient."""
    return np.array([optimizer.flat.gradient(i) is not None for i in part.indices])


def _repeat(optimizer: MaskedOptimizer, held: Captured) -> None:
    """A step in which the host reads nothing of the device."""
    flat = optimizer.flat
    infinite = getattr(optimizer, "found_inf", None)
    scale = getattr(optimizer, "grad_scale", None)
    skips = None if infinite is None else infinite.reshape(()) != 0
    if scale is not None:
        # Gradients of a step that is skipped stay as they are, as torch's fused optimizers have it.
        divide(optimizer, scale if skips is None else torch.where(skips, 1.0, scale.reshape(())))
    found = [part.gradients(flat) for part in held.parts]
    for n, group, rows in held.rows:
        for column, value in enumerate(optimizer._hyper(group)):
            if _is_there(value, optimizer):
                held.scalars[n][rows, column] = value.to(torch.float64)
    held.replays.add_(1 if skips is None else ~skips)
    held.held[:] = [held.scalars, held.replays, held.rows, optimizer._packed.tensors, flat.mask]
    for part, grads, scalars in zip(held.parts, found, held.scalars, strict=True):
        if optimizer._counted:
            betas = scalars[:, 1:3]
            scalars[:, 5:7].mul_(betas if skips is None else torch.where(skips, 1.0, betas))
        scalars[:, SKIPPED] = 0.0 if skips is None else skips
        optimizer._run(part, grads, scalars)


def _is_there(value: Any, optimizer: MaskedOptimizer) -> bool:
    """Whether something is a tensor where the values are."""
    return isinstance(value, Tensor) and value.device == optimizer.flat.values.device


def _on_host(optimizer: MaskedOptimizer) -> list[Any]:
    """Hyper-parameters and flags of each group, but for those that a repeated step reads itself."""
    return [
        (
            [None if _is_there(x, optimizer) else float(x) for x in optimizer._hyper(group)],
            optimizer._flags(group),
        )
        for group in optimizer.param_groups
    ]
