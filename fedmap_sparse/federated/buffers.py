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

from fedmap_sparse.codec.buffers import FlatBuffers
from fedmap_sparse.codec.values import peak
from fedmap_sparse.layout import FlatLayout

#: The largest magnitude of an element of a float64 buffer: times 2^53 samples, summed over any
#: number of clients, it stays finite.
_WIDEST = 2.0**900
_LARGEST_MOVE = {32: 1 << 30, 64: 1 << 40}


def largest(dtype: torch.dtype) -> float:
    """The largest magnitude that an element of a buffer may have."""
    return min(torch.finfo(dtype).max, _WIDEST)


def _range(dtype: torch.dtype) -> tuple[int, int]:
    """The integers that an element of a buffer may be."""
    info = torch.iinfo(dtype)
    return max(info.min, -(1 << 63)), min(info.max, (1 << 63) - 1)


class BufferMeans:
    """What the admitted updates make of the buffers.

    Float and bool buffers take memory that does not grow with the number of clients. An integer
    buffer takes 16 bytes for each element that a client changed.

    Args:
        layout: of the model.
        sent: the broadcast's buffers.
        held: the model's buffers, whose dtypes the results must fit.
    """

    def __init__(self, layout: FlatLayout, sent: FlatBuffers, held: Mapping[str, Tensor]) -> None:
        self._kinds = layout.buffer_kinds
        self._sent = sent
        self._dtypes = {kind: [held[n].dtype for n in of.names] for kind, of in self._kinds.items()}
        limits = [largest(dtype) for dtype in self._dtypes["float"]]
        self._least = min(limits, default=0.0)
        if len(set(limits)) < 2:  # the rule: then a vector of them is not needed
            self._limits = torch.tensor(self._least, dtype=torch.float64, device="cpu")
        else:
            self._limits = self._spread("float", limits, torch.float64)
        self._constant = ~(sent["float"].abs() <= self._limits)  # what cannot be averaged
        self._constants = bool(self._constant.any())
        self._floor, self._ceiling = self._moves()
        # -0.0 plus anything is that.
        self._sums = torch.full_like(sent["float"], -0.0, dtype=torch.float64)
        self._flips = torch.zeros_like(sent["bool"], dtype=torch.int32)
        self._changed: list[tuple[Tensor, Tensor]] = []  # places and integers, of each client
        self._clients = 0
        self._samples = 0

    def _spread(self, kind: str, values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        """For each element the value of its buffer."""
        sizes = torch.tensor(self._kinds[kind].sizes, dtype=torch.int64, device="cpu")
        return torch.tensor(values, dtype=dtype, device="cpu").repeat_interleave(sizes)

    def _moves(self) -> tuple[Tensor, Tensor]:
        """The least and the largest that each integer may become; 8 and 16 bits may be any."""
        ranges = [_range(dtype) for dtype in self._dtypes["int"]]
        moves = [
            _LARGEST_MOVE.get(torch.iinfo(dtype).bits, high - low)
            for dtype, (low, high) in zip(self._dtypes["int"], ranges, strict=True)
        ]
        least = [low + move for (low, _), move in zip(ranges, moves, strict=True)]
        most = [high - move for (_, high), move in zip(ranges, moves, strict=True)]
        sent = self._sent["int"]
        move, low, high = (self._spread("int", each, torch.int64) for each in (moves, least, most))
        return sent.clamp(min=low) - move, sent.clamp(max=high) + move

    def check(self, came: FlatBuffers) -> None:
        """Raise ValueError, naming the buffer, unless each element follows its rule."""
        if self._constants or not peak(came["float"]) <= self._least:
            self._check_floats(came["float"])
        integers = came["int"]
        if integers.numel():
            wrong = (integers < self._floor) | (integers > self._ceiling)
            if bool(wrong.any()):
                self._refuse_integer(integers, int(wrong.nonzero()[0]))

    def _check_floats(self, came: Tensor) -> None:
        sent, good = self._sent["float"], came.abs() <= self._limits
        same = (came == sent) | (came.isnan() & sent.isnan())
        wrong = ~torch.where(self._constant, same, good)
        for place in wrong.nonzero()[:1].flatten().tolist():
            at = self._kinds["float"].at(place)
            raise ValueError(
                f"{self._kinds['float'].names[at]}: expected finite elements within "
                f"{largest(self._dtypes['float'][at]):.5g}, and the broadcast's own where that has "
                "others, got something else"
            )

    def _refuse_integer(self, came: Tensor, place: int) -> None:
        at = self._kinds["int"].at(place)
        name, dtype = self._kinds["int"].names[at], self._dtypes["int"][at]
        low, high = _range(dtype)
        if not low <= int(came[place]) <= high:
            raise ValueError(f"{name}: expected integers from {low} to {high}, got one beyond")
        move = _LARGEST_MOVE[torch.iinfo(dtype).bits]
        raise ValueError(
            f"{name}: expected to move by at most 2^{move.bit_length() - 1} from the broadcast's, "
            "got more"
        )

    def add(self, came: FlatBuffers, weight: int) -> None:
        """Add checked buffers of one client."""
        self._clients += 1
        self._samples += weight
        self._sums += came["float"].to(torch.float64) * weight
        self._flips += came["bool"] != self._sent["bool"]
        places = (came["int"] != self._sent["int"]).nonzero().view(-1)
        if places.numel():
            self._changed.append((places, came["int"][places]))

    def result(self, floats: Tensor | None = None) -> FlatBuffers:
        """Every buffer after the round.

        Args:
            floats: the float buffers, if an aggregator has found them already.
        """
        mean = self._sums / self._samples if floats is None else floats
        mean = mean.clamp(-self._limits, self._limits)  # an aggregator's may lie beyond them
        sent = self._sent
        return {
            "float": torch.where(self._constant, sent["float"].to(mean.dtype), mean),
            "int": self._median(),
            "bool": sent["bool"] ^ (2 * self._flips > self._clients),
        }

    def _median(self) -> Tensor:
        sent = self._sent["int"]
        times = torch.zeros_like(sent)
        for places, _ in self._changed:
            times[places] += 1
        moved = (2 * times > self._clients).nonzero().view(-1)  # else a middle value is the sent
        if not moved.numel():
            return sent
        before = sent[moved]
        values = before.repeat(self._clients, 1)
        column = torch.full_like(sent, -1)
        column[moved] = torch.arange(moved.numel(), device="cpu")
        for row, (places, integers) in zip(values, self._changed, strict=False):
            wanted = column[places] >= 0
            row[column[places[wanted]]] = integers[wanted]
        values = values.sort(0).values
        low, high = values[(self._clients - 1) // 2], values[self._clients // 2]
        # Both moves are at most 2^40, or of 8 or 16 bits: no difference overflows.
        nearer = torch.where((low - before).abs() <= (high - before).abs(), low, high)
        return sent.index_copy(0, moved, nearer)
