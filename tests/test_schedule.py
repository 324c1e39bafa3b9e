from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmap_sparse.schedule import (
    Adaptive,
    Cubic,
    Dense,
    Iterative,
    OneShot,
    keep_count,
)

TARGETS = st.integers(0, 1000).map(lambda t: t / 1000)


@given(TARGETS, st.integers(0, 10**9))
def test_keep_count_is_exact_in_decimals(sparsity, eligible):
    pruned = Fraction(str(sparsity)) * eligible
    assert keep_count(eligible, sparsity) == eligible - round(pruned)  # half to even, too


def test_keep_count_by_hand():
    assert keep_count(10, 0.9) == 1
    assert keep_count(1_000_005, 0.9) == 100_001  # 900004.5 pruned: half to even
    assert keep_count(5, 0.5) == 3  # 2.5 pruned: 2
    assert keep_count(7, 0.5) == 3  # 3.5 pruned: 4
    assert keep_count(0, 0.9) == 0


SCHEDULES = st.one_of(
    st.just(Dense()),
    st.builds(OneShot, TARGETS, st.integers(0, 30)),
    st.builds(
        lambda t, s, d, e: Iterative(t, s, s + d, e),
        TARGETS,
        st.integers(0, 20),
        st.integers(0, 20),
        st.integers(1, 7),
    ),
    st.builds(
        lambda t, s, d, e: Cubic(t, s, s + d, e),
        TARGETS,
        st.integers(0, 20),
        st.integers(0, 20),
        st.integers(1, 7),
    ),
)


@given(SCHEDULES, st.integers(0, 10**6))
def test_never_grows_starts_dense_ends_at_the_target(schedule, eligible):
    counts = [schedule.keep(r, eligible) for r in range(45)]
    assert counts == sorted(counts, reverse=True)
    assert all(0 <= c <= eligible for c in counts)
    first = getattr(schedule, "start", getattr(schedule, "at", 100))
    assert all(c == eligible for c in counts[:first])
    target = getattr(schedule, "target", 0)
    assert counts[-1] == keep_count(eligible, target)


@given(SCHEDULES)
def test_printed(schedule):
    assert type(schedule).__name__ in repr(schedule)
    assert eval(repr(schedule)) == schedule


def test_iterative_keeps_a_constant_share():
    schedule = Iterative(target=0.9, start=2, end=11, every=1)
    counts = [10**9, *(schedule.keep(r, 10**9) for r in range(2, 12))]
    shares = [b / a for a, b in pairwise(counts)]
    assert all(abs(s - 0.1**0.1) < 1e-8 for s in shares)
    assert counts[-1] == 10**8


def test_iterative_holds_between_its_rounds():
    schedule = Iterative(target=0.75, start=1, end=6, every=3)  # prunes at 1 and 4: half each
    assert [schedule.keep(r, 1000) for r in range(8)] == [1000, 500, 500, 500, 250, 250, 250, 250]


def test_cubic_by_hand():
    schedule = Cubic(target=0.8, start=0, end=4)
    # sparsity 0.8 (1 - (1 - t/4)^3): 0, .4625, .7, .7875, .8
    assert [schedule.keep(r, 10_000) for r in range(6)] == [10_000, 5375, 3000, 2125, 2000, 2000]


def test_oneshot_and_dense():
    assert [OneShot(0.5, 2).keep(r, 100) for r in range(4)] == [100, 100, 50, 50]
    assert Dense().keep(10**6, 7) == 7


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: OneShot(1.1, 0), ValueError, "0 to 1, got 1.1"),
        (lambda: OneShot("0.5", 0), TypeError, "a number, got str"),
        (lambda: OneShot(0.5, -1), ValueError, "at least 0, got -1"),
        (lambda: Iterative(0.5, 3, 2), ValueError, "not before start=3, got 2"),
        (lambda: Iterative(0.5, 0, 2, 0), ValueError, "at least 1, got 0"),
        (lambda: Cubic(0.5, 0, 2.0), TypeError, "end: expected an int, got float"),
        (lambda: Cubic(float("nan"), 0, 2), ValueError, "got nan"),
    ],
)
def test_bad_values(make, error, says):
    with pytest.raises(error, match=says):
        make()


def losses(*given):
    return [(loss, 1000) for loss in given]


def test_adaptive_waits_until_the_loss_has_come_down():
    schedule = Adaptive(0.9, start=1, end=9, settled=0.5)
    assert schedule.follow([], 0, 1000) == 1000
    assert schedule.follow(losses(2.0), 1, 1000) == 1000
    assert schedule.follow(losses(2.0, 1.1), 2, 1000) == 1000
    ready = losses(2.0, 1.1, 1.0)
    assert schedule.follow(ready, 3, 1000) == keep_count(1000, 1 - 0.1 ** (1 / 7))
    assert Adaptive(0.9, start=4, end=9, settled=0.5).follow(ready, 3, 1000) == 1000
    for unknown in ([None, 1100], [2.0, None]):  # of the first or the last round
        assert schedule.follow([(loss, 1000) for loss in unknown], 2, 1000) == 1000


def test_adaptive_prunes_on_once_the_loss_is_back_within_the_margin():
    schedule = Adaptive(0.9, start=1, end=9, margin=0.1)
    past = [(2.0, 1000), (1.0, 1000), (0.8, 1000), (1.2, 700)]
    assert schedule.follow(past, 4, 1000) == 700
    past += [(0.875, 700)]
    assert schedule.follow(past, 5, 1000) == 474  # 700 * (100 / 700) ** (1 / 5)
    past[-1] = (0.881, 700)  # 0.8 * 1.1 = 0.88
    assert schedule.follow(past, 5, 1000) == 700


def test_adaptive_takes_no_more_than_its_share_and_ends_where_it_may():
    schedule = Adaptive(0.99, start=0, end=3, settled=1.0, most=0.5)
    assert schedule.follow(losses(1.0), 3, 1000) == 500  # 10 would be the target
    assert schedule.follow([(1.0, 1000), (0.9, 500)], 4, 1000) == 500  # after the end
    assert Adaptive(0.9, start=0, end=3, settled=1.0, most=1.0).follow(losses(1.0), 3, 1000) == 100


def test_adaptive_reaches_its_target_where_the_loss_always_recovers():
    schedule = Adaptive(0.9, start=1, end=8)
    past = losses(2.0)
    while len(past) < 12:
        keep = schedule.follow(past, len(past), 1003)
        assert keep <= past[-1][1] or len(past) == 1
        past.append((1.0 / len(past), keep))
    assert past[8][1] == past[-1][1] == keep_count(1003, 0.9)


def test_adaptive_wants_what_a_server_knows():
    with pytest.raises(TypeError, match="follow"):
        Adaptive(0.9, 1, 2).keep(1, 1000)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"settled": 0}, ValueError, "settled: expected a number above 0 and at most 1, got 0"),
        ({"most": 1.5}, ValueError, "most: expected a number above 0 and at most 1, got 1.5"),
        ({"margin": -0.1}, ValueError, "margin: expected a number at least 0, got -0.1"),
        ({"margin": "much"}, TypeError, "margin: expected a number, got str"),
        ({"end": 0}, ValueError, "end: expected a round not before start=1, got 0"),
    ],
)
def test_adaptive_arguments(given, error, says):
    with pytest.raises(error, match=says):
        Adaptive(**{"target": 0.9, "start": 1, "end": 5, **given})
