"""The most memory that a piece of work held, as the kernel counts it (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class Used:
    """Bytes beyond what was held at the start, once the work has ended."""

    bytes: int = 0


def known() -> bool:
    """Whether this system counts resident memory, and lets its peak be reset."""
    return _CLEAR.exists() and "VmHWM" in _STATUS.read_text()


@contextlib.contextmanager
def peak() -> Iterator[Used]:
    """Measure the body: `with peak() as used: ...`, then `used.bytes`.

    Freed memory is given back to the system before, so that it counts when it is taken again.
    0 where the system does not say.
    """
    used = Used()
    if not known():
        yield used
        return
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5\n")  # proc(5): resets the peak
    before = _field("VmRSS")
    yield used
    used.bytes = max(0, _field("VmHWM") - before)


def _field(name: str) -> int:
    line = next(row for row in _STATUS.read_text().splitlines() if row.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
