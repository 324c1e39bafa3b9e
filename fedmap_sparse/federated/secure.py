"""Fixed-point differences for secure aggregation: one int32 a survivor, sums modulo 2^32.

All clients of a round have one mask, so what they mask blindly has one length and one meaning:
`density * n` integers instead of n. `FixedPoint` is agreed in the broadcast's record; any scheme of
modular sums (SecAgg, SecAgg+) can carry its vectors::

    fixed = FixedPoint(clip=0.5, total=10)
    server = FedMapServer(..., record=fixed.record())
    # a client, after training
    vector, _ = FixedPoint.of(received.meta).encode(client.update_array(), received)
    # the server, which has seen the sum alone
    server.apply_mean(fixed.decode(sums, received, weights=10), num_samples, clients)

`received` is the broadcast as `client.receive` gives it; a server has it by
`codec.decode(server.broadcast(), server.layout)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.codec import Message, meta
from fedmap_sparse.errors import FormatError
from fedmap_sparse.federated import arrays

_CLIP, _TOTAL = "fixed_clip", "fixed_total"


@dataclass(frozen=True)
class FixedPoint:
    """How differences from the broadcast become integers.

    Args:
        clip: largest magnitude of a difference's element that is kept.
        total: the most that the weights of a round sum up to: the number of clients where all
            count the same.

    Raises:
        ValueError: a clip that is no finite number above 0, a total outside 1 to 2^20.

    >>> FixedPoint(clip=0.5, total=10).scale
    268435456.0
    """

    clip: float
    total: int

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip: expected a finite number above 0, got {self.clip}")
        if not 1 <= self.total <= 1 << 20:
            raise ValueError(f"total: expected 1 to 2^20, got {self.total}")

    @property
    def scale(self) -> float:
        """Steps per unit: the largest power of two with which no sum of a round wraps around."""
        scale = 2.0 ** math.floor(math.log2((2**31 - 2) / (self.clip * self.total)))
        return scale if self.clip * self.total * scale < 2**31 - 1 else scale / 2

    def record(self) -> dict[str, meta.Value]:
        """For `FedMapServer(record=...)`."""
        return {_CLIP: float(self.clip), _TOTAL: self.total}

    @staticmethod
    def of(record: Mapping[str, meta.Value]) -> FixedPoint:
        """What a broadcast's record says.

        Raises:
            FormatError: nothing, or nothing that can be.
        """
        clip, total = record.get(_CLIP), record.get(_TOTAL)
        if not isinstance(clip, float) or not isinstance(total, int) or isinstance(total, bool):
            raise FormatError(f"record: expected {_CLIP} and {_TOTAL}, got {clip!r} and {total!r}")
        try:
            return FixedPoint(clip, total)
        except ValueError as error:
            raise FormatError(f"record: {error}") from error

    def encode(self, array: Tensor, received: Message, weight: int = 1) -> tuple[Tensor, int]:
        """A client's vector to be masked and summed.

        Args:
            array: `client.update_array()`.
            received: the broadcast that it answers.
            weight: of this client.

        Returns:
            int32[len(array)], and how many elements were cut to the clip.

        Raises:
            ValueError: another length, values not finite, a weight outside 1 to `total`.
        """
        start = self._start(array, received)
        if not 1 <= weight <= self.total:
            raise ValueError(f"weight: expected 1 to total={self.total}, got {weight}")
        return ops.to_fixed(array - start, clip=self.clip, scale=self.scale, weight=weight)

    def decode(self, sums: Tensor, received: Message, weights: int) -> Tensor:
        """The mean for `FedMapServer.apply_mean`, of a sum of vectors.

        Each client's rounding is off by half a step (1 / scale) at most, so the mean is as well.

        Args:
            sums: int32, the sum of `encode`'s vectors modulo 2^32.
            received: the broadcast.
            weights: of the clients that are in the sum, together.

        Raises:
            ValueError: another length, weights outside 1 to `total`.
        """
        start = self._start(sums, received)
        if not 1 <= weights <= self.total:
            raise ValueError(f"weights: expected 1 to total={self.total}, got {weights}")
        return start + ops.from_fixed(sums, self.scale * weights)

    @staticmethod
    def _start(vector: Tensor, received: Message) -> Tensor:
        start = arrays.join(received.packed, received.tail, received.flat_buffers)
        if vector.shape != start.shape:
            wanted, got = tuple(start.shape), tuple(vector.shape)
            raise ValueError(f"vector: expected shape {wanted} of this broadcast, got {got}")
        return start
