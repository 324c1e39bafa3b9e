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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedmap_sparse import _checks, codec
from fedmap_sparse.codec import Coding, Message, meta
from fedmap_sparse.codec.buffers import FlatBuffers
from fedmap_sparse.codec.container import MAX_INTEGER
from fedmap_sparse.errors import RoundFailed
from fedmap_sparse.federated import updates as arrived
from fedmap_sparse.federated.aggregation import (
    Aggregation,
    Aggregator,
    RoundResult,
    from_outside,
)
from fedmap_sparse.federated.global_model import Criterion, GlobalModel, write_buffers
from fedmap_sparse.federated.held import ModelServer
from fedmap_sparse.federated.landing import Landing
from fedmap_sparse.federated.privacy import Gaussian
from fedmap_sparse.federated.rounds import OpenRound, encoded
from fedmap_sparse.federated.server_optim import FedAvg, ServerOptimizer
from fedmap_sparse.federated.updates import TIMES_MEDIAN, Bytes, ClientId, median
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.schedule import Schedule


class FedMapServer(ModelServer):
    """Holds the global model: its survivors packed, its mask, and when each weight was pruned.

    `broadcast`, `add` and `close_round` may be called from several threads.

    Args:
        params: the flattened global model, which also serves evaluation: after `begin_round` and
            `aggregate` its parameters are the global model's. What a caller writes into them
            between rounds (pretrained weights, say) is taken up by the next `begin_round`.
        schedule: how many weights survive which round.
        dtype: of the values in a broadcast: "float32", "float16", "bfloat16" or "int8". With all
            but the first the server adopts what the receivers decode, so that all hold the same
            model.
        lr: the clients' learning rate, which travels in the broadcast: a number, a function of the
            round, or None to leave it to the clients.
        min_updates: a round with fewer accepted updates fails.
        server_optimizer: what to do with the mean; FedAvg takes it as the model.
        coding: "entropy" codes mask and values where that is smaller; the values stay the same.
            "raw" leaves them as they are.
        criterion: `(survivors, mask, layout) -> scores`, what pruning ranks by; None: magnitude,
            which costs nothing more.
        aggregator: instead of the mean by samples; see `federated.robust`.
        privacy: instead of an aggregator: clip, and add noise; see `federated.privacy`.
        record: further entries of each broadcast's record (`Message.meta`), a scale for sums, say.
        max_samples: the most that an update's claim of samples counts. None: ten times the median
            of the round's claims (of the last round's in a stream; of the first three updates'
            in a server's first stream).
        keys: one secret key per client, at least 32 bytes each: every message then travels in an
            envelope that proves its sender (docs/format.md, 9). None: no envelopes.

    Raises:
        ValueError: `min_updates` or `max_samples` below 1, an unknown dtype or coding, a weight
            that is not finite or beyond the range of `dtype`, `privacy` beside an aggregator.

    >>> import torch, fedmap_sparse as fs
    >>> params = fs.flatten(torch.nn.Linear(20, 5))
    >>> server = fs.FedMapServer(params, fs.schedule.OneShot(target=0.9, at=0))
    >>> client = fs.FedMapClient(fs.flatten(torch.nn.Linear(20, 5)))
    >>> server.begin_round()
    >>> server.mask.nnz
    10
    >>> _ = client.receive(server.broadcast(client.have))
    >>> server.aggregate([("phone", client.update(num_samples=10))]).accepted
    ('phone',)
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
        coding: Coding = "entropy",
        criterion: Criterion | None = None,
        aggregator: Aggregator | None = None,
        privacy: Gaussian | None = None,
        record: Mapping[str, meta.Value] | None = None,
        max_samples: int | None = None,
        keys: Mapping[ClientId, bytes] | None = None,
    ) -> None:
        arrived.check_least("min_updates", min_updates)
        arrived.check_least("max_samples", 1 if max_samples is None else max_samples)
        codec.check_dtype(dtype)
        codec.check_coding(coding)
        if aggregator is not None and privacy is not None:
            raise ValueError("privacy: expected no aggregator beside it, got one")
        self.schedule = schedule
        self.dtype = dtype
        self.lr = lr
        self.min_updates = min_updates
        self.server_optimizer = server_optimizer or FedAvg()
        self.coding = coding
        self.criterion = criterion
        self.aggregator = aggregator
        self.privacy = privacy
        self.record = arrived.checked_record(record or {})
        self.max_samples = max_samples
        self.keys = None if keys is None else arrived.checked_keys(keys)
        super().__init__(params, dtype, self.server_optimizer)

    def __repr__(self) -> str:
        model = self._held.model
        phase = "open" if self._open is not None else "idle"
        return (
            f"FedMapServer(round {self.round}, {phase}, epoch {model.epoch}, {model.mask.nnz} of "
            f"{self.layout.eligible} weights, {self.dtype})"
        )

    def begin_round(self) -> None:
        """Prune if the schedule's count for this round is below nnz, and encode the broadcast.

        Idempotent within a round.

        Raises:
            ValueError: a weight that the caller wrote and that cannot be sent, a learning rate or
                a criterion's scores that are no numbers; nothing is changed.
            RuntimeError: the parameters are no longer views (see `FlatParameters.rebind`).
        """
        with self._lock:
            if self._open is not None:
                return
            before = model = self._held.current()
            keep = _checks.number(self._scheduled())
            if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
                raise ValueError(f"schedule: expected an int of at least 0 to keep, got {keep!r}")
            if keep < model.mask.nnz:
                model = model.pruned(keep, self.criterion, self.layout)
            lr = self.lr(self.round) if callable(self.lr) else self.lr
            entries = self.record | ({} if lr is None else {"lr": _checks.finite("lr", lr)})
            message = self._composed(model, entries)
            if self.dtype != "float32":  # the model is what the receivers decode
                model = replace(model, values=message.packed.float(), tail=message.tail.float())
            landing = Landing.of(model, self.server_optimizer, self._held.limit)
            if model is not self._held.model:
                self._held.commit(model)
            self._open = OpenRound(message, before, landing)

    def _composed(self, model: GlobalModel, record: dict[str, Any]) -> Message:
        return codec.compose(
            self.layout,
            model.mask,
            model.values,
            model.tail,
            self.params.buffers,
            dtype=self.dtype,
            coding=self.coding,
            round=self.round,
            epoch=model.epoch,
            meta=record,
        )

    def broadcast(self, have: bytes | None = None, *, client: ClientId | None = None) -> bytes:
        """This round's message for a client that holds the mask of digest `have`. Pure.

        Args:
            have: `client.have`. None gives a self-contained message, enough for a client never
                seen; the digest of the current mask gives no mask section; the digest of an
                earlier mask a delta over it; an unknown digest the full mask.
            client: whom it is for; needed where the server has keys.

        Raises:
            RuntimeError: before `begin_round`.
            ValueError: the server has keys, but none of `client`.
        """
        with self._lock:
            data = self._require("broadcast").broadcast(have, self._held.model)
            return self._sealed(data, _checks.number(client))

    def _sealed(self, data: bytes, client: ClientId | None) -> bytes:
        if self.keys is None:
            return data
        if client is None or client not in self.keys:
            raise ValueError(f"client: expected one of those with a key, got {client!r}")
        return codec.seal(data, self.keys[client], client, self.round, "broadcast")

    def snapshot(self, have: bytes | None = None, *, client: ClientId | None = None) -> bytes:
        """The model as it is, as a message for evaluation: nothing is pruned, no round begins.

        A client `receive`s it like a broadcast; `update` then raises, as it answers no round.

        Args:
            have, client: as in `broadcast`.

        Raises:
            ValueError: a weight that the caller wrote and that cannot be sent.
        """
        with self._lock:
            model = self._held.model if self._open is not None else self._held.current()
            message = self._composed(model, {"snapshot": True})
            return self._sealed(encoded(message, have, model), _checks.number(client))

    def _require(self, what: str) -> OpenRound:
        if self._open is None:
            raise RuntimeError(f"{what}: expected begin_round() first in round {self.round}")
        return self._open

    def _idle(self, what: str) -> OpenRound:
        under_way = self._require(what)
        if under_way.aggregation is not None:
            raise RuntimeError(f"{what}: expected no stream under way; close_round() ends it")
        return under_way

    def aggregate(
        self,
        updates: Iterable[tuple[ClientId, Bytes]],
        *,
        order: Sequence[ClientId] | None = None,
        weights: Mapping[ClientId, int] | None = None,
    ) -> RoundResult:
        """Admit each update whole or refuse it, then take the weighted mean of the admitted.

        Args:
            updates: (client id, message), in any order. A client that sends two different messages
                has both refused.
            order: client ids in the order of the sum; every sender is in it. None: ascending, so
                that the same updates give the same bits; ids are then all ints or all strings.
            weights: samples of each client, instead of what it claims; not capped.

        Returns:
            What was done; the model has moved, and the next round can begin.

        Raises:
            RoundFailed: fewer than `min_updates` were admitted, or no mean could be made of them.
                The server is as it was and takes the same bytes again.
            RuntimeError: before `begin_round`, or while a stream (`add`) is under way.
            ValueError: a sender that `order` or `weights` lacks.
        """
        with self._lock:
            under_way = self._idle("aggregate")
            came = arrived.collected(updates, arrived.opener(self.keys, self.round))
            ids = arrived.ordered((*came.messages, *came.unproved), order)
            trusted = arrived.trusted(came.messages, weights)
            single = {c: m[0] for c, m in came.messages.items() if len(m) == 1}
            cap = self.max_samples
            if cap is None and trusted is None:
                cap = arrived.cap(single.values(), under_way.message.broadcast_digest)
            aggregation = self._opened(under_way, cap)
            try:
                for client in ids:
                    if client in single:
                        weight = None if trusted is None else trusted[client]
                        aggregation.offer(client, single[client], weight)
                    elif client in came.unproved:
                        aggregation.refuse(client, came.unproved[client])
                    else:
                        count = len(came.messages[client])
                        aggregation.refuse(client, f"expected one update, got {count} that differ")
                aggregation.uplink_bytes = came.size
                return self.close_round()
            finally:
                under_way.aggregation = None

    def add(self, client: ClientId, data: Bytes, *, weight: int | None = None) -> str | None:
        """The streaming form: admit one update and add it at once; `close_round` ends the round.

        Memory is one accumulator, whatever the number of clients (see `Aggregator` for others).
        The order of the calls is the order of the sum. Threads check their updates at once and add
        them one after another.

        Args:
            weight: samples, instead of what the client claims; not capped.

        Returns:
            None if it was admitted, else the reason why it was refused. A client's second message
            is refused, unless its first one was.

        Raises:
            RuntimeError: before `begin_round`.
            ValueError: a `weight` below 1.
        """
        if weight is not None:
            weight = (arrived.trusted([client], {client: weight}) or {})[client]
        client = _checks.number(client)
        with self._lock:
            aggregation = self._streaming("add")
            aggregation.uplink_bytes += arrived.size(data)
            opened = arrived.opener(self.keys, self.round)
        try:
            message = opened(client, data)
        except (ValueError, TypeError) as error:
            return aggregation.refuse(client, str(error))
        return aggregation.offer(client, message, weight)

    def _streaming(self, what: str) -> Aggregation:
        under_way = self._require(what)
        if under_way.aggregation is not None:
            return under_way.aggregation
        last = self._typical
        known = self.max_samples or (None if last is None else TIMES_MEDIAN * last)
        return self._opened(under_way, known)

    def _opened(self, under_way: OpenRound, cap: int | None) -> Aggregation:
        under_way.aggregation = Aggregation(
            under_way.message,
            under_way.landing,
            self.params.buffers,
            cap,
            self.aggregator,
            self.privacy,
        )
        return under_way.aggregation

    def close_round(self) -> RoundResult:
        """End a stream of `add`: the mean becomes the model. Raises as `aggregate`."""
        with self._lock:
            self.params.check_bound()
            aggregation = self._streaming("close_round")
            under_way = self._require("close_round")
            under_way.aggregation = None
            aggregation.close()
            came = len(aggregation.accepted)
            least = max(self.min_updates, self.aggregator.least if self.aggregator else 1)
            if came < least:
                reason = f"expected at least {least} usable updates, got {came}"
                raise RoundFailed(f"round {self.round}: {reason}", aggregation.refused)
            try:
                mean, buffers = aggregation.mean()
                stepped, state = under_way.landing.step(mean)
            except ValueError as error:
                raise RoundFailed(f"round {self.round}: {error}", aggregation.refused) from error
            result = aggregation.result(self.round, self.epoch)
            if aggregation.claims:
                self._typical = median(aggregation.claims)
            self._end(stepped, state, buffers)
            return self._noted(result)

    def apply_mean(
        self, array: Tensor, num_samples: int, clients: int | Sequence[ClientId]
    ) -> RoundResult:
        """End the round with a mean that was made elsewhere, by secure aggregation say.

        Args:
            array: the mean by samples of the clients' `update_array`: float32, 1-D. Its parts are
                those of `array_sections(server.layout, server.mask)`.
            num_samples: of the clients together, at least 1.
            clients: who took part, or how many.

        Returns:
            What was done. Integer and bool buffers stay as they are.

        Raises:
            RuntimeError: before `begin_round`, or while a stream (`add`) is under way.
            RoundFailed: fewer clients than `min_updates`.
            TypeError, ValueError: another dtype or length, counts below 1 or beyond 2^53, a client
                twice, a value that is not finite or that the model cannot hold, named by its
                tensor. Nothing is changed.
        """
        arrived.check_least("num_samples", num_samples, MAX_INTEGER)
        accepted = arrived.participants(clients)
        with self._lock:
            self.params.check_bound()
            under_way = self._idle("apply_mean")
            if len(accepted) < self.min_updates:
                reason = f"expected at least {self.min_updates} clients, got {len(accepted)}"
                raise RoundFailed(f"round {self.round}: {reason}")
            mean, buffers = from_outside(
                array, under_way.message, under_way.landing, self.params.buffers
            )
            stepped, state = under_way.landing.step(mean)
            result = RoundResult(self.round, self.epoch, accepted, {}, num_samples, None, 0)
            self._end(stepped, state, buffers)
            return self._noted(result)

    def _end(self, stepped: Tensor, state: dict[str, Tensor], buffers: FlatBuffers) -> None:
        model = self._held.model
        nnz = model.mask.nnz
        values, tail = (t.contiguous() for t in stepped.split([nnz, model.tail.numel()]))
        self._held.commit(replace(model, values=values, tail=tail, state=state))
        write_buffers(self.params, buffers)
        self.round += 1
        self._open = None
