"""Every exception of this package, under one base.

Wrong arguments raise `TypeError` or `ValueError`, as in torch. What depends on something from
outside (a message, a file, a client, the machine) raises a class of this module. Each class also
has the built-in base that fits, so `except ValueError` keeps its meaning.
"""

from __future__ import annotations

from typing import Any


class FedMapError(Exception):
    """Base of every exception that this package defines."""


class FormatError(FedMapError, ValueError):
    """A message that docs/format.md tells a reader to refuse.

    Attributes:
        reason: what was wanted and what came.
        offset: the byte of the message where it was found.
    """

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(f"{reason} (at byte {offset})")
        self.reason = reason
        self.offset = offset

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.offset)


class NeedsMask(FormatError):
    """The message is sound, but it builds on a mask that the receiver lacks; nothing was changed.

    Attributes:
        wanted: digest of the mask that the message builds on.
        have: digest of the receiver's mask, to pass to `FedMapServer.broadcast`; None if it has
            none.
    """

    def __init__(self, wanted: bytes, have: bytes | None, offset: int = 0) -> None:
        held = "no mask" if have is None else have.hex()
        super().__init__(
            f"expected the receiver to have the mask {wanted.hex()}, got {held}: ask for "
            "broadcast(have=client.have)",
            offset,
        )
        self.wanted = wanted
        self.have = have

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.wanted, self.have, self.offset)


class AuthenticationError(FormatError):
    """An envelope whose sender cannot be proved: wrong key, client, round, or a replay."""


class PayloadError(FedMapError, ValueError):
    """An entropy-coded payload that is malformed.

    Attributes:
        reason: what was wanted and what came.
        offset: the byte of the payload where it was found.
    """

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"{reason} (at byte {offset})")
        self.reason = reason
        self.offset = offset

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.offset)


class RoundFailed(FedMapError, RuntimeError):
    """Too few usable updates, or a mean that the model cannot hold.

    The server is as it was before the updates came, and takes the same bytes again.

    Attributes:
        reason: why the round failed.
        refused: client id to the reason why its update was refused.
    """

    def __init__(self, reason: str, refused: dict[int | str, str] | None = None) -> None:
        self.reason = reason
        self.refused = dict(refused or {})
        why = "; ".join(f"{client}: {text}" for client, text in self.refused.items())
        super().__init__(f"{reason} (refused: {why})" if why else reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.refused)


class StateError(FedMapError, ValueError):
    """A saved state that is damaged, of another model, or whose parts disagree."""


class CheckpointError(StateError):
    """A checkpoint file that is damaged or of another version."""


class ConfigError(FedMapError, ValueError):
    """A wrong option of an experiment; the message is one line."""


class DataError(FedMapError, ValueError):
    """A data set that is missing, damaged, or of another form than it should have."""


class BackendError(FedMapError, RuntimeError):
    """A backend that cannot run here; the message says why and which ones can."""


class WorkerDied(FedMapError, RuntimeError):
    """A process that trained clients ended by itself, out of memory say; no client has changed."""
