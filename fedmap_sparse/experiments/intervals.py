"""Means of a few runs, with intervals that say how few they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and where the true one lies, by Student's t distribution.

    Attributes:
        n: how many values there are.
        mean: theirs.
        half: half the width of the interval with 95% confidence; None where n is 1, as one value
            tells nothing about how much they differ.
    """

    n: int
    mean: float
    half: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """The interval of at least one value, taken as independent and normally distributed.

        >>> Interval.of([1.0, 2.0, 3.0])
        Interval(n=3, mean=2.0, half=2.484...)
        """
        n = len(values)
        mean = math.fsum(values) / n
        if n == 1:
            return Interval(1, mean, None)
        variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
        return Interval(n, mean, t_quantile(n - 1) * math.sqrt(variance / n))

    def shown(self, unit: str) -> str:
        """ "+0.10 points [-0.35, +0.55], n=3": the mean, the interval, and of how many."""
        if self.half is None:
            return f"{self.mean:+.2f} {unit}, n=1: no interval"
        low, high = self.mean - self.half, self.mean + self.half
        return f"{self.mean:+.2f} {unit} [{low:+.2f}, {high:+.2f}], n={self.n}"

    def to_dict(self) -> dict[str, Any]:
        """n, mean, low and high, for JSON."""
        half = self.half
        low, high = (None, None) if half is None else (self.mean - half, self.mean + half)
        return {"n": self.n, "mean": self.mean, "low": low, "high": high}


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t that a variable of so many degrees of freedom exceeds in magnitude with 1 - confidence.

    By bisection over the closed form of the distribution for whole degrees of freedom (Abramowitz
    and Stegun, 26.7.3 and 26.7.4).

    >>> round(t_quantile(2), 3)
    4.303
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if _within(angle, freedom) < confidence:
            low = angle
        else:
            high = angle
    return math.tan(high) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """The probability of a magnitude below t = sqrt(freedom) * tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(freedom // 2):
        total += term
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
