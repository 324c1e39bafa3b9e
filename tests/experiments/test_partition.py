"""experiments/partition.py: every sample once, no client empty, the same parts for a seed."""

import hashlib
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmap_sparse.experiments import partition

LABELS = np.arange(1_000) % 10

ways = st.one_of(
    st.just(partition.iid),
    st.builds(
        partial,
        st.just(partition.dirichlet),
        alpha=st.floats(1e-300, 1e300, allow_subnormal=False),
    ),
    st.builds(partial, st.just(partition.pathological), shards=st.integers(1, 4)),
)


@given(
    way=ways,
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60).map(np.array),
    clients=st.integers(1, 15),
    seed=st.integers(0, 2**32),
)
def test_each_sample_once_and_no_client_empty(way, labels, clients, seed) -> None:
    shards = getattr(way, "keywords", {}).get("shards", 1)
    if clients * shards > len(labels):
        with pytest.raises(ValueError, match=r"clients must be|clients × shards"):
            way(labels, clients, seed=seed)
        return
    parts = way(labels, clients, seed=seed)
    assert len(parts) == clients
    assert all(len(part) > 0 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("name", partition.PARTITIONS)
def test_seed_decides(name: str) -> None:
    share_out = partition.PARTITIONS[name]
    first, again, other = (share_out(LABELS, 7, seed=seed) for seed in (3, 3, 4))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("iid", "445a158c218e5240"),
        ("dirichlet", "bb63357504c07810"),
        ("pathological", "170a3da9a268b1e4"),
    ],
)
def test_parts_stay_what_they_were(name: str, digest: str) -> None:
    # Published results name a seed: a new version of this package or of numpy must not move them.
    parts = partition.PARTITIONS[name](LABELS, 10, seed=2024)
    content = b"|".join(part.astype("<i8").tobytes() for part in parts)
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_other_random_state_is_left_alone() -> None:
    state = np.random.get_state()[1].copy()  # noqa: NPY002  # the state to be left alone
    torch_state = torch.get_rng_state()
    for share_out in partition.PARTITIONS.values():
        share_out(LABELS, 5)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002  # the global state is the point
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_labels_may_be_a_tensor() -> None:
    for share_out in partition.PARTITIONS.values():
        from_tensor = share_out(torch.from_numpy(LABELS), 5, seed=1)
        assert all(map(np.array_equal, from_tensor, share_out(LABELS, 5, seed=1)))


def test_iid_sizes_differ_by_one_at_most() -> None:
    assert {len(part) for part in partition.iid(LABELS, 7)} == {142, 143}


def test_alpha_decides_how_far_from_iid() -> None:
    def spread(alpha: float) -> float:
        parts = partition.dirichlet(LABELS, 10, alpha=alpha, seed=0)
        counts = partition.class_counts(parts, LABELS, 10)
        return float(counts.std(axis=0).mean())

    assert spread(0.05) > 1.5 * spread(0.5) > 3 * spread(100.0)
    assert spread(1e6) < 1


def test_dirichlet_leaves_no_client_empty_by_the_stated_rule() -> None:
    # One class and a tiny alpha: one client draws all, so each of the others takes one of its
    # samples.
    parts = partition.dirichlet(np.zeros(50, int), 8, alpha=1e-6, seed=0)
    assert sorted(len(part) for part in parts) == [1] * 7 + [43]


def test_pathological_gives_few_classes_to_each() -> None:
    for shards in (1, 2, 3):
        parts = partition.pathological(LABELS, 10, shards=shards, seed=5)
        counts = partition.class_counts(parts, LABELS, 10)
        assert (counts.sum(axis=1) == 100).all() or shards == 3
        if shards < 3:  # shards do not span classes: 10 or 20 of them over 10 classes of 100
            assert ((counts > 0).sum(axis=1) <= shards).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.iid(LABELS, 0), "from 1 to the 1000 samples, not 0"),
        (lambda: partition.iid(LABELS, 1001), "not 1001"),
        (
            lambda: partition.iid(LABELS.reshape(10, 100), 5),
            r"one dimension, not int64 \[10, 100\]",
        ),
        (lambda: partition.iid(LABELS / 2, 5), "labels must be integers"),
        (lambda: partition.dirichlet(LABELS, 5, alpha=0), "alpha must be positive and finite"),
        (lambda: partition.dirichlet(LABELS, 5, alpha=float("nan")), "not nan"),
        (lambda: partition.pathological(LABELS, 5, shards=0), "shards must be at least 1"),
        (lambda: partition.pathological(LABELS, 501, shards=2), "not 501 × 2"),
    ],
)
def test_impossible_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_class_counts_and_their_table() -> None:
    labels = np.array([0, 2, 2, 1, 0])
    parts = [np.array([0, 1, 2]), np.array([3, 4])]
    counts = partition.class_counts(parts, torch.from_numpy(labels), 4)
    assert counts.tolist() == [[1, 0, 2, 0], [1, 1, 0, 0]]
    assert partition.format_class_counts(counts).splitlines() == [
        "client  class 0  class 1  class 2  class 3  total",
        "     0        1        0        2        0      3",
        "     1        1        1        0        0      2",
        " total        2        1        2        0      5",
    ]


def test_groups_are_clients() -> None:
    groups = np.array([7, 2, 7, 9, 2, 2])
    parts = partition.by_groups(groups, 3)
    assert [part.tolist() for part in parts] == [[1, 4, 5], [0, 2], [3]]
    with pytest.raises(ValueError, match="the data have 3 groups: clients=3, not 10"):
        partition.by_groups(groups, 10)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0]], "1 parts were given: clients=1, not 2"),
        ([[0], []], "client 1: expected integers in one dimension, at least one"),
        ([[0], [0.5]], "client 1: expected integers"),
        ([[0], [3]], "client 1: expected indices from 0 to 2, got 3 to 3"),
        ([[0], [-1]], "client 1: expected indices"),
        ([[0, 0], [1]], "client 0: expected each sample once, got one twice"),
    ],
)
def test_parts_from_outside_are_checked(parts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition.given(parts, 2, 3)


def test_parts_from_outside_are_sorted() -> None:
    assert [p.tolist() for p in partition.given([[2, 0], [1]], 2, 3)] == [[0, 2], [1]]


def test_label_noise_changes_its_share_of_each_part_to_another_class() -> None:
    labels = np.arange(1000) % 10
    parts = [np.arange(0, 400), np.arange(400, 1000)]
    found = partition.noisy(labels, parts, 0.25, 10, seed=3)
    wrong = found != labels
    assert [int(wrong[part].sum()) for part in parts] == [100, 150]
    assert set(((found - labels) % 10)[wrong].tolist()) == set(range(1, 10))
    assert (found == partition.noisy(labels, parts, 0.25, 10, seed=3)).all()
    assert (found != partition.noisy(labels, parts, 0.25, 10, seed=4)).any()
    assert (labels == np.arange(1000) % 10).all()
