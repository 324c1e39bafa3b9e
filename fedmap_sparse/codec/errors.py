"""What a reader raises."""

from __future__ import annotations


class FormatError(ValueError):
    """A message that docs/format.md tells a reader to refuse.

    Attributes:
        reason: what was wanted and what came.
        offset: the byte of the message where it was found.
    """

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(f"{reason} (at byte {offset})")
        self.reason = reason
        self.offset = offset

    def __reduce__(self) -> tuple[type[FormatError], tuple[str, int]]:
        return type(self), (self.reason, self.offset)


class MaskNeeded(FormatError):
    """The message is sound, but the mask it refers to is not the one at hand.

    Attributes:
        wanted: digest of the mask that the message needs: its own, or the parent of its delta.
    """

    def __init__(self, reason: str, offset: int, wanted: bytes) -> None:
        super().__init__(reason, offset)
        self.wanted = wanted

    def __reduce__(self) -> tuple[type[FormatError], tuple[str, int, bytes]]:  # type: ignore[override]  # a field more
        return type(self), (self.reason, self.offset, self.wanted)
