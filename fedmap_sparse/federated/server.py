"""The paper's round (FedMap, arXiv 2406.19050, in our reading): bytes in, bytes out.

    server                                          client
    begin_round(): prune the aggregated model
    broadcast(have=the client's mask)      ------>  receive(bytes)
                                                    train the survivors
    aggregate((client, bytes), ...)        <------  update(num_samples)

The ranking is of the aggregated global model, global over all prunable tensors, so all parties get
one mask; each mask is a subset of the one before; a pruned weight never comes back. No transport,
no files, no clock: engines and experiments bring these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedmap_sparse import codec, ops
from fedmap_sparse.codec import Body
from fedmap_sparse.errors import RoundFailed
from fedmap_sparse.federated.aggregation import Bytes, ClientId, Intake
from fedmap_sparse.federated.global_model import (
    GlobalModel,
    check_buffers,
    write_buffers,
    write_model,
)
from fedmap_sparse.federated.server_optim import FedAvg, ServerOptimizer, fresh_state
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.schedule import Schedule


@dataclass(frozen=True)
class RoundResult:
    """What a round did.

    Attributes:
        round, epoch: which round, and how many prunings its mask has behind it.
        accepted: the clients in the mean, in the order they were added.
        refused: client id to reason.
        num_samples: of the accepted updates together.
        loss: mean of the losses that updates reported, by samples; None if none did.
        uplink_bytes: `len` of every message that came, refused ones too.
    """

    round: int
    epoch: int
    accepted: tuple[ClientId, ...]
    refused: dict[ClientId, str]
    num_samples: int
    loss: float | None
    uplink_bytes: int


class FedMapServer:
    """Holds the global model: its survivors packed, its mask, and when each weight was pruned.

    Args:
        params: the flattened global model, which also serves evaluation: after `begin_round` and
            `aggregate` its parameters are the global model's.
        schedule: how many weights survive which round.
        dtype: of the values in a broadcast: "float32", "float16", "bfloat16" or "int8". With all
            but the first the server adopts what the receivers decode, so that all hold the same
            model.
        lr: the clients' learning rate, which travels in the broadcast: a number, a function of the
            round, or None to leave it to the clients.
        min_updates: a round with fewer accepted updates fails.
        server_optimizer: what to do with the mean; FedAvg takes it as the model.
        lossless: entropy-code mask and values where that is smaller; the values stay the same.

    Raises:
        ValueError: `min_updates` below 1, an unknown dtype.
    """

    def __init__(
        self,
        params: FlatParameters,
        schedule: Schedule,
        *,
        dtype: str = "float32",
        lr: float | Callable[[int], float] | None = None,
        min_updates: int = 1,
        server_optimizer: ServerOptimizer | None = None,
        lossless: bool = True,
    ) -> None:
        if min_updates < 1:
            raise ValueError(f"min_updates: expected at least 1, got {min_updates}")
        codec.check_dtype(dtype)
        params.check_bound()
        self.params = params
        self.layout = params.layout
        self.schedule = schedule
        self.dtype = dtype
        self.lr = lr
        self.min_updates = min_updates
        self.server_optimizer = server_optimizer or FedAvg()
        self.lossless = lossless
        self.round = 0
        self._body: Body | None = None
        self._messages: dict[bytes | None, bytes] = {}
        self._intake: Intake | None = None
        mask, device = params.mask, params.values.device
        values = ops.pack(params.prunable, mask, out=torch.empty(mask.nnz, device=device))
        size = mask.nnz + self.layout.tail_numel
        self._model = GlobalModel(
            mask,
            values,
            params.tail.detach().to(torch.float32, copy=True),
            torch.zeros(mask.numel, dtype=torch.uint8, device=device),
            (mask.digest(),),
            fresh_state(self.server_optimizer, size, device),
        )

    @property
    def mask(self) -> Mask:
        """The mask of the global model; all parties' after `begin_round`."""
        return self._model.mask

    @property
    def epoch(self) -> int:
        """How many times the mask has been pruned."""
        return self._model.epoch

    def begin_round(self) -> None:
        """Prune if the schedule's count for this round is below nnz, and encode the broadcast.

        Idempotent within a round.

        Raises:
            ValueError: a weight beyond the range of the broadcast's dtype; nothing is changed.
        """
        if self._body is not None:
            return
        model = self._model
        keep = self.schedule.keep(self.round, self.layout.eligible)
        if keep < model.mask.nnz:
            model = model.pruned(keep)
        values, tail = codec.wire_parts(model.values, model.tail, self.dtype)
        lr = self.lr(self.round) if callable(self.lr) else self.lr
        self._body = codec.encode_body(
            self.layout,
            model.mask,
            values,
            tail,
            self.params.buffers,
            lossless=self.lossless,
            round=self.round,
            epoch=model.epoch,
            meta=None if lr is None else {"lr": float(lr)},
        )
        if self.dtype != "float32":  # the model is what the receivers decode
            model = replace(model, values=values.float(), tail=tail.float())
        if model is not self._model:
            self._commit(model)

    def _commit(self, model: GlobalModel) -> None:
        self._model = model
        write_model(self.params, model.mask, model.values, model.tail)

    def broadcast(self, have: bytes | None = None) -> bytes:
        """This round's message for a client that holds the mask of digest `have`. Pure.

        Args:
            have: `client.have`. None gives a self-contained message, enough for a client never
                seen; the digest of the current mask gives no mask section; the digest of an
                earlier mask a delta over it; an unknown digest the full mask.

        Raises:
            RuntimeError: before `begin_round`.
        """
        body = self._require_body("broadcast")
        known = have if have in self._model.digests else None
        if known not in self._messages:
            if known is None:
                message = body.message("full")
            elif known == self.mask.digest():
                message = body.message("none")
            else:
                parent = self._model.mask_at(self._model.digests.index(known))
                message = body.message("delta", parent)
            self._messages[known] = message
        return self._messages[known]

    def _require_body(self, what: str) -> Body:
        if self._body is None:
            raise RuntimeError(f"{what}: expected begin_round() first in round {self.round}")
        return self._body

    def aggregate(self, updates: Iterable[tuple[ClientId, Bytes]]) -> RoundResult:
        """Admit each update whole or refuse it, then take the weighted mean of the admitted.

        Args:
            updates: (client id, message), in any order: they are added in order of client id, so
                the same updates give the same bits. Ids are all ints or all strings. A client that
                sends two different messages has both refused.

        Returns:
            What was done; the model has moved, and the next round can begin.

        Raises:
            RoundFailed: fewer than `min_updates` were admitted, or their mean is not finite. The
                server is as it was and takes the same bytes again.
            RuntimeError: before `begin_round`, or while a stream (`add`) is under way.
        """
        self._require_body("aggregate")
        if self._intake is not None:
            raise RuntimeError("aggregate: expected no stream under way; close_round() ends it")
        received: dict[ClientId, set[bytes]] = {}
        total = 0
        for client, data in updates:
            total += len(data)
            received.setdefault(client, set()).add(bytes(data))
        try:
            intake = self._opened("aggregate")
            for client in _in_order(received):
                messages = received[client]
                if len(messages) == 1:
                    intake.add(client, messages.pop())
                else:
                    intake.refused[client] = f"expected one update, got {len(messages)} that differ"
            intake.uplink_bytes = total
            return self.close_round()
        finally:
            self._intake = None

    def add(self, client: ClientId, data: Bytes) -> str | None:
        """The streaming form: admit one update and add it at once; `close_round` ends the round.

        Memory is one accumulator, whatever the number of clients. The order of the calls is the
        order of the sum.

        Returns:
            None if it was admitted, else the reason why it was refused. A client's second message
            is refused, unless its first one was.

        Raises:
            RuntimeError: before `begin_round`.
        """
        return self._opened("add").add(client, data)

    def _opened(self, what: str) -> Intake:
        body = self._require_body(what)
        if self._intake is None:
            self._intake = Intake(self.layout, body, self.mask.device)
        return self._intake

    def close_round(self) -> RoundResult:
        """End a stream of `add`: the mean becomes the model. Raises as `aggregate`."""
        intake, old = self._opened("close_round"), self._model
        self._intake = None
        if len(intake.accepted) < self.min_updates:
            raise RoundFailed(
                f"round {self.round}: expected at least {self.min_updates} usable updates, got "
                f"{len(intake.accepted)}",
                intake.refused,
            )
        try:
            mean, buffers = intake.mean()
            state = {name: t.clone() for name, t in old.state.items()}
            stepped = self.server_optimizer.step(torch.cat([old.values, old.tail]), mean, state)
            if not ops.all_finite(stepped):
                raise ValueError("expected a finite model after the server's step")
        except ValueError as error:
            raise RoundFailed(f"round {self.round}: {error}", intake.refused) from error
        values, tail = (t.contiguous() for t in stepped.split([old.mask.nnz, old.tail.numel()]))
        self._commit(replace(old, values=values, tail=tail, state=state))
        write_buffers(self.params, buffers)
        result = RoundResult(
            self.round,
            self.epoch,
            tuple(intake.accepted),
            intake.refused,
            intake.num_samples,
            intake.loss(),
            intake.uplink_bytes,
        )
        self.round += 1
        self._body = None
        self._messages = {}
        return result

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` wants, as tensors and plain values, taken between rounds.

        Raises:
            RuntimeError: between `begin_round` and the end of `aggregate`; take it before or after.
        """
        if self._body is not None:
            raise RuntimeError("state_dict: expected no round in progress")
        return {
            "round": self.round,
            "layout": self.layout.digest().hex(),
            "buffers": {name: b.clone() for name, b in self.params.buffers.items()},
            **self._model.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; schedule and options are the constructor's.

        Raises:
            ValueError: a state of another layout, or one whose parts disagree; nothing is changed.
        """
        if state["layout"] != self.layout.digest().hex():
            wanted = self.layout.digest().hex()
            raise ValueError(f"state: expected layout {wanted}, got {state['layout']}")
        names = self.server_optimizer.state_names
        model = GlobalModel.from_state_dict(state, self.layout, names, self.mask.device)
        check_buffers(self.params, state["buffers"])
        self.round = state["round"]
        self._body, self._messages, self._intake = None, {}, None
        self._commit(model)
        write_buffers(self.params, state["buffers"])


def _in_order(clients: Iterable[ClientId]) -> list[ClientId]:
    ids = list(clients)
    if len({type(c) for c in ids}) > 1:
        raise TypeError("updates: expected client ids that are all ints or all strings, got both")
    return sorted(ids)
