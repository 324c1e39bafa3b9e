"""Where the time of a round goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter


class Phases(dict[str, float]):
    """Seconds by name of phase, added up: `with phases("step"): ...`.

    Args:
        synchronize: called at both ends of a phase where work is asynchronous
            (`torch.cuda.synchronize`), so that its time is counted where it was asked for.

    A phase costs about 1 us. Phases are not nested: an inner one would be counted twice.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._synchronize = synchronize

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._synchronize is not None:
            self._synchronize()
        start = perf_counter()
        try:
            yield
        finally:
            if self._synchronize is not None:
                self._synchronize()
            self[name] = self.get(name, 0.0) + perf_counter() - start
