"""Intervals beside a table of Student's t and beside scipy's."""

import math

import pytest

from fedmap_sparse.experiments.intervals import Interval, t_quantile


@pytest.mark.parametrize(
    ("freedom", "wanted"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (200, 1.9719)],
)
def test_quantiles_are_those_of_the_table(freedom: int, wanted: float) -> None:
    assert t_quantile(freedom) == pytest.approx(wanted, abs=5e-5)


def test_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for freedom in range(1, 40):
        for confidence in (0.5, 0.9, 0.99):
            wanted = stats.t.ppf((1 + confidence) / 2, freedom)
            assert t_quantile(freedom, confidence) == pytest.approx(wanted, rel=1e-9)


def test_an_interval_says_of_how_many() -> None:
    found = Interval.of([1.0, 2.0, 4.0])
    assert (found.n, found.mean) == (3, pytest.approx(7 / 3))
    assert found.half == pytest.approx(4.302653 * math.sqrt(7 / 3 / 3), rel=1e-6)
    assert found.shown("points") == "+2.33 points [-1.46, +6.13], n=3"
    assert found.to_dict()["low"] == pytest.approx(7 / 3 - (found.half or 0))


def test_one_value_has_no_interval() -> None:
    found = Interval.of([0.5])
    assert found.half is None
    assert found.shown("points") == "+0.50 points, n=1: no interval"
    assert found.to_dict() == {"n": 1, "mean": 0.5, "low": None, "high": None}


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert Interval.of([2.0, 2.0]).half == 0
