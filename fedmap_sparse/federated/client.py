"""The client's half of a round: it receives the global model, trains, and answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import codec, ops
from fedmap_sparse.codec import Coding, Message
from fedmap_sparse.codec.buffers import gather
from fedmap_sparse.codec.container import NO_DIGEST
from fedmap_sparse.codec.envelope import check_client, round_of
from fedmap_sparse.errors import AuthenticationError, FormatError, StateError
from fedmap_sparse.federated import arrays
from fedmap_sparse.federated import state as saved
from fedmap_sparse.federated.global_model import (
    check_buffers,
    infinite_elements,
    limit_of,
    read_mask,
    write_buffers,
    write_model,
)
from fedmap_sparse.federated.updates import Bytes, ClientId, check_least, reported
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.optim import MaskedOptimizer

#: `(params, mask, lr) -> optimizer`; `lr` is the broadcast's, or None if it has none.
MakeOptimizer = Callable[[FlatParameters, Mask, float | None], MaskedOptimizer]


class FedMapClient(saved.BytesState):
    """Receives the global model into its own module, and answers with what it trained.

    Args:
        params: the flattened local model; same layout as the server's, any of the three dtypes.
        optimizer: `(params, mask, lr) -> MaskedOptimizer`, called at each `receive` (state is fresh
            each round); lr is the broadcast's, or None. Its result is `client.optimizer`. None:
            the caller trains without one.
        keep_optimizer: keep one optimizer over rounds; its state follows the mask, its learning
            rate the broadcast.
        dtype: of the values in an update: "float32", "float16", "bfloat16" or "int8". With int8 the
            client keeps the error of each update and makes it good in its next (error feedback).
        delta: send differences from the broadcast instead of values: smaller numbers, which lose
            less in few bits. float32 differences are rounded, so they are not lossless.
        coding: "entropy" codes the values where that is smaller; they stay the same. "raw" leaves
            them as they are.
        prox_mu: FedProx (Li et al., arXiv 1812.06127): each step of `optimizer` adds
            `prox_mu * (w - w_received)` to the gradient. 0: off.
        key, client_id: the secret that the server has for this id. Messages then travel in
            envelopes that prove their sender (docs/format.md, 9). None: no envelopes.

    Raises:
        ValueError: an unknown dtype or coding, a negative `prox_mu`, or one without an optimizer.

    >>> import torch, fedmap_sparse as fs
    >>> server = fs.FedMapServer(fs.flatten(torch.nn.Linear(3, 2)), fs.schedule.Dense())
    >>> client = fs.FedMapClient(fs.flatten(torch.nn.Linear(3, 2)))
    >>> server.begin_round()
    >>> client.receive(server.broadcast(client.have)).round
    0
    >>> update = client.update(num_samples=10)  # bytes; train before it
    """

    _kind = "client"

    def __init__(
        self,
        params: FlatParameters,
        *,
        optimizer: MakeOptimizer | None = None,
        keep_optimizer: bool = False,
        dtype: str = "float32",
        delta: bool = False,
        coding: Coding = "entropy",
        prox_mu: float = 0.0,
        key: bytes | None = None,
        client_id: ClientId | None = None,
    ) -> None:
        codec.check_dtype(dtype)
        codec.check_coding(coding)
        if not 0 <= prox_mu < math.inf:
            raise ValueError(f"prox_mu: expected a finite number of at least 0, got {prox_mu}")
        if prox_mu and optimizer is None:
            raise ValueError("prox_mu: expected an optimizer to add the term in, got None")
        if (key is None) is not (client_id is None):
            raise ValueError("key, client_id: expected both or none, got one")
        if key is not None:
            codec.check_key(key)
            client_id = check_client(client_id)
        params.check_bound()
        self.params = params
        self._key, self.client_id = key, client_id
        self.layout = params.layout
        self.dtype = dtype
        self.delta = delta
        self.coding = coding
        self.prox_mu = prox_mu
        self.keep_optimizer = keep_optimizer
        self.optimizer: MaskedOptimizer | None = None
        self._make_optimizer = optimizer
        self._received: bytes | None = None  # digest of the broadcast that `update` answers
        self._seen = (0, 0)  # round and epoch of the last message
        self._base: Message | None = None
        self._residual: Tensor | None = None  # the error that the next update makes good
        self._spent: tuple[int, Tensor] | None = None  # an update's round, and what it left over
        self._mask: Mask | None = None
        self._anchor: Tensor | None = None
        self._constants: dict[str, int] = {}  # infinite elements of the broadcast's buffers

    def __repr__(self) -> str:
        held = "no mask yet" if self._mask is None else f"{self._mask.nnz} weights"
        return f"FedMapClient({held} of {self.layout.eligible}, {self.dtype})"

    @property
    def have(self) -> bytes | None:
        """Digest of the mask this client holds, for `FedMapServer.broadcast`; None at first."""
        return None if self._mask is None else self._mask.digest()

    def receive(self, data: Bytes | Message) -> Message:
        """Take a broadcast or a snapshot: weights (+0.0 where pruned), tail, buffers and mask.

        Args:
            data: bytes, or what another client of this layout, without a key, made of the same
                bytes: clients in one process then decode a broadcast once.

        Returns:
            The decoded message; its round and its `meta` (with "lr") may be of use. Its tensors
            view `data`.

        Raises:
            NeedsMask: it builds on a mask that this client lacks.
            AuthenticationError: this client has a key, and the envelope is not the server's.
            FormatError: it is not sound, of another layout, no broadcast, older than the last one
                (a client that loads a fresh client's state takes it again), or holds a number that
                this model cannot hold.
            RuntimeError: the module's parameters are no longer views (see `rebind`).
            In each case nothing is changed.
        """
        params = self.params
        params.check_bound()
        message = self._decoded(data)
        lr = self._checked(message)
        mask = message.mask
        residual = self._followed(message)
        write_model(params, mask, message.packed, message.tail)
        write_buffers(params, message.flat_buffers)
        self._mask = mask
        self._residual, self._spent = residual, None
        self._seen = (message.round, message.epoch)
        if message.meta.get("snapshot"):
            self._received = None
            return message
        self._received = message.broadcast_digest
        self._base = message if self.delta else None
        self._constants = infinite_elements(self.layout, message.flat_buffers)
        if self.prox_mu:
            self._anchor = params.values.clone()
        self._renew_optimizer(lr)
        return message

    def _decoded(self, data: Bytes | Message) -> Message:
        device = self.params.values.device
        if isinstance(data, Message):
            if self._key is not None:
                raise AuthenticationError("envelope: expected bytes, got an opened message")
            data.check_receiver(self.layout, self._mask, device)
            return data
        at_round = None
        if self._key is not None and self.client_id is not None:
            at_round = round_of(data)
            data = codec.unseal(data, self._key, self.client_id, at_round, "broadcast")
        message = codec.decode(data, self.layout, mask=self._mask, device=device)
        if at_round not in (None, message.round):
            raise AuthenticationError(f"envelope: expected round {message.round}, got {at_round}")
        return message

    def follow(self, mask: Mask, at_round: int, epoch: int) -> None:
        """Stand where `receive` of a broadcast leaves a client that keeps no state: it has `mask`.

        For a client that trained elsewhere, in another process say; no weight is written.
        """
        self.layout.check_mask(mask)
        self._mask, self._seen = mask, (at_round, epoch)
        self._received = None

    def _checked(self, message: Message) -> float | None:
        """The learning rate of a message that may be received."""
        if message.answers != NO_DIGEST or message.num_samples or message.base is not None:
            raise FormatError("expected a broadcast, got an update", 48)
        last_round, last_epoch = self._seen
        if message.round < last_round:
            raise FormatError(f"expected round {last_round} or later, got {message.round}", 80)
        if message.epoch < last_epoch:
            raise FormatError(f"expected epoch {last_epoch} or later, got {message.epoch}", 88)
        limit = limit_of(self.params.values.dtype)
        if not message.within(limit):
            name = message.beyond(limit)
            raise FormatError(f"{name}: expected finite values within {limit:.5g}, got others")
        try:
            check_buffers(self.params, message.flat_buffers)
        except ValueError as error:
            raise FormatError(str(error)) from error
        if not isinstance(message.meta.get("snapshot", False), bool):
            raise FormatError("meta: expected a Boolean for snapshot, got another type")
        if "lr" not in message.meta:
            return None
        lr = message.meta["lr"]
        if not isinstance(lr, float) or not 0 <= lr < math.inf:
            raise FormatError(f"meta: expected a finite lr of at least 0, got {lr!r}")
        return lr

    def _followed(self, message: Message) -> Tensor | None:
        """The error of earlier updates under the message's mask."""
        if self.dtype != "int8":
            return None
        residual, old = self._residual, self._mask
        if self._spent is not None and message.round > self._spent[0]:
            residual = self._spent[1]  # the round went on: what was sent counts as used
        if residual is not None and old is not None and message.mask <= old:
            return ops.pack(residual, ops.extract(message.mask, old))
        return torch.zeros(message.mask.nnz, dtype=torch.float32, device=message.mask.device)

    def _renew_optimizer(self, lr: float | None) -> None:
        if self._make_optimizer is None or self._mask is None:
            return
        kept = self.optimizer if self.keep_optimizer else None
        # What another federation pruned has no state, and a state of NaN trains no model.
        if kept is None or not (self._mask <= kept.mask and kept.is_finite()):
            self.optimizer = self._made_optimizer(self._mask, lr)
        elif lr is not None:
            for group in kept.param_groups:
                group["lr"] = lr

    def _made_optimizer(self, mask: Mask, lr: float | None) -> MaskedOptimizer:
        assert self._make_optimizer is not None
        optimizer = self._make_optimizer(self.params, mask, lr)
        if self.prox_mu:
            optimizer.register_step_pre_hook(self._add_proximal)
        return optimizer

    @torch.no_grad()
    def _add_proximal(self, *_: Any) -> None:
        assert self._anchor is not None
        for p, e in zip(self.params.parameters, self.layout.entries, strict=True):
            if p.grad is not None:
                start = self._anchor[e.offset : e.offset + e.numel].view(e.shape)
                p.grad.add_(p - start, alpha=self.prox_mu)

    def _answering(self, what: str) -> tuple[Mask, bytes]:
        if self._received is None or self._mask is None:
            raise RuntimeError(f"{what}: expected receive() first, of a broadcast")
        return self._mask, self._received

    def update(self, num_samples: int, loss: float | None = None) -> bytes:
        """The answer to the last broadcast: survivors' values, tail and buffers; no mask.

        Called twice with the same weights it gives the same bytes. The error of an int8 update
        counts as sent when a broadcast of a later round comes.

        Args:
            num_samples: this client's weight in the mean, at least 1.
            loss: its mean training loss, for the round's result; left out if it is not finite.

        Raises:
            RuntimeError: no broadcast was received yet, or the parameters are no longer views.
            TypeError: `num_samples` is no int, or `loss` no number.
            ValueError: `num_samples` below 1, or values beyond the wire dtype's range.
        """
        mask, answers = self._answering("update")
        check_least("num_samples", num_samples)
        loss = reported(loss)
        at_round, epoch = self._seen
        residual = None if self._residual is None else self._residual.clone()
        data = codec.encode(
            self.params,
            mask,
            dtype=self.dtype,
            base=self._base,
            coding=self.coding,
            residual=residual,
            round=at_round,
            epoch=epoch,
            num_samples=num_samples,
            answers=answers,
            meta=None if loss is None else {"loss": loss},
        )
        self._spent = None if residual is None else (at_round, residual)
        if self._key is None or self.client_id is None:
            return data
        return codec.seal(data, self._key, self.client_id, at_round, "update")

    def update_array(self) -> Tensor:
        """What `update` would send, as one float32 vector; `array_sections` lists its parts.

        For sums in which nobody sees one client's values (secure aggregation), with
        `FedMapServer.apply_mean` on the other side. Integer and bool buffers are no part of it.

        Returns:
            float32[survivors + tail + elements of float buffers], a copy.

        Raises:
            RuntimeError: as `update`.
            ValueError: a value that is not finite.
        """
        mask, _ = self._answering("update_array")
        self.params.check_bound()
        packed = ops.pack(self.params.prunable.detach(), mask)
        buffers = gather(self.layout, self.params.buffers)
        array = arrays.join(packed, self.params.tail, buffers)
        if not ops.all_finite(array):
            raise ValueError("update_array: expected finite weights, got NaN or infinity")
        now = infinite_elements(self.layout, buffers)
        for name in {**now, **self._constants}:
            if now.get(name) != self._constants.get(name):
                raise ValueError(f"{name}: expected the broadcast's finite elements to be finite")
        return array

    def state_dict(self) -> dict[str, Any]:
        """What a client keeps between rounds beside its data: its mask, the error of its last int8
        update, and a kept optimizer."""
        last = self._residual if self._spent is None else self._spent[1]
        unspent = None
        if self._spent is not None and self._residual is not None:
            unspent = {"round": self._spent[0], "residual": self._residual.clone()}
        kept = self.optimizer if self.keep_optimizer else None
        if kept is not None and not kept.is_finite():
            kept = None  # as at the next `receive`
        return {
            "mask": None if self._mask is None else self._mask.words.clone(),
            "round": self._seen[0],
            "epoch": self._seen[1],
            "residual": None if last is None else last.clone(),
            "unspent": unspent,
            "optimizer": None if kept is None else kept.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`: the next `receive` may bring a delta over the mask.

        Raises:
            StateError: a state that is damaged, of another layout, or whose parts disagree; the
                message names the field, and nothing is changed.
        """
        defaults = {"round": 0, "epoch": 0, "residual": None, "unspent": None, "optimizer": None}
        if not isinstance(state, Mapping):
            raise StateError(f"state: expected a dict, got {type(state).__name__}")
        given = {**defaults, **state}
        seen = saved.count(given, "round"), saved.count(given, "epoch")
        mask = None
        if saved.field(given, "mask", (Tensor, type(None))) is not None:
            mask = read_mask(given, self.layout, self.params.values.device)
        residual = self._read_residual(given, mask)
        spent = None
        unspent = saved.field(given, "unspent", (dict, type(None)))
        if unspent is not None and residual is not None:
            spent = (saved.count(unspent, "round"), residual)
            residual = self._read_residual(unspent, mask)
        optimizer = self._read_optimizer(saved.field(given, "optimizer", (dict, type(None))), mask)
        if mask is not None:
            self.params.mask = mask
        self._mask, self._seen = mask, seen
        self._residual, self._spent = residual, spent
        self.optimizer = optimizer
        self._received = self._base = self._anchor = None

    def _read_residual(self, state: Any, mask: Mask | None) -> Tensor | None:
        value: Tensor | None = saved.field(state, "residual", (Tensor, type(None)))
        if value is None or mask is None:
            return None
        largest = torch.finfo(torch.float32).max
        saved.tensor("residual", value, (torch.float32,), mask.nnz, largest)
        return value.to(mask.device, copy=True)

    def _read_optimizer(
        self, state: dict[str, Any] | None, mask: Mask | None
    ) -> MaskedOptimizer | None:
        """An optimizer with a saved state; the parameters' mask is as before if it does not fit."""
        if state is None or mask is None or self._make_optimizer is None:
            return None
        before = self.params.mask
        try:
            optimizer = self._made_optimizer(mask, state["param_groups"][0]["lr"])
            optimizer.load_state_dict(state)
            if not optimizer.is_finite():
                raise ValueError("expected a state of finite numbers, got others")
            if not mask <= optimizer.mask:
                raise ValueError("expected a state under the client's mask, got another")
        except (
            ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError,
        ) as error:  # fmt: skip
            self.params.mask = before
            raise StateError(f"optimizer: {error}") from error
        return optimizer
