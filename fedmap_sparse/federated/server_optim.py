"""What the server does with the mean of a round: replace the model (FedAvg), or step towards it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class ServerOptimizer(ABC):
    """A rule for the pseudo-gradient `mean - model`, in packed space (Reddi et al., 2003.00295).

    State is one float32 vector a name, over survivors and tail; the server packs it when the mask
    shrinks. Plain torch: it runs once a round over survivors alone.
    """

    kind: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def step(self, model: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The new model; `state` is updated in place."""

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class FedAvg(ServerOptimizer):
    """The mean is the model (McMahan et al., arXiv 1602.05629)."""

    kind: ClassVar[str] = "fedavg"

    def step(self, model: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        return mean


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """Server momentum (Hsu et al., arXiv 1909.06335): `v = momentum v + delta; w += lr v`."""

    lr: float = 1.0
    momentum: float = 0.9
    kind: ClassVar[str] = "fedavgm"
    state_names: ClassVar[tuple[str, ...]] = ("velocity",)

    def __post_init__(self) -> None:
        _check("lr", self.lr, self.lr > 0, "a number above 0")
        _check("momentum", self.momentum, 0 <= self.momentum < 1, "0 <= momentum < 1")

    def step(self, model: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        velocity = state["velocity"].mul_(self.momentum).add_(mean - model)
        return model + self.lr * velocity


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
        _check("lr", self.lr, self.lr > 0, "a number above 0")
        _check("tau", self.tau, self.tau > 0, "a number above 0")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            _check(name, beta, 0 <= beta < 1, f"0 <= {name} < 1")

    def step(self, model: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        delta = mean - model
        first = state["first"].lerp_(delta, 1 - self.beta1)
        second = state["second"].lerp_(delta.square(), 1 - self.beta2)
        return model + self.lr * first / (second.sqrt() + self.tau)


KINDS: dict[str, type[ServerOptimizer]] = {c.kind: c for c in (FedAvg, FedAvgM, FedAdam)}


def fresh_state(optimizer: ServerOptimizer, size: int, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.zeros(size, device=device) for name in optimizer.state_names}


def _check(name: str, value: float, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}: expected {wanted}, got {value}")
