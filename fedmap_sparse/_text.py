"""Text from outside on its way to a screen."""

from __future__ import annotations

import sys

_LONGEST = 80


class OutputClosed(OSError):
    """Standard output takes no more: its reader has left, its disk is full, or it was closed."""


def say(*lines: str) -> None:
    """Print lines to standard output, each `printable`, and flush.

    Raises:
        OutputClosed: they cannot be written.
    """
    put("".join(f"{printable(line)}\n" for line in lines))


def put(text: str) -> None:
    """Write text to standard output as it is, and flush.

    Raises:
        OutputClosed: it cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (OSError, ValueError) as error:  # ValueError: the stream object itself is closed
        raise OutputClosed(str(getattr(error, "strerror", None) or error)) from error


def printable(text: str) -> str:
    """`text` with everything that is no visible character or space as an escape.

    Names, keys and paths come from files and messages of others. Raw, they could move the cursor,
    hide what stands before them, or fake a line. New lines are escaped too: one line stays one.

    >>> printable("ok\\x1b[2Kgone")
    'ok\\\\x1b[2Kgone'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """`repr(value)` for an error message: at most 80 characters, whatever the value.

    >>> shown("a" * 100_000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ... aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an integer of more than 4,300 digits
        text = f"an integer of {value.bit_length():,} bits" if isinstance(value, int) else "a value"
    except RecursionError:
        text = "a value nested too deep to show"
    if len(text) > _LONGEST:
        half = (_LONGEST - 5) // 2
        text = f"{text[: half - 1]} ... {text[-half:]}"
    return printable(text)
