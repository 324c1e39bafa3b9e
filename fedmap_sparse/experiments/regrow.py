"""Prune and regrow with masks on the wire, like FedDST (Bibikar et al., arXiv 2112.09824).

The model is sparse from round 0 on. In some rounds each client gives up its smallest weights, takes
as many others where its gradient is largest, trains those, and sends its own mask with its values.
The server averages each weight over the clients that have it, and keeps the largest of each layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmap_sparse import codec, ops
from fedmap_sparse.codec import Message
from fedmap_sparse.engines.workers import Train
from fedmap_sparse.experiments import criteria
from fedmap_sparse.experiments.data import Split
from fedmap_sparse.federated import (
    Bytes,
    ClientId,
    FedMapClient,
    FedMapServer,
    RoundFailed,
    RoundResult,
)
from fedmap_sparse.federated.buffers import BufferMeans
from fedmap_sparse.federated.global_model import GlobalModel, write_buffers, write_model
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask
from fedmap_sparse.schedule import Dense, keep_count


@dataclass(frozen=True)
class Plan:
    """When and how much is regrown.

    Attributes:
        share: of each layer's weights, in the first round.
        every: rounds from one readjustment to the next.
        end: the share falls to 0 here, along a cosine.
    """

    share: float
    every: int
    end: int

    def at(self, at_round: int) -> float:
        """The share of weights that move in a round; 0: none."""
        if at_round % self.every or at_round >= self.end:
            return 0.0
        return self.share / 2 * (1 + math.cos(math.pi * at_round / self.end))


class RegrowServer(FedMapServer):
    """A server whose mask moves.

    Args:
        target: sparsity from the start; each layer's by ERK.
        options: as of FedMapServer.
    """

    def __init__(self, params: FlatParameters, target: float, plan: Plan, **options: Any) -> None:
        super().__init__(params, Dense(), **options)
        self.plan = plan
        model = self._held.model
        keep = keep_count(params.layout.eligible, target)
        first = model.pruned(keep, criteria.erk, params.layout)
        self._adopt(first.mask, first.values, first.tail)

    def _adopt(self, mask: Mask, values: Tensor, tail: Tensor) -> None:
        # As a model that was never pruned: there is no history of masks that nest.
        never = torch.zeros(mask.numel, dtype=torch.uint8, device=values.device)
        self._held.commit(GlobalModel(mask, values, tail, never, (mask.digest(),), {}))

    def aggregate(
        self,
        updates: Iterable[tuple[ClientId, Bytes]],
        *,
        order: Sequence[ClientId] | None = None,
        weights: Mapping[ClientId, int] | None = None,
    ) -> RoundResult:
        """As FedMapServer's; in a round of readjustment by ascending client, over their masks."""
        if not self.plan.at(self.round):
            return super().aggregate(updates, order=order, weights=weights)
        sent = self._require("aggregate").message
        sums = _Sums(sent, self.params)
        refused: dict[ClientId, str] = {}
        size = 0
        for client, data in sorted(updates, key=lambda pair: pair[0]):
            size += len(data)
            try:
                sums.add(client, codec.decode(data, self.layout, mask=sent.mask))
            except (ValueError, TypeError) as error:
                refused[client] = str(error)
        if len(sums.accepted) < self.min_updates:
            reason = (
                f"expected at least {self.min_updates} usable updates, got {len(sums.accepted)}"
            )
            raise RoundFailed(f"round {self.round}: {reason}", refused)
        mean = sums.values / sums.held.clamp(min=1)
        mask = largest_of_each(mean, sums.held > 0, sent.mask, self.layout)
        tail = (sums.tail / sums.samples).float()
        self._adopt(mask, ops.pack(mean.float(), mask), tail)
        write_buffers(self.params, sums.buffers.result())
        result = RoundResult(
            self.round, self.epoch, tuple(sums.accepted), refused, sums.samples, sums.loss, size
        )
        self.round += 1
        self._open = None
        return result


class _Sums:
    """Sums over updates that have masks of their own, weighted by samples."""

    def __init__(self, sent: Message, params: FlatParameters) -> None:
        self._sent = sent
        self.values = torch.zeros(params.layout.prunable_numel, dtype=torch.float64)
        self.held = torch.zeros_like(self.values)
        self.tail = torch.zeros(params.layout.tail_numel, dtype=torch.float64)
        self.buffers = BufferMeans(params.layout, sent.flat_buffers, params.buffers)
        self.samples = 0
        self.accepted: list[ClientId] = []
        self._losses: list[tuple[float, int]] = []

    def add(self, client: ClientId, message: Message) -> None:
        """Raise ValueError for an update that cannot count."""
        if message.answers != self._sent.broadcast_digest:
            raise ValueError("expected an answer to this round's broadcast, got another")
        if message.num_samples < 1 or not message.all_finite():
            raise ValueError("expected finite values of at least 1 sample, got others")
        self.buffers.check(message.flat_buffers)
        n = message.num_samples
        self.values += n * message.dense().double()
        self.held += n * message.mask.to_bool()
        self.tail += n * message.tail.double()
        self.buffers.add(message.flat_buffers, n)
        self.samples += n
        self.accepted.append(client)
        if isinstance(loss := message.meta.get("loss"), float):
            self._losses.append((loss, n))

    @property
    def loss(self) -> float | None:
        weight = sum(n for _, n in self._losses)
        return sum(loss * n for loss, n in self._losses) / weight if weight else None


