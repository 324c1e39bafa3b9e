"""torch's watch for what waits for a device, in effect for a block only."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def watched(mode: str) -> Iterator[None]:
    """`torch.cuda.set_sync_debug_mode(mode)` inside, "default" behind, whatever happens.

    The first call in a process warns that the watch is a prototype, and where warnings are errors
    raises with the mode already set.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode(mode)
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
