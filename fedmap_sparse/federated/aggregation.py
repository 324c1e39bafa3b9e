"""One round's updates on their way into the mean: each is admitted whole, or refused."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmap_sparse import codec, ops
from fedmap_sparse.codec import Body, Message
from fedmap_sparse.layout import FlatLayout

ClientId = int | str
Bytes = bytes | bytearray | memoryview


class Intake:
    """Sums over the admitted updates; memory does not grow with their number.

    Values and tail are float64 sums over survivors, added tile by tile from the messages' bytes;
    float buffers are float64 sums, integer buffers maxima; Boolean buffers must agree.
    """

    def __init__(self, layout: FlatLayout, body: Body, device: torch.device) -> None:
        self._layout = layout
        self._body = body
        self._broadcast = body.decoded()
        self._values = ops.Accumulator(body.mask.nnz, device=device)
        self._tail = ops.Accumulator(layout.tail_numel, device=device)
        self._buffers: dict[str, Tensor] = {}
        self._losses: list[tuple[float, int]] = []
        self.accepted: list[ClientId] = []
        self.refused: dict[ClientId, str] = {}
        self.num_samples = 0
        self.uplink_bytes = 0

    def add(self, client: ClientId, data: Bytes) -> str | None:
        """Admit one update and add it; None, or the reason why it was refused."""
        self.uplink_bytes += len(data)
        try:
            if client in self.accepted:
                raise ValueError("expected one update, got a second one; the first one counts")
            message = self._admit(data)
        except ValueError as error:  # FormatError is one
            self.refused[client] = str(error)
            return str(error)
        self.refused.pop(client, None)
        weight = message.num_samples
        message.add_to(self._values, weight)
        self._tail.add(message.tail, weight)
        for name, b in message.buffers.items():
            self._buffers[name] = self._joined(name, b, weight)
        self.accepted.append(client)
        self.num_samples += weight
        loss = message.meta.get("loss")
        if isinstance(loss, float):
            self._losses.append((loss, weight))
        return None

    def _admit(self, data: Bytes) -> Message:
        message = codec.decode(
            data, self._layout, mask=self._body.mask, base=self._broadcast, materialize=False
        )
        if message.answers != self._body.digest:
            raise ValueError(
                f"expected an answer to the broadcast {self._body.digest.hex()} of round "
                f"{self._body.header.round}, got one to {message.answers.hex()} of round "
                f"{message.round}"
            )
        if message.num_samples < 1:
            raise ValueError(f"expected at least 1 sample, got {message.num_samples}")
        if not message.all_finite():
            raise ValueError("expected finite values, got NaN or infinity")
        for name, b in message.buffers.items():
            held = self._buffers.get(name)
            if b.dtype == torch.bool and held is not None and not torch.equal(held, b):
                raise ValueError(f"{name}: expected the Boolean buffer of the others, got another")
        return message

    def _joined(self, name: str, b: Tensor, weight: int) -> Tensor:
        held = self._buffers.get(name)
        if b.is_floating_point():
            product = b.to(torch.float64) * weight
            return product if held is None else held + product
        return b.clone() if held is None else torch.maximum(held, b)

    def mean(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of values and tail, in one float32 vector, and the buffers; rounded once.

        Raises:
            ValueError: no update was admitted, or the mean is not finite.
        """
        buffers = {
            name: b / self.num_samples if b.is_floating_point() else b
            for name, b in self._buffers.items()
        }
        for name, b in buffers.items():
            if b.is_floating_point() and not torch.isfinite(b).all():
                raise ValueError(f"{name}: expected a finite mean, got NaN or infinity")
        return torch.cat([self._values.mean(), self._tail.mean()]), buffers

    def loss(self) -> float | None:
        """Mean of the reported losses by samples; None if none was reported."""
        weight = sum(w for _, w in self._losses)
        return sum(loss * w for loss, w in self._losses) / weight if weight else None
