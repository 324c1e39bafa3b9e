"""The server's model beside the module that shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.codec.buffers import gather
from fedmap_sparse.codec.container import MAX_INTEGER
from fedmap_sparse.codec.values import peak
from fedmap_sparse.errors import StateError
from fedmap_sparse.federated import state as saved
from fedmap_sparse.federated.aggregation import RoundResult
from fedmap_sparse.federated.global_model import (
    GlobalModel,
    check_buffers,
    check_each,
    limit_of,
    write_buffers,
    write_model,
)
from fedmap_sparse.federated.lock import Lock
from fedmap_sparse.federated.rounds import OpenRound
from fedmap_sparse.federated.server_optim import ServerOptimizer, fresh_state
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.schedule import Adaptive, Past, Schedule

#: Of a state from outside: half of what messages can count, so that rounds can follow.
_LAST_ROUND = MAX_INTEGER >> 1


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
        check_buffers(params, gather(params.layout, params.buffers))
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
        out = torch.empty(mask.nnz, dtype=torch.float32, device=params.values.device)
        values = ops.pack(params.prunable.detach(), mask, out=out)
        tail = params.tail.detach().to(torch.float32, copy=True)
        tail = params.layout.clean_tail(tail)
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
        check_buffers(params, gather(params.layout, params.buffers))
        now = ops.pack(params.prunable.detach(), model.mask)
        ours, tail = model.values, model.tail
        if now.dtype != torch.float32:
            ours, tail = (ops.cast(t, now.dtype)[0] for t in (ours, tail))
        if torch.equal(now, ours) and torch.equal(params.tail, tail):
            return model
        values, tail = self._taken(model.mask)
        return replace(model, values=values, tail=tail)

    def commit(self, model: GlobalModel) -> None:
        write_model(self.params, model.mask, model.values, model.tail)
        self.model = model

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
        for name, b in buffers.items():
            if isinstance(b, Tensor):  # `check_buffers` names what is none
                saved.dense(f"buffers.{name}", b)
        try:
            check_each(self.params.buffers, buffers)
        except ValueError as error:
            raise StateError(f"buffers.{error}") from error
        self.params.check_bound()
        flat = gather(layout, {name: buffers[name] for name in self.params.buffers})
        self.commit(model)
        write_buffers(self.params, flat)


class ModelServer(saved.BytesState):
    """A server's model, its round under way, and its state; FedMapServer adds the round's steps.

    Attributes:
        params: the flattened global model, which shows the model's weights.
        layout: of `params`.
        round: the round that is under way or comes next, counted from 0.
    """

    _kind = "server"
    schedule: Schedule

    def __init__(self, params: FlatParameters, dtype: str, optimizer: ServerOptimizer) -> None:
        self.params = params
        self.layout = params.layout
        self.round = 0
        self._held = HeldModel(params, dtype, optimizer)
        self._past: list[Past] = []
        self._typical: int | None = None  # the median claim of the last round
        self._open: OpenRound | None = None
        self._lock = Lock()

    @property
    def mask(self) -> Mask:
        """The mask of the global model; all parties' after `begin_round`."""
        return self._held.model.mask

    @property
    def epoch(self) -> int:
        """How many times the mask has been pruned."""
        return self._held.model.epoch

    def set_mask(self, mask: Mask) -> None:
        """Prune to a mask of the caller's, between rounds. It counts as a pruning.

        Args:
            mask: a subset of the server's mask, over `layout.prunable_numel` elements.

        Raises:
            RuntimeError: a round is under way.
            ValueError: a mask that is not a subset; nothing is changed.
        """
        with self._lock:
            if self._open is not None:
                raise RuntimeError("set_mask: expected no round under way; abort_round() ends it")
            model = self._held.current()
            self.layout.check_mask(mask)
            if not mask <= model.mask:
                raise ValueError("mask: expected a subset of the server's mask, got another")
            self._held.commit(model if mask == model.mask else model.restricted(mask))

    def abort_round(self) -> None:
        """Leave the round under way: the server is as before `begin_round`, updates are dropped.

        Nothing happens if no round is under way.
        """
        with self._lock:
            if self._open is not None:
                self._open.end()
                if self._open.before is not self._held.model:
                    self._held.commit(self._open.before)
                self._open = None

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` wants, as tensors and plain values.

        In a round, after a `RoundFailed` too, it is the state before `begin_round`: that call
        then gives the same broadcast, and the same updates are taken. Updates that a stream has
        added are not in it.
        """
        with self._lock:
            model = self._held.model if self._open is None else self._open.before
            state: dict[str, Any] = {"round": self.round, "samples": self._typical}
            if isinstance(self.schedule, Adaptive):
                state["past"] = [list(ended) for ended in self._past]
            return {**state, **self._held.state_dict(model)}

    def _scheduled(self) -> object:
        """How many weights the schedule leaves in this round."""
        eligible = self.layout.eligible
        if isinstance(self.schedule, Adaptive):
            return self.schedule.follow(self._past, self.round, eligible)
        return self.schedule.keep(self.round, eligible)

    def _noted(self, result: RoundResult) -> RoundResult:
        """The result of a round that ended, noted for a schedule that looks back."""
        if isinstance(self.schedule, Adaptive):
            self._past.append((result.loss, self.mask.nnz))
        return result

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; schedule and options are the constructor's.

        Raises:
            StateError: a state that is damaged, of another layout, or whose parts disagree; the
                message names the field, and nothing is changed.
        """
        with self._lock:
            at_round = saved.count(state, "round")
            if at_round > _LAST_ROUND:
                raise StateError(f"round: expected 0 to 2^52, got {at_round}")
            typical = saved.field({"samples": None, **state}, "samples", (int, type(None)))
            if typical is not None and not 1 <= typical <= MAX_INTEGER:
                raise StateError(f"samples: expected 1 to 2^53, got {typical}")
            past = _read_past(state)
            self._held.load_state_dict(state)
            self._past = past
            if self._open is not None:
                self._open.end()
            self.round, self._typical, self._open = at_round, typical, None


def _read_past(state: Mapping[str, Any]) -> list[Past]:
    """The rounds that a state tells an adaptive schedule of; none in another schedule's state."""
    found: list[Past] = []
    for ended in saved.field({"past": [], **state}, "past", list):
        if not isinstance(ended, list | tuple) or len(ended) != 2:
            raise StateError(f"past: expected pairs of loss and survivors, got {ended!r:.50}")
        loss, survivors = ended
        finite = loss is None or (isinstance(loss, float) and math.isfinite(loss))
        if not finite or isinstance(survivors, bool) or not isinstance(survivors, int):
            raise StateError(f"past: expected a finite loss and a count, got {ended!r:.50}")
        found.append((loss, survivors))
    return found
