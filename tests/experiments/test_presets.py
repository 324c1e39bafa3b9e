"""Methods as options: what each sets, what may be overridden, and that a file goes with another."""

import tomllib
from typing import Any

import pytest

from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments.baselines import arms
from fedmap_sparse.experiments.config import build, is_complete
from fedmap_sparse.experiments.presets import METHODS


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("fedmap", {"schedule": "iterative", "criterion": "magnitude", "prune_start": 2}),
        ("fedavg", {"schedule": "dense", "target": None, "dtype": "float32"}),
        ("fedavg-int8", {"schedule": "dense", "dtype": "int8", "uplink_dtype": "int8"}),
        ("fedsparsify", {"schedule": "cubic", "prune_start": 1, "prune_end": 19}),
        ("oneshot", {"schedule": "oneshot", "prune_start": 10, "prune_end": None}),
        ("random", {"schedule": "iterative", "criterion": "random"}),
        ("snip", {"schedule": "oneshot", "prune_start": 0, "criterion": "snip"}),
        ("feddst", {"prune_start": 0, "regrow": 0.2, "regrow_every": 2, "update_density": None}),
        ("stc", {"schedule": "dense", "update_density": 0.01, "target": None}),
    ],
)
def test_what_a_method_sets(method: str, wanted: dict[str, Any]) -> None:
    config = build({"method": method})
    assert {key: getattr(config, key) for key in wanted} == wanted


@pytest.mark.parametrize("method", METHODS)
def test_the_file_of_a_run_goes_with_another_method_and_other_rounds(method: str) -> None:
    config = build({"method": method})
    values = tomllib.loads(config.to_toml())
    assert is_complete(values)
    assert build(values).to_dict() == config.to_dict()
    for other in METHODS:
        changed = {k: v for k, v in values.items() if k not in ("regrow", "update_density")}
        assert build({**changed, "method": other, "rounds": 7}).arm in (other, "dense")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_methods_fit_short_runs(method: str, rounds: int) -> None:
    config = build({"method": method, "rounds": rounds})
    schedule = config.make_schedule()
    assert schedule.keep(rounds - 1, 1000) == (1000 if config.schedule == "dense" else 100)


def test_rounds_of_pruning_are_defaults_and_the_rest_is_the_methods() -> None:
    assert build({"method": "fedsparsify", "prune_end": 5}).prune_end == 5
    for options, message in (
        ({"method": "oneshot", "schedule": "cubic"}, "schedule: method=oneshot has oneshot, got"),
        ({"method": "random", "criterion": "erk"}, "criterion: method=random has random, got erk"),
        ({"criterion": "snip"}, "criterion: snip ranks before any training"),
        (
            {"method": "stc", "server_optimizer": "fedavgm"},
            'optimizer: method=stc goes with "fedavg" alone',
        ),
        (
            {"method": "feddst", "keep_optimizer": True},
            "keep_optimizer: method=feddst goes with false",
        ),
        ({"regrow": 0.1}, "regrow: goes with method=feddst, not with method=fedmap"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(options)


def test_the_arms_are_named_by_their_method() -> None:
    assert list(arms(build({"method": "stc"}))) == ["stc", "dense"]
    assert list(arms(build({"method": "fedavg-int8"}))) == ["dense"]
    assert list(arms(build({"method": "snip", "baseline": False}))) == ["snip"]
