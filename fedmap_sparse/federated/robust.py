"""Aggregators that a few hostile clients cannot own, in packed space.

Each is exact in a stated order of float64 or float32 operations, on any device. Give one to
`FedMapServer(aggregator=...)`. All of them take every client's vector at once: 4 bytes per
element and client, and a tile of float64 beside. Rules by coordinates and by distances ignore the
claims of samples: a claim is one more thing that a hostile client can choose.

They are plain torch, tile by tile: of 10 clients the median takes a ninth of the time of
`torch.median` on one CPU thread, of 50 a quarter. There are no kernels of their own yet.

What none of them does: tell a hostile client from an honest one whose data differ. See SECURITY.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

#: Elements of a tile: with 50 clients it takes 6.5 MB in float32.
TILE = 1 << 15


def _check(name: str, good: bool, wanted: str, got: object) -> None:
    if not good:
        raise ValueError(f"{name}: expected {wanted}, got {got}")


def _clients(name: str, came: int, least: int) -> None:
    if came < least:
        raise ValueError(f"{name}: expected at least {least} clients, got {came}")


def _by_tiles(
    vectors: list[Tensor], first: int, stop: int, rule: Callable[[list[Tensor]], Tensor]
) -> Tensor:
    """`rule` of the values of ranks `first` to `stop` of each element, in increasing order."""
    out = torch.empty_like(vectors[0])
    network = _network(len(vectors), first, stop)
    for start in range(0, out.numel(), TILE):
        rows = [v[start : start + TILE] for v in vectors]
        for i, j in network:
            rows[i], rows[j] = torch.minimum(rows[i], rows[j]), torch.maximum(rows[i], rows[j])
        out[start : start + TILE] = rule(rows[first:stop])
    return out


@lru_cache(maxsize=64)
def _network(count: int, first: int, stop: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort (1968) of `count` rows, less what ranks outside of `first` to
    `stop` would need. Whole rows are compared at once: 10 rows of a tile take 29 steps in cache,
    where a sort along the short axis takes each element by itself.
    """
    steps: list[tuple[int, int]] = []
    p = 1
    while p < count:
        k = p
        while k >= 1:
            for j in range(k % p, count - k, 2 * k):
                pairs = [(i, i + k) for i in range(j, min(j + k, count - k))]
                steps += [(a, b) for a, b in pairs if a // (2 * p) == b // (2 * p)]
            k //= 2
        p *= 2
    wanted, kept = set(range(first, stop)), []
    for i, j in reversed(steps):
        if i in wanted or j in wanted:
            wanted |= {i, j}
            kept.append((i, j))
    return tuple(reversed(kept))


def _norms(vectors: list[Tensor], start: Tensor) -> list[float]:
    """L2 norms of the differences from `start`, summed in float64."""
    return [
        math.sqrt(sum(_squares(v[i : i + TILE], start[i : i + TILE]) for i in _starts(v)))
        for v in vectors
    ]


def _starts(v: Tensor) -> range:
    return range(0, v.numel(), TILE)


def _squares(a: Tensor, b: Tensor) -> float:
    return float(a.double().sub_(b).square_().sum())


def _mean(vectors: list[Tensor], factors: list[float], start: Tensor) -> Tensor:
    """`start + sum(factor * (v - start))` in float64, rounded once."""
    out = torch.empty_like(start)
    for i in _starts(start):
        here = start[i : i + TILE].double()
        total = torch.zeros_like(here)
        for v, factor in zip(vectors, factors, strict=True):
            total += v[i : i + TILE].double().sub_(here).mul_(factor)
        out[i : i + TILE] = (here + total).float()
    return out


@dataclass(frozen=True)
class NormBound:
    """The mean by samples of differences that are cut to a norm (Sun et al., arXiv 1911.07963).

    Args:
        times: a difference from the broadcast counts with at most this multiple of the lower
            median norm of the round's differences.
        norm: instead, a fixed norm.
    """

    times: float = 2.0
    norm: float | None = None
    least: int = 1

    def __post_init__(self) -> None:
        _check("times", 0 < self.times < math.inf, "a finite number above 0", self.times)
        if self.norm is not None:
            _check("norm", 0 < self.norm < math.inf, "a finite number above 0", self.norm)

    def __call__(self, vectors: list[Tensor], weights: list[int], start: Tensor) -> Tensor:
        _clients("NormBound", len(vectors), self.least)
        norms = _norms(vectors, start)
        bound = self.norm
        if bound is None:
            bound = self.times * sorted(norms)[(len(norms) - 1) // 2]
        total = sum(weights)
        shares = [
            (w / total) * (1.0 if n <= bound else bound / n)
            for w, n in zip(weights, norms, strict=True)
        ]
        return _mean(vectors, shares, start)


@dataclass(frozen=True)
class Median:
    """The coordinate-wise median (Yin et al., arXiv 1803.01498); of an even number the mean of the
    two middle values, rounded once. Samples do not count.

    It holds while fewer than half of the clients are hostile.
    """

    least: int = 1

    def __call__(self, vectors: list[Tensor], weights: list[int], start: Tensor) -> Tensor:
        _clients("Median", len(vectors), self.least)
        low, high = (len(vectors) - 1) // 2, len(vectors) // 2

        def rule(middle: list[Tensor]) -> Tensor:
            return ((middle[0].double() + middle[-1].double()) / 2).float()

        return _by_tiles(vectors, low, high + 1, rule)


@dataclass(frozen=True)
class TrimmedMean:
    """The coordinate-wise mean without the `trim` smallest and largest (Yin et al., 1803.01498).

    Samples do not count. It holds while at most `trim` clients are hostile.

    Args:
        trim: how many to leave out at each end; a float below 0.5 is a share of the clients,
            rounded down.
    """

    trim: int | float = 1
    least: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.trim, float):
            _check("trim", 0 <= self.trim < 0.5, "a share of 0 <= trim < 0.5", self.trim)
            object.__setattr__(self, "least", 1)
        else:
            _check("trim", self.trim >= 0, "at least 0", self.trim)
            object.__setattr__(self, "least", 2 * self.trim + 1)

    def __call__(self, vectors: list[Tensor], weights: list[int], start: Tensor) -> Tensor:
        _clients("TrimmedMean", len(vectors), self.least)
        count = len(vectors)
        cut = int(self.trim * count) if isinstance(self.trim, float) else self.trim

        def rule(kept: list[Tensor]) -> Tensor:
            total = torch.zeros_like(kept[0], dtype=torch.float64)
            for row in kept:  # in this order, whatever a device's own reduction does
                total += row
            return (total / len(kept)).float()

        return _by_tiles(vectors, cut, count - cut, rule)


@dataclass(frozen=True)
class GeometricMedian:
    """The point of least summed distance: smoothed Weiszfeld (Pillutla et al., arXiv 1912.13445).

    Samples do not count. It holds while fewer than half of the clients are hostile. The mean of
    the last step is what comes out; it starts at the broadcast.

    Args:
        steps: passes over all vectors.
        smoothing: distances below this share of the median one count as that: no division by 0.
    """

    steps: int = 8
    smoothing: float = 1e-6
    least: int = 1

    def __post_init__(self) -> None:
        _check("steps", self.steps >= 1, "at least 1", self.steps)
        _check("smoothing", 0 < self.smoothing < 1, "0 < smoothing < 1", self.smoothing)

    def __call__(self, vectors: list[Tensor], weights: list[int], start: Tensor) -> Tensor:
        _clients("GeometricMedian", len(vectors), self.least)
        centre = start
        for _ in range(self.steps):
            distances = _norms(vectors, centre)
            least = self.smoothing * sorted(distances)[(len(distances) - 1) // 2]
            least = least or torch.finfo(torch.float32).tiny
            shares = [1 / max(d, least) for d in distances]
            total = math.fsum(shares)
            centre = _mean(vectors, [s / total for s in shares], centre)
        return centre


@dataclass(frozen=True)
class MultiKrum:
    """The mean of the clients that lie nearest to their neighbours (Blanchard et al. 2017).

    A client's score is the sum of its squared distances to its `clients - hostile - 2` nearest
    ones; the `keep` of least score are averaged with equal weight, ties by position. Samples do
    not count.

    Args:
        hostile: how many hostile clients it must bear; it needs `2 hostile + 3` clients.
        keep: how many are averaged; None: `clients - hostile`.
    """

    hostile: int = 1
    keep: int | None = None
    least: int = 5

    def __post_init__(self) -> None:
        _check("hostile", self.hostile >= 0, "at least 0", self.hostile)
        if self.keep is not None:
            _check("keep", self.keep >= 1, "at least 1", self.keep)
        object.__setattr__(self, "least", max(2 * self.hostile + 3, self.keep or 1))

    def __call__(self, vectors: list[Tensor], weights: list[int], start: Tensor) -> Tensor:
        _clients("MultiKrum", len(vectors), self.least)
        count = len(vectors)
        distances = [[0.0] * count for _ in range(count)]
        for i in range(count):
            for j in range(i):
                found = math.fsum(
                    _squares(vectors[i][s : s + TILE], vectors[j][s : s + TILE])
                    for s in _starts(start)
                )
                distances[i][j] = distances[j][i] = found
        near = count - self.hostile - 2
        scores = [
            math.fsum(sorted(d for j, d in enumerate(row) if j != i)[:near])
            for i, row in enumerate(distances)
        ]
        keep = self.keep or count - self.hostile
        chosen = sorted(sorted(range(count), key=lambda i: (scores[i], i))[:keep])
        return _mean([vectors[i] for i in chosen], [1 / keep] * keep, start)


#: By name, for options on a command line.
AGGREGATORS: dict[str, type] = {
    "norm": NormBound,
    "median": Median,
    "trimmed": TrimmedMean,
    "geometric": GeometricMedian,
    "krum": MultiKrum,
}
