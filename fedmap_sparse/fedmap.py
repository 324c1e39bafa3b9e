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
from torch import Tensor

from fedmap_sparse import codec, ops
from fedmap_sparse._intake import Bytes, ClientId, Intake
from fedmap_sparse._model import GlobalModel, check_buffers, write_buffers, write_model
from fedmap_sparse.codec import Body, Message
from fedmap_sparse.layout import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.optim import MaskedOptimizer
from fedmap_sparse.schedule import Schedule
from fedmap_sparse.server_optim import FedAvg, ServerOptimizer, fresh_state

__all__ = [
    "Bytes",
    "ClientId",
    "FedMapClient",
    "FedMapServer",
    "NeedsMask",
    "RoundFailed",
    "RoundResult",
]

MakeOptimizer = Callable[[FlatParameters, Mask, float | None], MaskedOptimizer]


class NeedsMask(ValueError):
    """The client lacks the mask that a broadcast builds on; nothing was changed.

    Attributes:
        have: digest of the client's mask, to pass to `FedMapServer.broadcast`, or None.
    """

    def __init__(self, have: bytes | None) -> None:
        held = "no mask yet" if have is None else f"the mask {have.hex()}"
        super().__init__(
            f"the broadcast builds on a mask that this client lacks (it has {held}): "
            "ask for broadcast(have=client.have)"
        )
        self.have = have

    def __reduce__(self) -> tuple[type[NeedsMask], tuple[bytes | None]]:
        return type(self), (self.have,)


class RoundFailed(RuntimeError):
    """Too few usable updates; the server is as it was and takes the same bytes again.

    Attributes:
        refused: client id to the reason why its update was refused.
    """

    def __init__(self, message: str, refused: dict[ClientId, str]) -> None:
        reasons = "; ".join(f"{client}: {reason}" for client, reason in refused.items())
        super().__init__(f"{message}{f' (refused: {reasons})' if reasons else ''}")
        self.refused = refused


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


