"""How many weights survive each round. Exact counts, never growing, ending at the target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from decimal import ROUND_HALF_EVEN, Decimal
from operator import index
from typing import ClassVar

import numpy as np


def keep_count(eligible: int, sparsity: float | str | Decimal) -> int:
    """`eligible - round_half_even(sparsity * eligible)`, the sparsity taken as a decimal.

    As a decimal, because 0.9 as a binary float would prune one weight too many or too few: 90% is
    90% to the element.

    Args:
        eligible: number of weights that may be pruned.
        sparsity: the share of them to prune, from 0 to 1.

    Returns:
        How many weights survive.

    Raises:
        decimal.InvalidOperation: a sparsity that is not a number.

    >>> keep_count(1_000_005, 0.9)
    100001
    """
    eligible = index(eligible)
    pruned = Decimal(str(sparsity)) * eligible
    return eligible - int(pruned.to_integral_value(rounding=ROUND_HALF_EVEN))


@dataclass(frozen=True)
class Schedule:
    """Base of the schedules. `keep(at_round, eligible)` is how many survive that round."""

    kind: ClassVar[str]

    def keep(self, at_round: int, eligible: int) -> int:
        """Survivors of `eligible` weights from round `at_round` (counted from 0) on."""
        raise TypeError("Schedule: expected Iterative, Cubic, OneShot or Dense")


@dataclass(frozen=True)
class Dense(Schedule):
    """Nothing is pruned: plain FedAvg.

    >>> Dense().keep(7, 1000)
    1000
    """

    kind: ClassVar[str] = "dense"

    def keep(self, at_round: int, eligible: int) -> int:
        return eligible


@dataclass(frozen=True)
class OneShot(Schedule):
    """All of `target` at once, at round `at`.

    Args:
        target: final sparsity, from 0 to 1.
        at: the round that prunes, counted from 0.

    Raises:
        TypeError, ValueError: a target outside 0 to 1, a round below 0.

    >>> schedule = OneShot(target=0.9, at=5)
    >>> [schedule.keep(round, 1000) for round in (4, 5, 6)]
    [1000, 100, 100]
    """

    target: float
    at: int
    kind: ClassVar[str] = "oneshot"

    def __post_init__(self) -> None:
        _take_numpy(self)
        _check_target(self.target)
        _check_round("at", self.at, 0)

    def keep(self, at_round: int, eligible: int) -> int:
        return eligible if at_round < self.at else keep_count(eligible, self.target)


@dataclass(frozen=True)
class Iterative(Schedule):
    """Iterative magnitude pruning: a constant share of the survivors at each pruning round.

    Pruning rounds are `start`, `start + every`, ... up to `end`; after the last of them the
    sparsity is `target`. After k of K prunings the density is `(1 - target) ** (k / K)`, so each
    keeps the same share of what the one before left (Han et al. 2015; Frankle and Carbin 2019).
    A target of 1 has no such share: it keeps everything until the last pruning, then nothing.

    Args:
        target: final sparsity, from 0 to 1.
        start, end: first and last round in which to prune, counted from 0.
        every: rounds from one pruning to the next.

    Raises:
        TypeError, ValueError: a target outside 0 to 1, a round below 0, an end before the start.

    >>> schedule = Iterative(target=0.75, start=1, end=2)
    >>> [schedule.keep(round, 1000) for round in range(4)]
    [1000, 500, 250, 250]
    """

    target: float
    start: int
    end: int
    every: int = 1
    kind: ClassVar[str] = "iterative"

    def __post_init__(self) -> None:
        _take_numpy(self)
        _check_target(self.target)
        _check_span(self.start, self.end)
        _check_round("every", self.every, 1)

    def keep(self, at_round: int, eligible: int) -> int:
        total = (self.end - self.start) // self.every + 1
        done = min(max((at_round - self.start) // self.every + 1, 0), total)
        if done == 0:
            return eligible
        if done == total:
            return keep_count(eligible, self.target)
        density = (1 - Decimal(str(self.target))) ** (Decimal(done) / Decimal(total))
        if self.target == 1:
            return eligible
        return keep_count(eligible, 1 - density)


@dataclass(frozen=True)
class Cubic(Schedule):
    """Zhu and Gupta 2017 (arXiv 1710.01878): fast at first, slow at the end.

    From `start` to `end`, every `every` rounds, the sparsity is
    `target * (1 - (1 - (round - start) / (end - start)) ** 3)`; it is `target` from `end` on. With
    `start == end` all of it happens there.

    Args:
        target: final sparsity, from 0 to 1.
        start, end: rounds between which sparsity grows, counted from 0.
        every: rounds from one pruning to the next.

    Raises:
        TypeError, ValueError: a target outside 0 to 1, a round below 0, an end before the start.

    >>> schedule = Cubic(target=0.8, start=0, end=4)
    >>> [schedule.keep(round, 1000) for round in range(5)]
    [1000, 538, 300, 212, 200]
    """

    target: float
    start: int
    end: int
    every: int = 1
    kind: ClassVar[str] = "cubic"

    def __post_init__(self) -> None:
        _take_numpy(self)
        _check_target(self.target)
        _check_span(self.start, self.end)
        _check_round("every", self.every, 1)

    def keep(self, at_round: int, eligible: int) -> int:
        if at_round < self.start:
            return eligible
        if at_round >= self.end:
            return keep_count(eligible, self.target)
        step = (at_round - self.start) // self.every * self.every
        left = 1 - Decimal(step) / Decimal(self.end - self.start)
        return keep_count(eligible, Decimal(str(self.target)) * (1 - left**3))


#: A round that ended: the clients' mean training loss, if they told it, and its survivors.
Past = tuple[float | None, int]


@dataclass(frozen=True)
class Adaptive(Schedule):
    """Prunes when the clients' training loss says that the model can bear it; not of the paper.

    The first pruning waits until the loss is `settled` of the first round's: before that, weights
    rank by their initial scale. Each further one waits until the loss is within `margin` of the
    lowest before the last pruning. A pruning takes an equal share of what is left for each of the
    rounds up to `end`, so that waiting makes the next ones larger, but never more than `most` of
    the survivors. What has not recovered by `end` is pruned no further: the sparsity then stays
    below the target.

    A server gives it the rounds so far and keeps them in its state. Rounds without a loss prune
    nothing.

    Args:
        target: final sparsity at most, from 0 to 1.
        start, end: first and last round in which to prune, counted from 0.
        settled: share of the first round's loss, above 0 and at most 1.
        margin: at least 0: 0.1 is a tenth above the loss before.
        most: share of the survivors that one pruning takes at most, above 0 and at most 1.

    Raises:
        TypeError, ValueError: an argument out of its range.

    >>> schedule = Adaptive(target=0.75, start=1, end=3)
    >>> schedule.follow([(2.0, 1000)], 1, 1000)  # nothing is known of how it goes down
    1000
    >>> schedule.follow([(2.0, 1000), (0.9, 1000)], 2, 1000)
    500
    >>> schedule.follow([(2.0, 1000), (0.9, 1000), (1.5, 500)], 3, 1000)  # not recovered
    500
    """

    target: float
    start: int
    end: int
    settled: float = 0.6
    margin: float = 0.1
    most: float = 0.5
    kind: ClassVar[str] = "adaptive"

    def __post_init__(self) -> None:
        _take_numpy(self)
        _check_target(self.target)
        _check_span(self.start, self.end)
        for name, low in (("settled", 0.0), ("most", 0.0), ("margin", -1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not (low < value <= 1 if name != "margin" else 0 <= value < math.inf):
                wanted = "at least 0" if name == "margin" else "above 0 and at most 1"
                raise ValueError(f"{name}: expected a number {wanted}, got {value}")

    def keep(self, at_round: int, eligible: int) -> int:
        raise TypeError("Adaptive: expected a server that calls follow(past, round, eligible)")

    def follow(self, past: Sequence[Past], at_round: int, eligible: int) -> int:
        """Survivors of round `at_round`, after the rounds `past`."""
        left = past[-1][1] if past else eligible
        goal = keep_count(eligible, self.target)
        if left <= goal or not self.start <= at_round <= self.end or not self._is_ready(past):
            return left
        share = (Decimal(goal) / left) ** (1 / Decimal(self.end - at_round + 1))
        equal = int((left * share).to_integral_value(rounding=ROUND_HALF_EVEN))
        return max(goal, equal, keep_count(left, self.most))

    def _is_ready(self, past: Sequence[Past]) -> bool:
        losses = [loss for loss, _ in past]
        if not losses or losses[0] is None or losses[-1] is None:
            return False
        pruned = [i for i in range(1, len(past)) if past[i][1] < past[i - 1][1]]
        if not pruned:
            return losses[-1] <= self.settled * losses[0]
        before = [loss for loss in losses[: pruned[-1]] if loss is not None]
        return bool(before) and losses[-1] <= (1 + self.margin) * min(before)


KINDS: dict[str, type[Schedule]] = {c.kind: c for c in (Dense, OneShot, Iterative, Cubic, Adaptive)}


def _take_numpy(schedule: Schedule) -> None:
    """Make NumPy's numbers Python's: float32(0.1) is the decimal that it prints."""
    for field in fields(schedule):
        value = getattr(schedule, field.name)
        if isinstance(value, np.floating):
            object.__setattr__(schedule, field.name, float(str(value)))
        elif isinstance(value, np.generic):
            object.__setattr__(schedule, field.name, value.item())


def _check_target(target: float) -> None:
    if isinstance(target, bool) or not isinstance(target, int | float):
        raise TypeError(f"target: expected a number, got {type(target).__name__}")
    if not 0 <= target <= 1:
        raise ValueError(f"target: expected a sparsity from 0 to 1, got {target}")


def _check_round(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _check_span(start: int, end: int) -> None:
    _check_round("start", start, 0)
    _check_round("end", end, 0)
    if end < start:
        raise ValueError(f"end: expected a round not before start={start}, got {end}")
