"""Fair timing: contenders interleaved over the same rounds, medians and spread."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, repeat

import torch
from torch import Tensor

#: After a parallel region torch's worker threads spin (4 ms of CPU time here, our pool 0.03):
#: without a pause the contender that comes next shares its cores with them.
PAUSE_S = 0.01
#: What is shorter runs once untimed after the pause, on another input set: to wake sleeping threads
#: takes 50-100 us on a virtual machine, which is neither's work.
WAKE_BELOW_S = 0.005
#: A GPU idles for so many of its clock's cycles (1 ms or more) before what is timed: Python's
#: launches queue up meanwhile, and the device's own time is left.
QUEUE_CYCLES = 2_000_000
#: Read before what is timed on a GPU: several times its L2 cache (60 MB of an H200).
FLUSHED_BYTES = 1 << 28


@dataclass
class Contender:
    """One thing to time, over rotating input sets.

    Attributes:
        runs: one callable an input set.
        resets: run before each timing, untimed (what an in-place peer destroys); may be empty.
        calls: calls per timing, for what is too short for the clock.
        samples: seconds. Of a GPU the device's own; `call_samples` are those of a caller who starts
            with an idle device and waits for the result.
    """

    name: str
    runs: Sequence[Callable[[], object]]
    resets: Sequence[Callable[[], object]] = ()
    calls: int = 1
    samples: list[float] = field(default_factory=list)
    call_samples: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        nothing: Callable[[], object] = lambda: None  # noqa: E731  # typed
        self._next: Iterator[tuple[Callable[[], object], Callable[[], object]]] = cycle(
            zip(self.runs, self.resets or repeat(nothing), strict=False)
        )

    def once(self, clock: Callable[[Callable[[], object], int], float]) -> float:
        run, reset = next(self._next)
        reset()
        return clock(run, self.calls)

    def quantile(self, q: float) -> float:
        """Of the samples in seconds, interpolated."""
        return quantile(self.samples, q)


def quantile(samples: list[float], q: float) -> float:
    return float(torch.quantile(torch.tensor(samples, dtype=torch.float64), q))


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds, and seconds a contender may take in them."""

    rounds: int = 41
    budget_s: float = 1.5
    least: int = 5


QUICK = Plan(rounds=5, budget_s=0.05, least=3)


def cpu_clock(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in repeat(None, calls):
        run()
    return (time.perf_counter() - start) / calls


@functools.cache
def _flushed(device: int) -> Tensor:
    return torch.zeros(FLUSHED_BYTES // 4, device=f"cuda:{device}")


def flush() -> None:
    """Fill the current GPU's L2 with what nobody wants, by reads: after writes it would be full of
    lines that go to memory while the next work is timed, 15 us of an H200's for 60 MB."""
    torch.amax(_flushed(torch.cuda.current_device()), 0)


def cuda_clock(run: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    flush()
    torch.cuda._sleep(QUEUE_CYCLES)
    start.record()
    for _ in repeat(None, calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / calls


def call_clock(run: Callable[[], object], calls: int) -> float:
    """From an idle device to the result."""

    def whole() -> None:
        run()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return cpu_clock(whole, calls)


def interleave(contenders: Sequence[Contender], plan: Plan, device: torch.device) -> None:
    """Fill every contender's samples, round by round; slow ones sit out evenly spread rounds."""
    cuda = device.type == "cuda"
    clock = cuda_clock if cuda else cpu_clock
    turns = []
    for contender in contenders:
        for _ in contender.runs:  # touch every page of every set, compile what compiles
            seconds = contender.once(clock) * contender.calls
        affordable = max(plan.least, int(plan.budget_s / max(seconds, 1e-9)))
        stride = max(1, plan.rounds // min(affordable, plan.rounds))
        turns.append((contender, stride, not cuda and seconds < WAKE_BELOW_S))
    for turn in range(plan.rounds):
        for contender, stride, wake in turns:
            if turn % stride == 0:
                if not cuda:
                    time.sleep(PAUSE_S)
                if wake:
                    contender.once(clock)
                contender.samples.append(contender.once(clock))
                if cuda:
                    contender.call_samples.append(contender.once(call_clock))
