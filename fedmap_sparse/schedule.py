"""How many weights survive each round. Exact counts, never growing, ending at the target."""

from __future__ import annotations

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


KINDS: dict[str, type[Schedule]] = {c.kind: c for c in (Dense, OneShot, Iterative, Cubic)}


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
