"""How training samples are shared out to clients.

Each partition gives every sample to exactly one client, leaves no client empty, and depends on the
labels, its arguments and the seed alone. Indices of a client are ascending.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Index = NDArray[np.int64]
Part = list[Index]


def iid(labels: ArrayLike, clients: int, *, seed: int = 0) -> Part:
    """Samples at random; sizes differ by one at most."""
    labels, rng = _start(labels, clients, seed)
    return _sorted(np.array_split(rng.permutation(len(labels)), clients))


def dirichlet(labels: ArrayLike, clients: int, *, alpha: float = 0.5, seed: int = 0) -> Part:
    """Of each class, shares drawn from a symmetric Dirichlet distribution (Hsu et al., 2019).

    A small ``alpha`` gives each class to few clients, a large one comes near to IID. A client left
    with nothing takes one sample from the client that then has most (the first of those), from the
    highest of its classes.
    """
    labels, rng = _start(labels, clients, seed)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be positive and finite, not {alpha}")
    parts: Part = [np.empty(0, np.int64)] * clients
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, float(alpha)))
        if not abs(shares.sum() - 1) < 1e-6:  # NumPy's sum of all shares overflowed or vanished
            raise ValueError(f"alpha={alpha} is beyond what shares can be drawn from")
        cuts = np.floor(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        pieces = np.split(members, np.minimum(cuts, len(members)))
        parts = [np.concatenate(pair) for pair in zip(parts, pieces, strict=True)]
    for client in range(clients):
        if len(parts[client]) == 0:
            donor = max(range(clients), key=lambda i: len(parts[i]))
            parts[donor], parts[client] = parts[donor][:-1], parts[donor][-1:]
    return _sorted(parts)


def pathological(labels: ArrayLike, clients: int, *, shards: int = 2, seed: int = 0) -> Part:
    """Samples sorted by class, cut into equal shards, ``shards`` of them to each client.

    After McMahan et al. (2017). A client sees about ``shards`` classes: fewer if two of its shards
    are of one class, more if a shard spans two.
    """
    labels, rng = _start(labels, clients, seed)
    if shards < 1 or clients * shards > len(labels):
        raise ValueError(
            f"shards must be at least 1, and clients × shards at most the {len(labels)} samples, "
            f"not {clients} × {shards}"
        )
    mixed = rng.permutation(len(labels))
    by_class = mixed[np.argsort(labels[mixed], kind="stable")]
    pieces = np.array_split(by_class, clients * shards)
    drawn = rng.permutation(clients * shards).reshape(clients, shards)
    return _sorted([np.concatenate([pieces[i] for i in row]) for row in drawn])


def by_groups(groups: ArrayLike, clients: int) -> Part:
    """A client for each group, in the order of the groups' numbers (or names).

    Args:
        groups: of each sample.
        clients: how many groups are expected.
    """
    names, of = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) != clients:
        raise ValueError(f"the data have {len(names)} groups: clients={len(names)}, not {clients}")
    return [np.flatnonzero(of == group) for group in range(len(names))]


def given(parts: Sequence[ArrayLike], clients: int, samples: int) -> Part:
    """Parts from outside, checked: for each client the indices of its samples."""
    if len(parts) != clients:
        raise ValueError(f"{len(parts)} parts were given: clients={len(parts)}, not {clients}")
    found = []
    for client, part in enumerate(parts):
        array = np.asarray(part)
        if array.ndim != 1 or array.dtype.kind not in "ui" or not len(array):
            raise ValueError(
                f"client {client}: expected integers in one dimension, at least one, got "
                f"{array.dtype} of shape {list(array.shape)}"
            )
        if array.min() < 0 or array.max() >= samples:
            raise ValueError(
                f"client {client}: expected indices from 0 to {samples - 1}, got {array.min()} to "
                f"{array.max()}"
            )
        if len(np.unique(array)) != len(array):
            raise ValueError(f"client {client}: expected each sample once, got one twice")
        found.append(array)
    return _sorted(found)


def noisy(
    labels: NDArray[np.int64], parts: Sequence[Index], share: float, classes: int, seed: int
) -> NDArray[np.int64]:
    """Labels of which ``share`` of each part's, rounded, are another class, any with equal chance.

    Drawn from (seed, 6, client).
    """
    found = labels.copy()
    for client, part in enumerate(parts):
        rng = np.random.default_rng(np.random.SeedSequence((seed, 6, client)))
        chosen = rng.permutation(part)[: round(share * len(part))]
        found[chosen] = (labels[chosen] + rng.integers(1, classes, len(chosen))) % classes
    return found


#: The partition by the groups that come with the data.
GROUPS = "groups"

PARTITIONS: dict[str, Callable[..., Part]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "pathological": pathological,
}


def class_counts(parts: Sequence[Index], labels: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Samples of each class that each client has: int64 [clients, classes]."""
    labels = np.asarray(labels)
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def format_class_counts(counts: NDArray[np.int64]) -> str:
    """The table of ``class_counts`` as text, a line for each client, with totals."""
    rows = [
        ["client", *(f"class {c}" for c in range(counts.shape[1])), "total"],
        *([f"{i}", *map(str, row), f"{row.sum()}"] for i, row in enumerate(counts)),
        ["total", *map(str, counts.sum(axis=0)), f"{counts.sum()}"],
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.rjust, row, widths)) for row in rows)
    return "\n".join(lines)


def _start(labels: ArrayLike, clients: int, seed: int) -> tuple[NDArray[Any], np.random.Generator]:
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise ValueError(
            f"labels must be integers in one dimension, not {array.dtype} {list(array.shape)}"
        )
    if not 1 <= clients <= len(array):
        raise ValueError(f"clients must be from 1 to the {len(array)} samples, not {clients}")
    # A generator of its own: sharing out data does not move any other random state.
    return array, np.random.Generator(np.random.PCG64(seed))


def _sorted(parts: Sequence[NDArray[np.int64]]) -> Part:
    return [np.sort(part).astype(np.int64, copy=False) for part in parts]
