"""MaskedSGD: `torch.optim.SGD` for survivors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops import _segments, masked_sgd
from fedmap_sparse.optim.optimizer import Groups, MaskedOptimizer
from fedmap_sparse.optim.parts import Part, at_least


class MaskedSGD(MaskedOptimizer):
    """`torch.optim.SGD` for a flattened model under a mask; momentum for survivors only.

    Args:
        params: a FlatParameters.
        mask: which of `params.prunable` survive; becomes `params.mask`. None: the current one.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        groups: parameter groups as torch takes them (dicts with "params": parameters of the
            module, and overrides). None: one group of all. Parameters of no group stay as they
            are and have no state.
        capturable: a CUDA graph may capture a step, after one step outside of it. A replay reads
            what is a tensor on the device (`lr=torch.tensor(0.1, device="cuda")`), gradients where
            they were, and state and mask as they were: after a change of mask capture again. A
            GradScaler's step is then left to the device. False: a capture is a RuntimeError.

    Pruned weights are +0.0 after each step, whatever gradient, decay or momentum say; the dense
    tail is updated in the same call. With a dense mask the result is torch's within rounding.

    Raises:
        ValueError: hyper-parameters out of range.
        TypeError: `params` is not flat.

    >>> import torch, fedmap_sparse as fs
    >>> params = fs.flatten(torch.nn.Linear(8, 4))
    >>> mask = fs.ops.prune_(params.prunable, 16, within=params.mask)
    >>> optimizer = fs.optim.MaskedSGD(params, mask, lr=0.1, momentum=0.9)
    >>> params.module(torch.ones(2, 8)).sum().backward()
    >>> optimizer.step()
    >>> int(params.module.weight.count_nonzero())
    16
    """

    state_names = ("momentum_buffer",)
    _kernel, _op = "masked_sgd", masked_sgd.op
    _scalar_names = ("lr", "momentum", "dampening", "weight_decay")

    def __init__(
        self,
        params: FlatParameters,
        mask: Mask | None = None,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        groups: Groups | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, mask, defaults, groups)

    def _check_group(self, group: dict[str, Any]) -> None:
        at_least("lr", group["lr"], 0)
        at_least("momentum", group["momentum"], 0)
        at_least("weight_decay", group["weight_decay"], 0)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov: expected a momentum above 0 and no dampening, got momentum="
                f"{group['momentum']}, dampening={group['dampening']}"
            )

    def _hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group[k] for k in self._scalar_names)

    def _flags(self, group: dict[str, Any]) -> int:
        return masked_sgd.sgd_flags(
            nesterov=group["nesterov"], maximize=group["maximize"], zeroed=True
        )

    def _advance(self, part: Part, stepping: int) -> None:
        if part.settled:
            return
        rows, momentum = part.rows, part.scalars[:, 1]
        counts = self._counts_of(part)
        first = (counts == 0) & (momentum != 0)
        rows[:, 3] = rows[:, 3] & ~_segments.FIRST | _segments.FIRST * first
        part.settled = not first.any()
        self._set_counts(part, counts + (first & (rows[:, 2] != 0)))

    def _repeats(self, part: Part) -> bool:
        stepping = (part.rows[:, 2] != 0) & (part.scalars[:, 1] != 0)
        if (stepping & (self._counts_of(part) == 0)).any():
            return False
        part.rows[:, 3] &= ~_segments.FIRST
        return True

    def _count_of(self, saved: Mapping[str, Any]) -> float:
        return float(saved.get("momentum_buffer") is not None)

    def _wanted_state(self) -> tuple[str, ...]:
        return self.state_names if any(g["momentum"] != 0 for g in self.param_groups) else ()