class FedMapClient:
    """Receives the global model into its own module, and answers with what it trained.

    Args:
        params: the flattened local model; same layout as the server's, any of the three dtypes.
        optimizer: `(params, mask, lr) -> MaskedOptimizer`, called at each `receive` (state is fresh
            each round); lr is the broadcast's, or None. Its result is `client.optimizer`. None:
            the caller trains as it likes.
        keep_optimizer: keep one optimizer over rounds; its state follows the mask, its learning
            rate the broadcast.
        dtype: of the values in an update: "float32", "float16", "bfloat16" or "int8". With int8 the
            client keeps the error of each update and makes it good in its next (error feedback).
        delta: send differences from the broadcast instead of values: smaller numbers, which lose
            less in few bits. float32 differences are rounded, so they are not lossless.
        lossless: entropy-code the values where that is smaller; they stay the same.
        prox_mu: FedProx (Li et al., arXiv 1812.06127): each step of `optimizer` adds
            `prox_mu * (w - w_received)` to the gradient. 0: off.
    """

    def __init__(
        self,
        params: FlatParameters,
        *,
        optimizer: MakeOptimizer | None = None,
        keep_optimizer: bool = False,
        dtype: str = "float32",
        delta: bool = False,
        lossless: bool = True,
        prox_mu: float = 0.0,
    ) -> None:
        codec.check_dtype(dtype)
        if not prox_mu >= 0:
            raise ValueError(f"prox_mu: expected at least 0, got {prox_mu}")
        if prox_mu and optimizer is None:
            raise ValueError("prox_mu: expected an optimizer to add the term in, got None")
        params.check_bound()
        self.params = params
        self.layout = params.layout
        self.dtype = dtype
        self.delta = delta
        self.lossless = lossless
        self.prox_mu = prox_mu
        self.keep_optimizer = keep_optimizer
        self.optimizer: MaskedOptimizer | None = None
        self._make_optimizer = optimizer
        self._received: tuple[bytes, int, int] | None = None
        self._base: Message | None = None
        self._residual: Tensor | None = None
        self._mask: Mask | None = None
        self._anchor: Tensor | None = None

    @property
    def have(self) -> bytes | None:
        """Digest of the mask this client holds, for `FedMapServer.broadcast`; None at first."""
        return None if self._mask is None else self._mask.digest()

    def receive(self, data: Bytes) -> Message:
        """Take a broadcast: weights (+0.0 where pruned), tail, buffers and mask.

        Returns:
            The decoded message; `.round` and `.meta` (with "lr") may be of use. Its tensors view
            `data`.

        Raises:
            NeedsMask: it builds on a mask that this client lacks.
            FormatError: it is not sound, or of another layout.
            RuntimeError: the module's parameters are no longer views (see `rebind`).
            In each case nothing is changed.
        """
        self.params.check_bound()
        try:
            message = codec.decode(
                data, self.layout, mask=self._mask, device=self.params.values.device
            )
        except codec.MaskNeeded as error:
            raise NeedsMask(self.have) from error
        lr = message.meta.get("lr")
        mask = message.mask
        write_model(self.params, mask, message.packed, message.tail)
        write_buffers(self.params, message.buffers)
        self._keep_residual(mask)
        self._mask = mask
        self._received = (message.broadcast_digest, message.round, message.epoch)
        self._base = message if self.delta else None
        if self.prox_mu:
            self._anchor = self.params.values.clone()
        self._renew_optimizer(lr if isinstance(lr, float) else None)
        return message

    def _keep_residual(self, mask: Mask) -> None:
        """Let the error of earlier updates follow the mask."""
        if self.dtype != "int8":
            return
        old = self._mask
        if self._residual is not None and old is not None and mask <= old:
            self._residual = ops.pack(self._residual, ops.relative(mask, old))
        else:
            self._residual = torch.zeros(mask.nnz, device=mask.device)

    def _renew_optimizer(self, lr: float | None) -> None:
        if self._make_optimizer is None or self._mask is None:
            return
        if self.optimizer is not None and self.keep_optimizer:
            if lr is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
            return
        self.optimizer = self._make_optimizer(self.params, self._mask, lr)
        if self.prox_mu:
            self.optimizer.register_step_pre_hook(self._add_proximal)

    @torch.no_grad()
    def _add_proximal(self, *_: Any) -> None:
        assert self._anchor is not None
        for p, e in zip(self.params.parameters, self.layout.entries, strict=True):
            if p.grad is not None:
                start = self._anchor[e.offset : e.offset + e.numel].view(e.shape)
                p.grad.add_(p - start, alpha=self.prox_mu)

    def update(self, num_samples: int, loss: float | None = None) -> bytes:
        """The answer to the last broadcast: survivors' values, tail and buffers; no mask.

        Args:
            num_samples: this client's weight in the mean, at least 1.
            loss: its mean training loss, for the round's result.

        Raises:
            RuntimeError: nothing was received yet, or the parameters are no longer views.
            ValueError: `num_samples` below 1, or values beyond the wire dtype's range.
        """
        if self._received is None or self._mask is None:
            raise RuntimeError("update: expected receive() first")
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        self.params.check_bound()
        digest, round, epoch = self._received
        residual = None if self._residual is None else self._residual.clone()
        data = codec.encode(
            self.params,
            self._mask,
            dtype=self.dtype,
            base=self._base,
            lossless=self.lossless,
            residual=residual,
            round=round,
            epoch=epoch,
            num_samples=num_samples,
            answers=digest,
            meta=None if loss is None else {"loss": float(loss)},
        )
        self._residual = residual
        return data

    def state_dict(self) -> dict[str, Any]:
        """What a client keeps between rounds beside its data: its mask, the error of its last int8
        update, and a kept optimizer."""
        return {
            "mask": None if self._mask is None else self._mask.words.clone(),
            "residual": None if self._residual is None else self._residual.clone(),
            "optimizer": self.optimizer.state_dict()
            if self.optimizer is not None and self.keep_optimizer
            else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`: the next `receive` may bring a delta over the mask.

        Raises:
            ValueError: a mask of another layout.
        """
        if state["mask"] is None:
            self._mask = None
            return
        words = state["mask"].to(self.params.values.device, copy=True)
        mask = Mask.from_words(words, self.layout.prunable_numel)
        residual = state["residual"]
        if residual is not None and residual.numel() != mask.nnz:
            raise ValueError(f"residual: expected {mask.nnz} elements, got {residual.numel()}")
        self.params.mask = mask
        self._mask = mask
        self._residual = None if residual is None else residual.to(mask.device, copy=True)
        if state["optimizer"] is not None and self._make_optimizer is not None:
            self._renew_optimizer(state["optimizer"]["param_groups"][0]["lr"])
            assert self.optimizer is not None
            self.optimizer.load_state_dict(state["optimizer"])


def _in_order(clients: Iterable[ClientId]) -> list[ClientId]:
    ids = list(clients)
    if len({type(c) for c in ids}) > 1:
        raise TypeError("updates: expected client ids that are all ints or all strings, got both")
    return sorted(ids)
