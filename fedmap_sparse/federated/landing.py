"""Where a round's mean goes, and what may go there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmap_sparse.codec import Message
from fedmap_sparse.codec.values import peak
from fedmap_sparse.federated import arrays
from fedmap_sparse.federated.global_model import GlobalModel
from fedmap_sparse.federated.server_optim import ServerOptimizer


@dataclass(frozen=True)
class Landing:
    """Where a mean goes: the model it steps from, and the range that must hold the result.

    Attributes:
        limit: the largest magnitude of a weight: finite in the model's dtype and the broadcast's.
        safe: a mean of no larger magnitude cannot break model or optimizer state.
    """

    model: GlobalModel
    optimizer: ServerOptimizer
    limit: float
    safe: float

    @staticmethod
    def of(model: GlobalModel, optimizer: ServerOptimizer, limit: float) -> Landing:
        largest = max(peak(model.values), peak(model.tail))
        state = {name: peak(t) for name, t in model.state.items()}
        return Landing(model, optimizer, limit, optimizer.safe(largest, state, limit))

    def check(self, message: Message) -> None:
        """Raise ValueError, naming the tensor, if this update alone would break something."""
        if message.within(min(self.limit, self.safe)):
            return
        if not message.within(self.limit):
            wanted = f"{message.beyond(self.limit)}: expected finite values within {self.limit:.5g}"
            raise ValueError(f"{wanted}, got NaN, infinity or one beyond")
        vector = arrays.join(message.packed, message.tail)
        broken = self.broken(vector)
        if broken is not None:
            raise ValueError(
                f"{message.tensor_at(broken)}: expected values with which the server's step stays "
                f"finite and within {self.limit:.5g}, got {float(vector[broken]):.5g}"
            )

    def broken(self, mean: Tensor) -> int | None:
        """The first element that a step to `mean` takes out of its range, if any.

        Those that a step of no difference would take out of it as well do not count: they are not
        the fault of the mean.
        """
        tried = self._beyond(mean) & ~self._beyond(self.model.vector)
        for index in tried.nonzero()[:1].flatten().tolist():
            return int(index)
        return None

    def _beyond(self, mean: Tensor) -> Tensor:
        stepped, state = self._step(mean)
        beyond = ~(stepped.abs() <= self.limit)
        for t in state.values():
            beyond |= ~t.isfinite()
        return beyond

    def _step(self, mean: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        state = {name: t.clone() for name, t in self.model.state.items()}
        stepped = self.optimizer.step(self.model.vector, mean, state)
        if state.keys() != self.model.state.keys():
            wanted, got = list(self.model.state), list(state)
            raise ValueError(f"server_optimizer: expected the state {wanted}, got {got}")
        own = {n: arrays.sound(f"server_optimizer.{n}", t, mean) for n, t in state.items()}
        return arrays.sound("server_optimizer", stepped, mean), own

    def step(self, mean: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The new model and optimizer state, all finite.

        Each admitted update alone stays in range. Where momentum or several together would leave
        it, the weight stops at the edge.

        Raises:
            ValueError: the optimizer gave NaN, or what is no vector of the model's size.
        """
        stepped, state = self._step(mean)
        largest = torch.finfo(torch.float32).max
        parts = {"model": (stepped, self.limit), **{n: (t, largest) for n, t in state.items()}}
        for name, (t, limit) in parts.items():
            if peak(t) > limit:
                if bool(t.isnan().any()):
                    raise ValueError(f"{name}: expected numbers after the server's step, got NaN")
                t.clamp_(-limit, limit)
        return stepped, state
