"""What the server does with the mean of a round: replace the model (FedAvg), or step towards it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmap_sparse import _checks

_LARGEST = torch.finfo(torch.float32).max
_LEAST = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class ServerOptimizer(ABC):
    """A rule for the pseudo-gradient `mean - model`, in packed space (Reddi et al., 2003.00295).

    State is one float32 vector per name, over survivors and tail; the server packs it when the mask
    shrinks. Plain torch: it runs once a round over survivors alone.
    """

    kind: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def step(self, model: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The new model; `state` is updated in place."""

    def safe(self, model: float, state: dict[str, float], limit: float) -> float:
        """A magnitude of the mean below which no step leaves its range.

        Updates above it are tried one by one, so a low answer costs time and nothing else.

        Args:
            model: the largest magnitude in the model.
            state: likewise of each state vector.
            limit: the largest magnitude that the new model may have.
        """
        return -math.inf

    def bad_state(self, state: dict[str, Tensor]) -> str | None:
        """Why finite state from outside is refused; None if it is sound."""
        return None


@dataclass(frozen=True)
class FedAvg(ServerOptimizer):
    """The mean is the model (McMahan et al., arXiv 1602.05629)."""

    kind: ClassVar[str] = "fedavg"

    def step(self, model: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        return mean

    def safe(self, model: float, state: dict[str, float], limit: float) -> float:
        return limit


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """Server momentum (Hsu et al., arXiv 1909.06335): `v = momentum v + delta; w += lr v`."""

    lr: float = 1.0
    momentum: float = 0.9
    kind: ClassVar[str] = "fedavgm"
    state_names: ClassVar[tuple[str, ...]] = ("velocity",)

    def __post_init__(self) -> None:
        _check_positive("lr", self.lr)
        _check("momentum", self.momentum, 0 <= self.momentum < 1, "0 <= momentum < 1")

    def step(self, model: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        velocity = state["velocity"].mul_(self.momentum).add_(mean - model)
        return model + self.lr * velocity

    def safe(self, model: float, state: dict[str, float], limit: float) -> float:
        velocity = min(0.9 * _LARGEST, 0.9 * (limit - model) / self.lr)
        return velocity - self.momentum * state["velocity"] - model


@dataclass(frozen=True)
class FedAdam(ServerOptimizer):
    """Adam on the server (Reddi et al., arXiv 2003.00295, algorithm 2): no bias correction.

    `m = beta1 m + (1 - beta1) delta`; `v = beta2 v + (1 - beta2) delta^2`;
    `w += lr m / (sqrt(v) + tau)`
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    kind: ClassVar[str] = "fedadam"
    state_names: ClassVar[tuple[str, ...]] = ("first", "second")

    def __post_init__(self) -> None:
        _check_positive("lr", self.lr)
        _check_positive("tau", self.tau)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            _check(name, beta, 0 <= beta < 1, f"0 <= {name} < 1")

    def step(self, model: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        delta = mean - model
        first = state["first"].lerp_(delta, 1 - self.beta1)
        second = state["second"].lerp_(delta.square(), 1 - self.beta2)
        return model + self.lr * first / (second.sqrt() + self.tau)

    def safe(self, model: float, state: dict[str, float], limit: float) -> float:
        # |first| <= largest of its old self and delta; the root of `second` is left out.
        first = 0.9 * (limit - model) * self.tau / self.lr
        if state["first"] > first or state["second"] > 0.9 * _LARGEST:
            return -math.inf
        return min(first, 0.9 * math.sqrt(_LARGEST)) - model

    def bad_state(self, state: dict[str, Tensor]) -> str | None:
        second = state["second"]
        if second.numel() and float(second.min()) < 0:
            return "second: expected squares of at least 0, got one below"
        return None


KINDS: dict[str, type[ServerOptimizer]] = {c.kind: c for c in (FedAvg, FedAvgM, FedAdam)}


def fresh_state(optimizer: ServerOptimizer, size: int, device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.zeros(size, dtype=torch.float32, device=device)
        for name in optimizer.state_names
    }


def _check_positive(name: str, value: object) -> None:
    """Raise unless a number is above 0 and finite in float32 too, as the steps are."""
    found = _checks.finite(name, value, "a number above 0 in float32")
    if not _LEAST <= found <= _LARGEST:
        raise ValueError(f"{name}: expected {_LEAST:.5g} to {_LARGEST:.5g}, got {found}")


def _check(name: str, value: float, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}: expected {wanted}, got {value}")
