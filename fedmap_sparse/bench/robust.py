"""Robust aggregation: its ops beside what a user would run otherwise, and each rule as a whole.

Clients' packed survivors, `density * n` values each, of 10 and of 50 clients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse import _backends, ops
from fedmap_sparse.bench import floors
from fedmap_sparse.bench.case import Peer, Setting, Trial, case, same
from fedmap_sparse.federated import robust

#: Elements that are compared with the reference, from the first and up to the last.
_CHECKED = 1 << 14
#: Columns that torch sorts at once.
_COLUMNS = 1 << 20


def _vectors(s: Setting, count: int) -> list[Tensor]:
    packed = replace(s, n=s.keep)
    return [packed.values(seed=c) for c in range(count)]


def _ends(vectors: list[Tensor]) -> list[list[Tensor]]:
    return [[v[:_CHECKED] for v in vectors], [v[-_CHECKED:].clone() for v in vectors]]


def _floor(vectors: list[Tensor], out: Tensor) -> floors.Stream:
    """Reads every vector and writes one."""
    return floors.together(*map(floors.read, vectors[:-1]), floors.copy(vectors[-1], out))


def _ranks(s: Setting, clients: int, trim: int, peers: Callable[..., dict[str, Peer]]) -> Trial:
    vectors = _vectors(s, clients)
    out, other = torch.empty_like(vectors[0]), torch.empty_like(vectors[0])

    def check() -> None:
        for part in _ends(vectors):
            expected = ops.trimmed_mean(part, trim, backend="reference")
            same("trimmed_mean", ops.trimmed_mean(part, trim), expected)

    return Trial(
        lambda: ops.trimmed_mean(vectors, trim, out=out),
        check,
        (clients + 1) * out.nbytes,
        _floor(vectors, other),
        peers(vectors, trim, other),
    )


def _median_peers(vectors: list[Tensor], trim: int, out: Tensor) -> dict[str, Peer]:
    """numpy's reorders its input, which is put right before each call."""
    stacked = torch.stack(vectors)
    found = out, torch.empty(out.shape, dtype=torch.int64, device=out.device)
    peers = {"torch.median": Peer(lambda: torch.median(stacked, 0, out=found))}
    if out.device.type == "cpu":
        scratch, into = stacked.numpy().copy(), out.numpy()

        def reset() -> None:
            scratch[:] = stacked.numpy()

        peers["numpy.median"] = Peer(
            lambda: np.median(scratch, 0, out=into, overwrite_input=True), reset
        )
    return peers


def _trimmed_peers(vectors: list[Tensor], trim: int, out: Tensor) -> dict[str, Peer]:
    stacked = torch.stack(vectors)

    def sort() -> Tensor:
        for at in range(0, out.numel(), _COLUMNS):
            ordered = torch.sort(stacked[:, at : at + _COLUMNS], 0).values
            torch.mean(ordered[trim : len(vectors) - trim], 0, out=out[at : at + _COLUMNS])
        return out

    if out.device.type == "cpu" and importlib.util.find_spec("scipy"):
        from scipy.stats import trim_mean

        array, share = stacked.numpy(), (trim + 0.5) / len(vectors)
        return {"scipy trim_mean": Peer(lambda: trim_mean(array, share, axis=0))}
    return {"torch.sort, mean": Peer(sort)}  # on a CPU twice scipy's time


def _distances(s: Setting, clients: int) -> Trial:
    vectors = _vectors(s, clients)
    stacked = torch.stack(vectors)
    out = torch.empty_like(vectors[0])

    def by_products() -> Tensor:
        gram = stacked @ stacked.T
        norms = gram.diagonal()
        return norms[:, None] + norms - 2 * gram

    def check() -> None:
        for part in _ends(vectors[:4]):
            expected = ops.squared_distances(part, backend="reference")
            same("squared_distances", ops.squared_distances(part), expected)

    # Of products, which cancel where vectors lie close together.
    peers = {"torch.mm": Peer(by_products)}
    if clients <= 25:  # where it takes differences; of more vectors it takes products, in minutes
        peers["torch.cdist"] = Peer(lambda: torch.cdist(stacked, stacked).square_())
    return Trial(
        lambda: ops.squared_distances(vectors),
        check,
        clients * out.nbytes,
        floors.together(*map(floors.read, vectors)),
        peers,
    )


def _rule(s: Setting, clients: int, rule: Any) -> Trial:
    """One aggregator of a round, beside the plain mean by samples."""
    *vectors, start = _vectors(s, clients + 1)
    weights = [100 + 7 * c for c in range(clients)]
    out = torch.empty_like(start)

    def check() -> None:
        *part, at = _ends([*vectors, start])[0]
        got = rule(part, weights, at)
        with mock.patch.object(_backends, "_forced", "reference"):
            same(type(rule).__name__, got, rule(part, weights, at))

    return Trial(
        lambda: rule(vectors, weights, start),
        check,
        (clients + 1) * out.nbytes,
        _floor(vectors, out),
        {"weighted_mean": Peer(lambda: ops.weighted_mean(vectors, weights, out=out))},
    )


def _register(
    op: str, build: Callable[[Setting], Trial], group: str, peers_from: tuple[str, ...] = ()
) -> None:
    case(op, densities=(0.1,), dtypes=(torch.float32,), group=group, peers_from=peers_from)(build)


for _count in (10, 50):
    _middle, _tenth = (_count - 1) // 2, _count // 10
    _register(
        f"median_{_count}",
        partial(_ranks, clients=_count, trim=_middle, peers=_median_peers),
        "robust",
    )
    _register(
        f"trimmed_{_count}",
        partial(_ranks, clients=_count, trim=_tenth, peers=_trimmed_peers),
        "robust",
        ("scipy",),
    )
    _register(f"distances_{_count}", partial(_distances, clients=_count), "robust")
    for _name, _made in {
        "norm": robust.NormBound(),
        "median": robust.Median(),
        "trimmed": robust.TrimmedMean(_tenth),
        "geometric": robust.GeometricMedian(),
        "krum": robust.MultiKrum(hostile=_count // 5),
    }.items():
        _register(
            f"rule_{_name}_{_count}", partial(_rule, clients=_count, rule=_made), "robust_rules"
        )
