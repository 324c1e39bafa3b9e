"""What goes wrong in a round."""

from __future__ import annotations

from fedmap_sparse.federated.aggregation import ClientId


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
