"""MaskedAdamW: `torch.optim.AdamW` for survivors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops import masked_adamw
from fedmap_sparse.optim.optimizer import Groups, MaskedOptimizer
from fedmap_sparse.optim.parts import Part, at_least


class MaskedAdamW(MaskedOptimizer):
    """`torch.optim.AdamW` for a flattened model under a mask; both averages for survivors only.

    Args:
        params, mask, groups, capturable: as in MaskedSGD.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.

    Otherwise as MaskedSGD. The bias correction is torch's, of the betas as they are at the step.

    >>> import torch, fedmap_sparse as fs
    >>> params = fs.flatten(torch.nn.Linear(8, 4))
    >>> optimizer = fs.optim.MaskedAdamW(params, lr=1e-3)
    >>> params.module(torch.ones(2, 8)).sum().backward()
    >>> optimizer.step()
    >>> sorted(optimizer.state[params.module.bias])
    ['exp_avg', 'exp_avg_sq', 'step']
    """

    state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _kernel, _op = "masked_adamw", masked_adamw.op
    _scalar_names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    _counted = True

    def __init__(
        self,
        params: FlatParameters,
        mask: Mask | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        groups: Groups | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, mask, defaults, groups)

    def _check_group(self, group: dict[str, Any]) -> None:
        at_least("lr", group["lr"], 0)
        at_least("eps", group["eps"], 0)
        at_least("weight_decay", group["weight_decay"], 0)
        if group["weight_decay"] and group.get("decoupled_weight_decay") is False:
            raise ValueError(
                "decoupled_weight_decay: expected AdamW's, got Adam's False, whose weight decay is "
                "another; set it to 0"
            )
        for beta in group["betas"]:
            if not 0 <= beta < 1:
                raise ValueError(f"betas: expected 0 <= beta < 1, got {group['betas']}")

    def _hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (group["lr"], *group["betas"], group["eps"], group["weight_decay"])

    def _flags(self, group: dict[str, Any]) -> int:
        return masked_adamw.adamw_flags(
            maximize=group["maximize"], amsgrad=group["amsgrad"], zeroed=True
        )

    def _advance(self, part: Part, stepping: int) -> None:
        # After a backward pass numpy's code is out of the caches and each of its calls takes 20 us:
        # two where all parameters step together.
        if part.together is not None and stepping == len(part.rows) and len(self.param_groups) == 1:
            part.together += 1
            t, (beta1, beta2) = part.together, self.param_groups[0]["betas"]
            self._set_counts(part, t)
            part.scalars[:, 5:7] = float(beta1) ** t, float(beta2) ** t
            return
        part.together = None
        counts = self._counts_of(part) + (part.rows[:, 2] != 0)
        self._set_counts(part, counts)
        with np.errstate(under="ignore"):  # a power too small is 0, also under np.seterr("raise")
            powers = np.power(part.scalars[:, 1:3], counts[:, None].astype(np.float64))
        part.scalars[:, 5:7] = powers

    def _count_of(self, saved: Mapping[str, Any]) -> float:
        return float(saved.get("step", 0) if "exp_avg" in saved else 0)

    def _wanted_state(self) -> tuple[str, ...]:
        if any(g["amsgrad"] for g in self.param_groups):
            return self.state_names
        return self.state_names[:2]
