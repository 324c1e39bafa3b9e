"""What is around a step: torch's hooks, paid for only where there are some; GradScaler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_profiling: Any = getattr(torch.autograd, "_profiler_enabled", lambda: True)  # private


def hookable(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` as torch wraps it: hooks run, and profilers see it by its name.

    torch wraps every optimizer's `step` by itself, which takes 8 us of each call. Here a step
    without hooks and profilers goes straight.
    """
    observed: Any = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def run(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        if (
            _profiling()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return observed(self, closure)
        return step(self, closure)

    run.hooked = True  # type: ignore[attr-defined]  # torch's mark of a step that it need not wrap
    return run


def overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """GradScaler's protocol for optimizers that take part in it; divides by its scale."""
    found, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found is not None and float(found) != 0:
        return True
    if scale is not None:
        divide(optimizer, float(scale))
    return False


def divide(optimizer: torch.optim.Optimizer, scale: float | Tensor) -> None:
    """Divide the gradients in place."""
    chosen = [p for group in optimizer.param_groups for p in group["params"]]
    if grads := [p.grad for p in chosen if p.grad is not None]:
        torch._foreach_div_(grads, scale)
