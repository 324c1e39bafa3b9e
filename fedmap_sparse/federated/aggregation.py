"""One round's updates on their way into the mean: each is admitted whole, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fedmap_sparse import _checks, codec, ops
from fedmap_sparse.codec import Message
from fedmap_sparse.codec.buffers import FlatBuffers
from fedmap_sparse.codec.values import peak
from fedmap_sparse.federated import arrays
from fedmap_sparse.federated.buffers import BufferMeans
from fedmap_sparse.federated.landing import Landing
from fedmap_sparse.federated.lock import Lock
from fedmap_sparse.federated.privacy import Gaussian
from fedmap_sparse.federated.robust import ClippedMean
from fedmap_sparse.federated.updates import TIMES_MEDIAN, ClientId, held, median

#: A stream whose server has seen no round yet holds this many updates back to find a median.
HELD = 3


class Aggregator(Protocol):
    """Combines the vectors of all admitted clients; see `federated.robust` for some.

    Attributes:
        least: how many clients it needs.
    """

    least: int

    def __call__(self, vectors: list[Tensor], weights: list[int], start: Tensor) -> Tensor:
        """The aggregate, float32.

        Args:
            vectors: one finite float32 vector per client, as `array_sections` lists it. The
                order is that of the sum.
            weights: samples, at least 1 each.
            start: the same of the broadcast.
        """


@dataclass(frozen=True)
class RoundResult:
    """What a round did.

    Attributes:
        round, epoch: which round, and how many prunings its mask has behind it.
        accepted: the clients in the mean, in the order they were added.
        refused: client id to reason; no client is in both.
        num_samples: of the accepted updates together, as they were weighted.
        loss: mean of the finite losses that updates reported, by samples; None if none did.
        uplink_bytes: `len` of every message that came, refused ones too.
        capped: client id to the samples that it claimed, where they counted as fewer.
    """

    round: int
    epoch: int
    accepted: tuple[ClientId, ...]
    refused: dict[ClientId, str]
    num_samples: int
    loss: float | None
    uplink_bytes: int
    capped: dict[ClientId, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Admitted:
    """An update that was checked and can be added."""

    message: Message
    claimed: int
    loss: float | None


class Aggregation:
    """Sums over the admitted updates; memory does not grow with their number.

    Values and tail are float64 sums over survivors, added tile by tile from the messages' bytes.
    Buffers follow the rules of `federated.buffers`. With an `aggregator` every client's vector is
    kept, unless it is `ClippedMean`: 4 bytes per survivor, tail and buffer element, and client.

    Args:
        broadcast: what the updates answer.
        landing: where their mean goes.
        module: the model's buffers.
        cap: the largest weight of one update; None: ten times the median of the first three.
        aggregator: instead of the mean.
        privacy: clips each update, adds noise to their mean, and leaves buffers as they are.
    """

    def __init__(
        self,
        broadcast: Message,
        landing: Landing,
        module: Mapping[str, Tensor],
        cap: int | None,
        aggregator: Aggregator | None,
        privacy: Gaussian | None = None,
    ) -> None:
        device = broadcast.mask.device
        self._broadcast = broadcast
        self._landing = landing
        self._aggregator = aggregator
        self._privacy = privacy
        self._start = arrays.join(broadcast.packed, broadcast.tail) if privacy is not None else None
        rule: object = aggregator
        self._clipped = _ClippedSum(rule, broadcast) if isinstance(rule, ClippedMean) else None
        self._values = ops.Accumulator(broadcast.mask.nnz, device=device)
        self._tail = ops.Accumulator(broadcast.layout.tail_numel, device=device)
        self._buffers = BufferMeans(broadcast.layout, broadcast.flat_buffers, module)
        self._vectors: list[Tensor] = []
        self._weights: list[int] = []
        self._losses: list[tuple[float, int]] = []
        self._cap = cap
        self._lock = Lock()
        self.closed = False
        self._waiting: list[tuple[ClientId, Admitted]] = []
        self.claims: list[int] = []
        self.accepted: list[ClientId] = []
        self.refused: dict[ClientId, str] = {}
        self.capped: dict[ClientId, int] = {}
        self.num_samples = 0
        self.uplink_bytes = 0

    def admit(self, data: object, weight: int | None = None) -> Admitted:
        """Check one update whole; nothing is changed.

        Args:
            weight: the caller's, instead of the sender's claim.

        Raises:
            ValueError: why it is refused; FormatError is one.
            TypeError: it is no contiguous bytes.
        """
        sent = self._broadcast
        message = codec.decode(
            data,  # type: ignore[arg-type]  # decode says what is wrong with it
            sent.layout,
            mask=sent.mask,
            base=sent,
            materialize=False,
        )
        if message.answers != sent.broadcast_digest:
            raise ValueError(
                f"expected an answer to the broadcast {sent.broadcast_digest.hex()} of round "
                f"{sent.round}, got one to {message.answers.hex()} of round {message.round}"
            )
        claimed = message.num_samples if weight is None else weight
        if claimed < 1:
            raise ValueError(f"expected at least 1 sample, got {claimed}")
        self._landing.check(message)
        self._buffers.check(message.flat_buffers)
        loss = message.meta.get("loss")
        good = isinstance(loss, float) and math.isfinite(loss)
        return Admitted(message, claimed, loss if good and isinstance(loss, float) else None)

    def refuse(self, client: ClientId, reason: str) -> str:
        """Note why an update was refused, unless the client has another one in the mean."""
        if client not in self.accepted:
            self.refused[client] = reason
        return reason

    def offer(self, client: ClientId, data: object, weight: int | None = None) -> str | None:
        """Check one update and add it: None, or the reason why it was refused.

        Several threads may call it: they check at once and add one after another.
        """
        second = "expected one update, got a second one; the first one counts"
        try:
            if client in self.accepted:
                return second
            update = self.admit(held(data), weight)
        except (ValueError, TypeError) as error:
            with self._lock:
                return self.refuse(client, str(error))
        with self._lock:
            if client in self.accepted:
                return second
            if self.closed:
                return "expected an update before the round ended"
            self.refused.pop(client, None)
            self.accepted.append(client)
            if weight is None:
                self.claims.append(update.claimed)
                self._waiting.append((client, update))
                if self._cap is not None or len(self._waiting) == HELD:
                    self._flush()
            else:
                self._add(update, weight)
        return None

    def close(self) -> None:
        """Take no more updates."""
        with self._lock:
            self.closed = True

    def _flush(self) -> None:
        """Add what waited, in order of arrival, at weights of at most the cap."""
        if self._cap is None:
            self._cap = TIMES_MEDIAN * median(self.claims)
        for client, update in self._waiting:
            if update.claimed > self._cap:
                self.capped[client] = update.claimed
            self._add(update, min(update.claimed, self._cap))
        self._waiting.clear()

    def _add(self, update: Admitted, weight: int) -> None:
        message = update.message
        if self._privacy is not None and self._start is not None:
            clipped, weight = arrays.join(message.packed, message.tail), 1
            self._privacy.clip_(clipped, self._start)
            self._values.add(clipped[: message.mask.nnz], 1)
            self._tail.add(clipped[message.mask.nnz :], 1)
        elif self._aggregator is None:
            message.add_to(self._values, weight)
            self._tail.add(message.tail, weight)
        elif self._clipped is not None:
            self._clipped.add(message, weight)
        else:
            self._vectors.append(arrays.of_message(message))
            self._weights.append(weight)
        self._buffers.add(message.flat_buffers, weight)
        self.num_samples += weight
        if update.loss is not None and self._privacy is None:
            self._losses.append((update.loss, weight))

    def mean(self) -> tuple[Tensor, FlatBuffers]:
        """The aggregate of values and tail, in one float32 vector, and the buffers.

        Raises:
            ValueError: the aggregator refused, or gave what is not finite.
        """
        if self._waiting:
            self._flush()
        sent = self._broadcast
        if self._aggregator is None:
            mean = torch.cat([self._values.mean(), self._tail.mean()])
            if self._privacy is None:
                return mean, self._buffers.result()
            self._privacy.add_noise_(mean, sent.layout, self.num_samples, sent.round)
            return mean, sent.flat_buffers
        if self._clipped is not None:
            found = self._clipped.sums.mean()
        else:
            start = arrays.of_message(sent)
            made = self._aggregator(self._vectors, self._weights, start)
            found = arrays.sound("aggregator", made, start)
        for section in arrays.array_sections(sent.layout, sent.mask):
            if not ops.all_finite(found[section.start : section.stop]):
                raise ValueError(
                    f"aggregator: expected finite numbers in {section.name}, got others"
                )
        vector, floats = arrays.split(found, sent.layout, sent.mask)
        return vector, self._buffers.result(floats)

    def result(self, at_round: int, epoch: int) -> RoundResult:
        return RoundResult(
            at_round,
            epoch,
            tuple(self.accepted),
            self.refused,
            self.num_samples,
            self.loss(),
            self.uplink_bytes,
            self.capped,
        )

    def loss(self) -> float | None:
        """Mean of the reported losses by samples; None if none was reported."""
        weight = sum(w for _, w in self._losses)
        # Divided first: a sum of large losses would overflow.
        return sum(loss * (w / weight) for loss, w in self._losses) if weight else None


class _ClippedSum:
    """What `ClippedMean` makes of updates that come one after another."""

    def __init__(self, rule: ClippedMean, broadcast: Message) -> None:
        self._rule = rule
        self._start = arrays.of_message(broadcast)
        self.sums = ops.Accumulator(self._start.numel(), device=self._start.device)

    def add(self, message: Message, weight: int) -> None:
        vector = arrays.of_message(message)
        self._rule.clip_(vector, self._start)
        self.sums.add(vector, weight)


def from_outside(
    array: object, broadcast: Message, landing: Landing, module: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the mean of survivors and tail, every buffer) of a vector that was averaged elsewhere.

    The rules are those of a message.

    Raises:
        TypeError, ValueError: see `FedMapServer.apply_mean`.
    """
    _checks.check_tensor("array", array, (torch.float32,))
    assert isinstance(array, Tensor)
    wanted = arrays.array_sections(broadcast.layout, broadcast.mask)[-1].stop
    if array.is_meta:
        raise ValueError("array: expected elements in memory, got a meta tensor")
    if array.shape != (wanted,):
        raise ValueError(f"array: expected shape ({wanted},), got {tuple(array.shape)}")
    placed = array.detach().to(broadcast.mask.device)
    mean, floats = arrays.split(placed, broadcast.layout, broadcast.mask)
    # As a message of these values, so that there is one set of rules.
    nnz = broadcast.mask.nnz
    message = replace(broadcast, tail=mean[nnz:], base=None)
    message.__dict__.update(packed=mean[:nnz], _bound=peak(mean[:nnz]))
    landing.check(message)
    sent = broadcast.flat_buffers
    constants = sent["float"]
    moved = torch.where(constants.isfinite(), floats.to(constants.dtype), constants)
    buffers = {**sent, "float": moved}
    means = BufferMeans(broadcast.layout, sent, module)
    means.check(buffers)
    means.add(buffers, 1)
    return mean, means.result()
