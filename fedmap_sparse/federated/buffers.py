"""The buffers of one round. Each kind has a rule that refers to the broadcast's own buffers.

float
    The mean by samples. An element that is infinite or NaN in the broadcast (a causal mask of
    -inf) is a constant: an update must carry the same.
int
    The median over clients; of two middle values the one nearer to the broadcast's. So neither the
    largest claim nor the first one wins. A value must fit the buffer's dtype, and a counter of 32
    or 64 bits may move by at most 2^30 or 2^40 in one round.
bool
    An element flips when more than half of the clients flipped it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmap_sparse.codec.values import peak

#: The largest magnitude of an element of a float64 buffer: times 2^53 samples, summed over any
#: number of clients, it stays finite.
_WIDEST = 2.0**900
_LARGEST_MOVE = {32: 1 << 30, 64: 1 << 40}


def largest(dtype: torch.dtype) -> float:
    """The largest magnitude that an element of a buffer may have."""
    return min(torch.finfo(dtype).max, _WIDEST)


class BufferMeans:
    """What the admitted updates make of the buffers.

    Float and bool buffers take memory that does not grow with the number of clients. An integer
    buffer takes 8 bytes per element and client that changed it.

    Args:
        sent: the broadcast's buffers, on the CPU.
        held: the model's buffers, whose dtypes the results must fit.
    """

    def __init__(self, sent: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        self._sent = sent
        self._dtypes = {name: b.dtype for name, b in held.items()}
        self._floats = [name for name, b in sent.items() if b.is_floating_point()]
        self._limit = min((largest(self._dtypes[name]) for name in self._floats), default=0.0)
        self._constants = any(bool(self._constant(name).any()) for name in self._floats)
        self._sums: Tensor | None = None  # of all float buffers, side by side
        self._flips: dict[str, Tensor] = {}
        self._changed: dict[str, list[Tensor]] = {}
        self._clients = 0
        self._samples = 0

    def check(self, came: Mapping[str, Tensor]) -> None:
        """Raise ValueError, naming the buffer, unless each element follows its rule."""
        if self._constants or not peak(self._side_by_side(came)) <= self._limit:
            for name in self._floats:
                self._check_floats(name, came[name])
        for name, b in came.items():
            if not b.is_floating_point() and b.dtype != torch.bool:
                self._check_integers(name, b)

    def _side_by_side(self, came: Mapping[str, Tensor]) -> Tensor:
        """All float buffers as one: a model has dozens of small ones."""
        parts = [came[name].reshape(-1) for name in self._floats]
        return torch.cat(parts) if parts else torch.empty(0, device="cpu")

    def _constant(self, name: str) -> Tensor:
        """Where the broadcast's buffer cannot be averaged."""
        return ~(self._sent[name].abs() <= largest(self._dtypes[name]))

    def _check_floats(self, name: str, b: Tensor) -> None:
        limit, sent = largest(self._dtypes[name]), self._sent[name]
        good = b.abs() <= limit
        if bool(good.all()) and not bool(self._constant(name).any()):
            return
        same = (b == sent) | (b.isnan() & sent.isnan())
        if not bool(torch.where(self._constant(name), same, good).all()):
            raise ValueError(
                f"{name}: expected finite elements within {limit:.5g}, and the broadcast's own "
                "where that has others, got something else"
            )

    def _check_integers(self, name: str, b: Tensor) -> None:
        sent, info = self._sent[name], torch.iinfo(self._dtypes[name])
        low, high = max(info.min, -(1 << 63)), min(info.max, (1 << 63) - 1)
        if b.numel() and not (low <= int(b.min()) and int(b.max()) <= high):
            raise ValueError(f"{name}: expected integers from {low} to {high}, got one beyond")
        move = _LARGEST_MOVE.get(info.bits)
        if move is None or torch.equal(b, sent):
            return
        floor = sent.clamp(min=low + move) - move
        ceiling = sent.clamp(max=high - move) + move
        if bool(((b < floor) | (b > ceiling)).any()):
            raise ValueError(
                f"{name}: expected to move by at most 2^{move.bit_length() - 1} from the "
                "broadcast's, got more"
            )

    def add(self, came: Mapping[str, Tensor], weight: int) -> None:
        """Add checked buffers of one client."""
        self._clients += 1
        self._samples += weight
        product = self._side_by_side(came).to(torch.float64) * weight
        self._sums = product if self._sums is None else self._sums + product
        for name, b in came.items():
            if b.is_floating_point():
                continue
            if b.dtype == torch.bool:
                flips = (b != self._sent[name]).to(torch.int32)
                before = self._flips.get(name)
                self._flips[name] = flips if before is None else before + flips
            elif not torch.equal(b, self._sent[name]):
                self._changed.setdefault(name, []).append(b.clone())

    def result(self, floats: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Every buffer after the round.

        Args:
            floats: the float buffers, if an aggregator has found them already.
        """
        if floats is None:
            assert self._sums is not None
            sizes = [self._sent[name].numel() for name in self._floats]
            means = (self._sums / self._samples).split(sizes)
            floats = {
                name: mean.view(self._sent[name].shape)
                for name, mean in zip(self._floats, means, strict=True)
            }
        found = {}
        for name, sent in self._sent.items():
            if sent.is_floating_point():
                constant = self._constant(name)
                limit = largest(self._dtypes[name])  # an aggregator's may lie beyond it
                mean = floats[name].clamp(-limit, limit)
                found[name] = torch.where(constant, sent.to(mean.dtype), mean)
            elif sent.dtype == torch.bool:
                found[name] = sent ^ (2 * self._flips[name] > self._clients)
            else:
                found[name] = self._median(name)
        return found

    def _median(self, name: str) -> Tensor:
        sent, changed = self._sent[name], self._changed.get(name, [])
        unchanged = self._clients - len(changed)
        if unchanged >= len(changed):
            return sent  # at least one of the middle values
        values = torch.stack([*changed, *[sent] * unchanged]).sort(0).values
        low, high = values[(self._clients - 1) // 2], values[self._clients // 2]
        # Both moves are at most 2^40, or of 8 or 16 bits: no difference overflows.
        return torch.where((low - sent).abs() <= (high - sent).abs(), low, high)