def largest_of_each(values: Tensor, among: Tensor, like: Mask, layout: FlatLayout) -> Mask:
    """The largest magnitudes of each layer, as many as `like` has there, of those in `among`.

    Ties keep the lowest index. `among` has as many or more in each layer.
    """
    scores = values.abs().masked_fill(~among, -1)
    old = like.to_bool()
    chosen = torch.zeros_like(old)
    for entry in layout.prunable_entries:
        own = slice(entry.offset, entry.offset + entry.numel)
        best = scores[own].argsort(descending=True, stable=True)[: int(old[own].sum())]
        chosen[own][best] = True
    return Mask.from_bool(chosen)


class RegrowClient(FedMapClient):
    """A client that can move its mask between `receive` and `update`."""

    _moved = False

    def receive(self, data: Bytes | Message) -> Message:
        """As FedMapClient's."""
        message = super().receive(data)
        self._moved = False
        return message

    def move(self, share: float, lr: float | None) -> None:
        """Exchange `share` of each layer's weights by the gradients of the last backward."""
        params, old = self.params, self._mask
        assert old is not None
        gradient = torch.zeros_like(params.prunable)
        for p, entry in zip(params.parameters, params.layout.entries, strict=True):
            if entry.offset < params.layout.prunable_numel and p.grad is not None:
                gradient[entry.offset : entry.offset + entry.numel] = p.grad.reshape(-1)
                p.grad = None
        mask = exchanged(params.prunable.detach(), gradient, old, params.layout, share)
        # A weight that comes anew starts at 0, as what is pruned is.
        write_model(params, mask, ops.pack(params.prunable.detach(), mask), params.tail.clone())
        self._mask, self._moved = mask, True
        self.optimizer = self._made_optimizer(mask, lr)

    def update(self, num_samples: int, loss: float | None = None) -> bytes:
        """As FedMapClient's; with its whole mask after a `move`."""
        if not self._moved:
            return super().update(num_samples, loss)
        mask, answers = self._answering("update")
        known = loss is not None and math.isfinite(loss)
        return codec.encode(
            self.params,
            mask,
            dtype=self.dtype,
            mask_section="full",
            coding=self.coding,
            round=self._seen[0],
            epoch=self._seen[1],
            num_samples=num_samples,
            answers=answers,
            meta={"loss": float(loss)} if known and loss is not None else None,
        )


def exchanged(
    values: Tensor, gradient: Tensor, mask: Mask, layout: FlatLayout, share: float
) -> Mask:
    """A mask with `share` of each layer's weights given up and others taken in their place.

    Those of smallest magnitude go; those with the largest gradient come, of all that are pruned
    (what has just gone stays away).
    """
    kept = mask.to_bool()
    found = kept.clone()
    for entry in layout.prunable_entries:
        own = slice(entry.offset, entry.offset + entry.numel)
        count = min(round(share * int(kept[own].sum())), int((~kept[own]).sum()))
        size = values[own].abs().masked_fill(~kept[own], math.inf)
        slope = gradient[own].abs().masked_fill(kept[own], -1)
        found[own][size.argsort(stable=True)[:count]] = False
        found[own][slope.argsort(descending=True, stable=True)[:count]] = True
    return Mask.from_bool(found)


class Regrowing:
    """Local training after an exchange of weights, in the rounds that have one.

    Args:
        train: the local training.
        samples: of each client; the first `batch` of them give the gradient.
    """

    def __init__(
        self, train: Train, samples: Mapping[ClientId, Split], plan: Plan, batch: int
    ) -> None:
        self._train = train
        self._samples = samples
        self._plan = plan
        self._batch = batch

    def __call__(
        self, name: ClientId, client: FedMapClient, message: Message
    ) -> tuple[int, float | None]:
        """As `Train` says."""
        share = self._plan.at(message.round)
        if share:
            assert isinstance(client, RegrowClient)
            samples, module = self._samples[name], client.params.module
            module.eval()  # buffers stay as they came
            images, labels = samples.images[: self._batch], samples.labels[: self._batch]
            F.cross_entropy(module(images), labels).backward()
            lr = message.meta.get("lr")
            client.move(share, lr if isinstance(lr, float) else None)
        return self._train(name, client, message)
