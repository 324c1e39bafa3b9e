"""The server's model beside the module that shows it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.codec.values import peak
from fedmap_sparse.errors import StateError
from fedmap_sparse.federated import state as saved
from fedmap_sparse.federated.global_model import (
    GlobalModel,
    check_buffers,
    limit_of,
    write_buffers,
    write_model,
)
from fedmap_sparse.federated.server_optim import ServerOptimizer, fresh_state
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask


class HeldModel:
    """A GlobalModel whose weights a FlatParameters shows after each commit.

    Args:
        params: the flattened module.
        dtype: of broadcasts.
        optimizer: whose state the model carries.

    Raises:
        ValueError: a weight that is not finite, or beyond the range of `dtype`.
    """

    def __init__(self, params: FlatParameters, dtype: str, optimizer: ServerOptimizer) -> None:
        params.check_bound()
        self.params = params
        self.optimizer = optimizer
        self.limit = limit_of(params.values.dtype, dtype)
        self._dtype = dtype
        mask, device = params.mask, params.values.device
        values, tail = self._taken(mask)
        check_buffers(params, params.buffers)
        self.model = GlobalModel(
            mask,
            values,
            tail,
            torch.zeros(mask.numel, dtype=torch.uint8, device=device),
            (mask.digest(),),
            fresh_state(optimizer, values.numel() + tail.numel(), device),
        )

    def _taken(self, mask: Mask) -> tuple[Tensor, Tensor]:
        """Survivors and tail of the parameters in float32; ValueError if one cannot be sent."""
        params = self.params
        out = torch.empty(mask.nnz, device=params.values.device)
        values = ops.pack(params.prunable.detach(), mask, out=out)
        tail = params.tail.detach().to(torch.float32, copy=True)
        if max(peak(values), peak(tail)) > self.limit:
            for e, p in zip(params.layout.entries, params.parameters, strict=True):
                if peak(p) > self.limit:
                    raise ValueError(
                        f"{e.name}: expected finite weights within {self.limit:.5g}, the range of "
                        f"the model and of {self._dtype} broadcasts, got others"
                    )
        return values, tail

    def current(self) -> GlobalModel:
        """The model, with what the caller wrote into the parameters since the last commit.

        Raises:
            ValueError: a weight or buffer that cannot be sent, another mask.
            RuntimeError: the parameters are no longer views.
        """
        params, model = self.params, self.model
        params.check_bound()
        if params.mask != model.mask:
            raise ValueError("params.mask: expected the server's mask; set_mask() changes it")
        check_buffers(params, params.buffers)
        now = ops.pack(params.prunable.detach(), model.mask)
        ours, tail = (ops.cast(t, now.dtype)[0] for t in (model.values, model.tail))
        if torch.equal(now, ours) and torch.equal(params.tail, tail):
            return model
        values, tail = self._taken(model.mask)
        return replace(model, values=values, tail=tail)

    def commit(self, model: GlobalModel) -> None:
        self.model = model
        write_model(self.params, model.mask, model.values, model.tail)

    def state_dict(self, model: GlobalModel) -> dict[str, Any]:
        return {
            "layout": self.params.layout.digest().hex(),
            "buffers": {name: b.clone() for name, b in self.params.buffers.items()},
            **model.state_dict(),
        }

    def load_state_dict(self, state: Any) -> None:
        """Commit what `state_dict` gave. Raises StateError, and changes nothing then."""
        layout = self.params.layout
        wanted = layout.digest().hex()
        if (got := saved.field(state, "layout", str)) != wanted:
            raise StateError(f"layout: expected {wanted}, got {got}")
        model = GlobalModel.from_state_dict(
            state, layout, self.optimizer.state_names, self.params.values.device, self.limit
        )
        if reason := self.optimizer.bad_state(model.state):
            raise StateError(f"optimizer.{reason}")
        buffers = saved.field(state, "buffers", dict)
        try:
            check_buffers(self.params, buffers)
        except ValueError as error:
            raise StateError(f"buffers.{error}") from error
        self.params.check_bound()
        self.commit(model)
        write_buffers(self.params, buffers)
