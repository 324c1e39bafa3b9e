"""A lock that may be copied with what it guards."""

from __future__ import annotations

import threading


class Lock:
    """A re-entrant lock that a copied or unpickled owner makes anew."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()
