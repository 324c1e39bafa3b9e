"""Options: one table behind files, command line, help and Python."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import options
from fedmap_sparse.experiments.config import Config, build, folder_of
from fedmap_sparse.federated.server_optim import FedAdam, FedAvg, FedAvgM
from fedmap_sparse.schedule import Cubic, Dense, Iterative, OneShot


def test_defaults_are_the_default_run() -> None:
    config = Config()
    assert (config.clients, config.partition, config.model) == (10, "iid", "cnn")
    assert (config.target, config.dataset) == (0.9, "fashion-mnist-subset")
    assert config.folder == Path("runs/fedmap")
    schedule = config.make_schedule()
    assert schedule.keep(config.rounds - 1, 824_096) == 82_410
    assert schedule.keep(0, 824_096) == 824_096


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"schedule": "dense", "baseline": False, "name": "a-b_c.1"},
        {"partition": "dirichlet", "alpha": 1e-05, "optimizer": "adamw"},
        {"partition": "pathological", "shards": 3, "server_optimizer": "fedadam"},
        {"data": 'quo"te \\ back\tand ünïcode\x7f'},
    ],
)
def test_a_written_config_reads_back(values: dict[str, Any], tmp_path: Path) -> None:
    config = build(values)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert build(options.read_file(path)) == config
    uncommented = re.sub(r"^# (?=\w+ = )", "", config.to_toml(), flags=re.M)
    assert tomllib.loads(uncommented) == config.to_dict()


def test_options_that_do_not_apply_are_left_out() -> None:
    assert build({"schedule": "dense"}).to_dict().keys().isdisjoint({"target", "prune_start"})
    assert build({"partition": "dirichlet"}).alpha == 0.5
    assert build({}).alpha is None
    assert build({"optimizer": "adamw"}).to_dict().keys().isdisjoint({"momentum"})
    assert build({"optimizer": "adamw"}).lr == 0.001


@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 10, 30, 100])
def test_the_schedule_fits_any_number_of_rounds(rounds: int) -> None:
    for kind in ("iterative", "cubic", "oneshot"):
        schedule = build({"rounds": rounds, "schedule": kind}).make_schedule()
        assert schedule.keep(rounds - 1, 1000) == 100
        if rounds > 1:
            assert schedule.keep(0, 1000) == 1000


def test_updates_have_the_dtype_of_broadcasts_unless_told() -> None:
    assert build({"dtype": "float16"}).uplink_dtype == "float16"
    assert build({"dtype": "float16", "uplink_dtype": "int8"}).uplink_dtype == "int8"


def test_schedules_and_server_optimizers() -> None:
    common = {"rounds": 20, "target": 0.8, "prune_start": 3}
    gradual = {**common, "prune_end": 11, "prune_every": 2}
    assert build(gradual).make_schedule() == Iterative(0.8, 3, 11, 2)
    assert build({**gradual, "schedule": "cubic"}).make_schedule() == Cubic(0.8, 3, 11, 2)
    assert build({**common, "schedule": "oneshot"}).make_schedule() == OneShot(0.8, 3)
    assert build({"schedule": "dense"}).make_schedule() == Dense()
    assert build({}).make_server_optimizer() == FedAvg()
    step = {"server_lr": 0.5, "server_momentum": 0.8}
    assert build({"server_optimizer": "fedavgm", **step}).make_server_optimizer() == FedAvgM(
        0.5, 0.8
    )
    adam = build({"server_optimizer": "fedadam", **step}).make_server_optimizer()
    assert adam == FedAdam(lr=0.5, beta1=0.8)


def test_the_learning_rate_decays_by_a_factor_a_round() -> None:
    config = build({"lr": 0.2, "lr_decay": 0.5})
    assert [config.learning_rate(r) for r in range(3)] == [0.2, 0.1, 0.05]


@pytest.mark.parametrize(
    ("clients", "share", "cohort"), [(10, 1.0, 10), (10, 0.25, 2), (10, 0.01, 1), (3, 0.5, 2)]
)
def test_cohort(clients: int, share: float, cohort: int) -> None:
    assert build({"clients": clients, "participation": share}).cohort == cohort


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clints": 3}, "unknown option 'clints'; did you mean clients?"),
        ({"batch-size": 3}, "unknown option 'batch-size'; did you mean batch_size?"),
        ({"zzzzzz": 3}, "unknown option 'zzzzzz'; --help lists them all"),
        ({"clients": "ten"}, "clients: expected an integer, got 'ten'"),
        ({"clients": 2.0}, "clients: expected an integer, got 2.0"),
        ({"clients": True}, "clients: expected an integer, got True"),
        ({"clients": None}, "clients: expected an integer, got None"),
        ({"baseline": 1}, "baseline: expected true or false, got 1"),
        ({"name": 7}, "name: expected text, got 7"),
        ({"lr": "fast"}, "lr: expected a number, got 'fast'"),
        ({"lr": float("nan")}, "lr: expected above 0, got nan"),
        ({"weight_decay": float("inf")}, "weight_decay: expected at least 0, got inf"),
        ({"clients": 0}, "clients: expected at least 1, got 0"),
        ({"target": 1.5}, "target: expected at least 0 and at most 1, got 1.5"),
        ({"participation": 0}, "participation: expected above 0 and at most 1, got 0"),
        ({"dropout": 1.0}, "dropout: expected at least 0 and below 1, got 1.0"),
        ({"model": "cmm"}, "model: expected one of mlp, cnn, lenet, resnet8, "),
        ({"schedule": "dens", "target": 0.9}, "schedule: expected one of dense, oneshot, itera"),
        ({"alpha": 0.5}, "alpha: goes with partition=dirichlet, not with partition=iid"),
        (
            {"schedule": "oneshot", "prune_end": 3},
            "prune_end: goes with schedule=iterative or cubic or adaptive, not with schedule=",
        ),
        ({"rounds": 5, "prune_end": 5}, "prune_end: expected a round before rounds=5, got 5"),
        ({"prune_start": 4, "prune_end": 3}, "prune_end: expected a round not before prune_start"),
        ({"name": "../up"}, "name: expected letters, digits, '.', '_' and '-', got '../up'"),
        ({"name": ".."}, "name: expected letters"),
        ({"clients": 4, "participation": 0.5, "min_updates": 3}, "min_updates: expected at most"),
    ],
)
def test_what_cannot_be_is_one_clear_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_choice_nearly_right_is_suggested() -> None:
    with pytest.raises(ConfigError, match="got 'dirichlett'; did you mean dirichlet\\?"):
        build({"partition": "dirichlett"})


def test_words_are_read_in_their_option_s_type() -> None:
    words = ["clients=1_0", "alpha=1e-2", "baseline=False", "name=x=y", "data=", "unknown=3"]
    assert options.read_words(Config, words) == {
        "clients": 10,
        "alpha": 0.01,
        "baseline": False,
        "name": "x=y",
        "data": None,
        "unknown": "3",
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("clients", "expected key=value, got 'clients'"),
        ("clients=1.5", "clients: expected an integer, got '1.5'"),
        ("baseline=yes", "baseline: expected true or false, got 'yes'"),
        ("rounds=", "rounds: expected an integer, got ''"),
    ],
)
def test_words_that_cannot_be_read(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.read_words(Config, [word])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clients = ", "not TOML"),
        ("[federation]\nclients = 3\n", r"got a table \[federation\]"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_that_cannot_be_read(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        options.read_file(path)
    assert "\n" not in str(caught.value)


def test_help_has_every_option_with_its_default() -> None:
    text = options.help_text(Config)
    for f in fields(Config):
        assert f"\n  {f.name}=" in f"\n{text}", f.name
        assert f.metadata["text"].split()[0] in text
    for expected in ("clients=10", "alpha=0.5", "baseline=true", "lr=<0.05 with sgd", "target=0.9"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 100


def test_folder() -> None:
    assert folder_of({"name": "x"}) == Path("runs/x")
    assert folder_of({"name": "x", "out": "y"}) == Path("y")
    assert build({"out": "a/b"}).folder == Path("a/b")
