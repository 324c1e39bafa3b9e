"""Top-k of the update with error feedback, like STC (Sattler et al., arXiv 1903.02891).

The model stays dense; what travels is sparse. A client sends the largest `share` of its update,
each as plus or minus their mean magnitude, and adds what it left out to its next update. The server
does the same with the mean on the way back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import codec, ops
from fedmap_sparse.codec import Coding, Message
from fedmap_sparse.errors import FormatError
from fedmap_sparse.federated import (
    Bytes,
    ClientId,
    FedMapClient,
    FedMapServer,
    RoundFailed,
    RoundResult,
)
from fedmap_sparse.federated.buffers import BufferMeans
from fedmap_sparse.federated.global_model import write_buffers, write_model
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.schedule import Dense


def ternary(
    vector: Tensor,
    tail: Tensor,
    share: float,
    params: FlatParameters,
    coding: Coding,
    **stamp: Any,
) -> Message:
    """The largest `share` of a vector as a message, with its mask: int8, all of one magnitude.

    Args:
        vector: float32[layout.prunable_numel], 0 in padding.
        tail: what travels beside it, dense.
    """
    every = params.layout.initial_mask(vector.device)
    keep = max(1, round(share * every.nnz))
    mask = ops.magnitude_mask(vector, min(keep, every.nnz), within=every)
    values = ops.pack(vector, mask)
    flat = values.sign() * values.abs().mean()
    return codec.compose(
        params.layout, mask, flat, tail, params.buffers, dtype="int8", coding=coding, **stamp
    )


class TopKServer(FedMapServer):
    """A server of a dense model whose steps are sparse.

    Args:
        share: of the weights that travel in a message.
        options: as of FedMapServer, without `dtype` and `server_optimizer`.
    """

    def __init__(self, params: FlatParameters, share: float, **options: Any) -> None:
        super().__init__(params, Dense(), **options)
        self.share = share
        self._residual = torch.zeros_like(params.prunable.detach(), dtype=torch.float32)
        self._step: bytes | None = None  # from the last round's model to this round's

    def broadcast(self, have: bytes | None = None, *, client: ClientId | None = None) -> bytes:
        """The last step for who has the model before it, the whole model for others."""
        self._require("broadcast")
        if self._step is not None and have == version(self.round - 1):
            return self._step
        return super().broadcast(None, client=client)

    def aggregate(
        self,
        updates: Iterable[tuple[ClientId, Bytes]],
        *,
        order: Sequence[ClientId] | None = None,
        weights: Mapping[ClientId, int] | None = None,
    ) -> RoundResult:
        """Admit what can be added, by ascending client; the largest of the mean are the step."""
        sent = self._require("aggregate").message
        answers = {sent.broadcast_digest}
        if self._step is not None:
            answers.add(codec.decode(self._step, self.layout).broadcast_digest)
        total = torch.zeros_like(self._residual, dtype=torch.float64)
        tail = torch.zeros_like(sent.tail, dtype=torch.float64)
        buffers = BufferMeans(self.layout, sent.flat_buffers, self.params.buffers)
        accepted: list[ClientId] = []
        refused: dict[ClientId, str] = {}
        losses: list[tuple[float, int]] = []
        samples = size = 0
        for name, data in sorted(updates, key=lambda pair: pair[0]):
            size += len(data)
            try:
                message = codec.decode(data, self.layout)
                if message.answers not in answers:
                    raise ValueError("expected an answer to this round's broadcast, got another")
                if message.num_samples < 1 or not message.all_finite():
                    raise ValueError("expected finite values of at least 1 sample, got others")
                buffers.check(message.flat_buffers)
            except (ValueError, TypeError) as error:
                refused[name] = str(error)
                continue
            n = message.num_samples
            total += n * message.dense().double()
            tail += n * message.tail.double()
            buffers.add(message.flat_buffers, n)
            samples += n
            accepted.append(name)
            if isinstance(loss := message.meta.get("loss"), float):
                losses.append((loss, n))
        if len(accepted) < self.min_updates:
            reason = f"expected at least {self.min_updates} usable updates, got {len(accepted)}"
            raise RoundFailed(f"round {self.round}: {reason}", refused)
        weight = sum(n for _, n in losses)
        loss = sum(loss * n for loss, n in losses) / weight if weight else None
        self._take((total / samples).float(), (tail / samples).float(), buffers.result())
        return RoundResult(
            self.round - 1, self.epoch, tuple(accepted), refused, samples, loss, size
        )

    def _take(self, mean: Tensor, tail: Tensor, buffers: dict[str, Tensor]) -> None:
        """Make the step of a mean, and go on to the next round."""
        write_buffers(self.params, buffers)
        wanted = mean + self._residual
        lr = self.lr(self.round + 1) if callable(self.lr) else self.lr
        meta = {"step": True} if lr is None else {"step": True, "lr": float(lr)}
        made = ternary(
            wanted, tail, self.share, self.params, self.coding, round=self.round + 1, meta=meta
        )
        step = made.dense()
        self._residual = wanted - step
        vector = torch.cat([ops.pack(step, self.mask), made.tail]) + self._held.model.vector
        self._end(vector, {}, buffers)
        self._step = made.encode("full")

    def state_dict(self) -> dict[str, Any]:
        """As FedMapServer's, with what was left out and the last step."""
        step = (
            None
            if self._step is None
            else torch.frombuffer(bytearray(self._step), dtype=torch.uint8)
        )
        return {**super().state_dict(), "left_out": self._residual.clone(), "step": step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As FedMapServer's."""
        super().load_state_dict(state)
        self._residual = state["left_out"].clone()
        self._step = None if state["step"] is None else state["step"].numpy().tobytes()


class TopKClient(FedMapClient):
    """A client of a TopKServer: it keeps the model that it received last, and what it left out.

    Args:
        share: of the weights that travel in an update.
        options: as of FedMapClient, without `dtype`, `delta` and `keep_optimizer`.
    """

    def __init__(self, params: FlatParameters, share: float, **options: Any) -> None:
        # int8 is what an engine takes for a client with an error to keep.
        super().__init__(params, dtype="int8", **options)
        self.share = share
        self._known: tuple[Tensor, Tensor] | None = None  # weights and tail as they were received
        self._left_out = torch.zeros_like(params.prunable.detach(), dtype=torch.float32)
        self._after: tuple[int, Tensor] | None = None  # an update's round, and what it left out

    @property
    def have(self) -> bytes | None:
        """Which model this client has; None at first."""
        return None if self._known is None else version(self._seen[0])

    def receive(self, data: Bytes | Message) -> Message:
        """Take a whole model, or a step from the one before."""
        params = self.params
        params.check_bound()
        message = self._decoded(data)
        lr = self._checked(message)
        values, tail = message.dense(), message.tail.float()
        if message.meta.get("step"):
            if self._known is None or self._seen[0] != message.round - 1:
                raise FormatError("expected a whole model, got a step from one that is not here")
            values, tail = values + self._known[0], tail + self._known[1]
        every = self.layout.initial_mask(values.device)
        write_model(params, every, ops.pack(values, every), tail)
        write_buffers(params, message.flat_buffers)
        if self._after is not None and message.round > self._after[0]:
            self._left_out = self._after[1]
        self._after, self._known, self._mask = None, (values, tail.clone()), every
        self._seen = (message.round, message.epoch)
        self._received = message.broadcast_digest
        if self.prox_mu:
            self._anchor = params.values.clone()
        self._renew_optimizer(lr)
        return message

    def update(self, num_samples: int, loss: float | None = None) -> bytes:
        """The largest of what was learned since `receive` and left out before."""
        _, answers = self._answering("update")
        assert self._known is not None
        values, tail = self._known
        wanted = self.params.prunable.detach().float() - values + self._left_out
        known = loss is not None and math.isfinite(loss)
        made = ternary(
            wanted,
            self.params.tail.detach().float() - tail,
            self.share,
            self.params,
            self.coding,
            round=self._seen[0],
            num_samples=num_samples,
            answers=answers,
            meta={"loss": float(loss)} if known and loss is not None else None,
        )
        self._after = (self._seen[0], wanted - made.dense())
        return made.encode("full")

    def state_dict(self) -> dict[str, Any]:
        """The model that it has, and what it left out."""
        known = None if self._known is None else [t.clone() for t in self._known]
        after = None if self._after is None else [self._after[0], self._after[1].clone()]
        return {
            "round": self._seen[0],
            "epoch": self._seen[1],
            "known": known,
            "left_out": self._left_out.clone(),
            "after": after,
            "optimizer": None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        known, after = state["known"], state["after"]
        self._known = None if known is None else (known[0].clone(), known[1].clone())
        self._after = None if after is None else (after[0], after[1].clone())
        self._left_out = state["left_out"].clone()
        self._seen = (state["round"], state["epoch"])
        self._mask: Mask | None = None if known is None else self.layout.initial_mask()
        self._received = None


def version(at_round: int) -> bytes:
    """What a receiver of a round's broadcast has."""
    return at_round.to_bytes(16, "little", signed=True)
