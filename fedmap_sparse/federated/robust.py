"""Aggregators that a few hostile clients cannot own, in packed space.

Each is exact in a stated order of float64 or float32 operations, on any device. Give one to
`FedMapServer(aggregator=...)`. All but `ClippedMean` take every client's vector at once: the round
holds 4 bytes per element and client, and a rule adds what its description says. Rules by
coordinates and by distances ignore the claims of samples: a claim is one more thing that a hostile
client can choose.

They are made of `ops.trimmed_mean`, `ops.squared_distances`, `ops.weighted_mean` and
`ops.clip_difference_`.
Of 1,000,000 elements, on one thread of an EPYC (Zen 4, AVX-512), in CPU time: the median of 10
clients is 102 times faster than `torch.median(dim=0)`, 128 times faster than `numpy.median`, and
takes as long as reading the vectors and writing the result; of 50 clients it is 57 and 63 times
faster, and takes 1.8 times as long as that. `fedmap-sparse bench --ops robust,robust_rules`
measures them, and each rule as a whole.

What none of them does: tell a hostile client from an honest one whose data differ. See SECURITY.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmap_sparse import ops


def _check(name: str, good: bool, wanted: str, got: object) -> None:
    if not good:
        raise ValueError(f"{name}: expected {wanted}, got {got}")


def _clients(name: str, came: int, least: int) -> None:
    if came < least:
        raise ValueError(f"{name}: expected at least {least} clients, got {came}")


def _norms(vectors: list[Tensor], start: Tensor) -> list[float]:
    """L2 norms of the differences from `start`."""
    found: list[float] = ops.squared_distances(vectors, [start]).sqrt().flatten().tolist()
    return found


def _mean(vectors: list[Tensor], weights: list[float]) -> Tensor:
    """The mean of those that have a weight above 0."""
    used = [(v, w) for v, w in zip(vectors, weights, strict=True) if w > 0]
    return ops.weighted_mean([v for v, _ in used], [w for _, w in used])


@dataclass(frozen=True)
class ClippedMean:
    """The mean by samples of differences that are cut to a norm (Sun et al., arXiv 1911.07963).

    No vector counts beside another, so a server adds each as it comes and keeps none. One pass over
    a vector, and a second one where it is cut.

    Args:
        norm: of a difference from the broadcast, at most.
    """

    norm: float
    least: int = 1

    def __post_init__(self) -> None:
        _check("norm", 0 < self.norm < math.inf, "a finite number above 0", self.norm)

    def clip_(self, vector: Tensor, start: Tensor) -> None:
        """Cut one client's vector, in place."""
        ops.clip_difference_(vector, start, self.norm)

    def __call__(self, vectors: list[Tensor], weights: list[int], start: Tensor) -> Tensor:
        _clients("ClippedMean", len(vectors), self.least)
        clipped = [v.clone() for v in vectors]
        for vector in clipped:
            self.clip_(vector, start)
        return ops.weighted_mean(clipped, [float(w) for w in weights])


@dataclass(frozen=True)
class NormBound:
    """The mean by samples of differences that are cut to a multiple of the round's median norm.

    Two passes over all vectors; beside the result, a float64 per client.

    Args:
        times: a difference from the broadcast counts with at most this multiple of the lower
            median norm of the round's differences.
    """

    times: float = 2.0
    least: int = 1

    def __post_init__(self) -> None:
        _check("times", 0 < self.times < math.inf, "a finite number above 0", self.times)

    def __call__(self, vectors: list[Tensor], weights: list[int], start: Tensor) -> Tensor:
        _clients("NormBound", len(vectors), self.least)
        norms = _norms(vectors, start)
        bound = self.times * sorted(norms)[(len(norms) - 1) // 2]
        cuts = [1.0 if n <= bound else bound / n for n in norms]
        shares = [w * c for w, c in zip(weights, cuts, strict=True)]
        # What is cut off of the differences is weight that the broadcast has.
        rest = math.fsum(w * (1 - c) for w, c in zip(weights, cuts, strict=True))
        return _mean([start, *vectors], [rest, *shares])


@dataclass(frozen=True)
class Median:
    """The coordinate-wise median (Yin et al., arXiv 1803.01498); of an even number the mean of the
    two middle values, rounded once. Samples do not count.

    It holds while fewer than half of the clients are hostile. One pass over all vectors, and no
    memory beside the result.
    """

    least: int = 1

    def __call__(self, vectors: list[Tensor], weights: list[int], start: Tensor) -> Tensor:
        _clients("Median", len(vectors), self.least)
        return ops.trimmed_mean(vectors, (len(vectors) - 1) // 2)


@dataclass(frozen=True)
class TrimmedMean:
    """The coordinate-wise mean without the `trim` smallest and largest (Yin et al., 1803.01498).

    Samples do not count. It holds while at most `trim` clients are hostile. One pass over all
    vectors, and no memory beside the result.

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
        return ops.trimmed_mean(vectors, cut)


@dataclass(frozen=True)
class GeometricMedian:
    """The point of least summed distance: smoothed Weiszfeld (Pillutla et al., arXiv 1912.13445).

    Samples do not count. It holds while fewer than half of the clients are hostile. The mean of
    the last step is what comes out; it starts at the broadcast. Two passes over all vectors per
    step; beside the result, one more vector.

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
            centre = _mean(vectors, [1 / max(d, least) for d in distances])
        return centre


@dataclass(frozen=True)
class MultiKrum:
    """The mean of the clients that lie nearest to their neighbours (Blanchard et al. 2017).

    A client's score is the sum of its squared distances to its `clients - hostile - 2` nearest
    ones; the `keep` of least score are averaged with equal weight, ties by position. Samples do
    not count. One pass over all vectors for the distances, which takes O(clients**2) per element,
    and one over those that are kept; beside the result, a float64 per pair.

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
        distances = ops.squared_distances(vectors).tolist()
        near = count - self.hostile - 2
        scores = [
            math.fsum(sorted(d for j, d in enumerate(row) if j != i)[:near])
            for i, row in enumerate(distances)
        ]
        keep = self.keep or count - self.hostile
        chosen = sorted(sorted(range(count), key=lambda i: (scores[i], i))[:keep])
        return ops.weighted_mean([vectors[i] for i in chosen], [1.0] * keep)


#: By name, for options on a command line.
AGGREGATORS: dict[str, type] = {
    "norm": NormBound,
    "median": Median,
    "trimmed": TrimmedMean,
    "geometric": GeometricMedian,
    "krum": MultiKrum,
}
