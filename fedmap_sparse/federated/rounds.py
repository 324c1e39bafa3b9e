"""What a round has beside the model while it is under way, and what it leaves behind."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from fedmap_sparse.codec import Message
from fedmap_sparse.federated.aggregation import Aggregation
from fedmap_sparse.federated.global_model import GlobalModel
from fedmap_sparse.federated.landing import Landing

#: How many encoded messages of a round a server keeps for further receivers.
CACHED = 4


@dataclass
class OpenRound:
    """A round under way.

    Attributes:
        message: the broadcast, but for its mask section.
        before: the model before `begin_round`.
        landing: where the mean of the updates goes.
        aggregation: the stream under way, if any.
    """

    message: Message
    before: GlobalModel
    landing: Landing
    aggregation: Aggregation | None = None
    _sent: OrderedDict[bytes | None, bytes] = field(default_factory=OrderedDict)

    def end(self) -> None:
        """Let a thread that still checks an update of the stream hear that it came too late."""
        if self.aggregation is not None:
            self.aggregation.close()

    def broadcast(self, have: bytes | None, model: GlobalModel) -> bytes:
        """The broadcast's bytes for a receiver; the last few are kept."""
        known = have if isinstance(have, bytes) and have in model.digests else None
        if known not in self._sent:
            if len(self._sent) == CACHED:
                self._sent.popitem(last=False)
            self._sent[known] = encoded(self.message, known, model)
        self._sent.move_to_end(known)
        return self._sent[known]


def encoded(message: Message, have: bytes | None, model: GlobalModel) -> bytes:
    """`message` for a receiver that has the mask of digest `have`; None, or unknown: no mask."""
    if not isinstance(have, bytes) or have not in model.digests:
        return message.encode("full")
    if have == model.mask.digest():
        return message.encode("none")
    return message.encode("delta", model.mask_at(model.digests.index(have)))
