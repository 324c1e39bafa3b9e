"""Who takes part and with what: groups, parts, label noise, stragglers, sampling, seeds, rates."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_runs import quick, records

from fedmap_sparse.engines.in_process import draw
from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import data as datasets
from fedmap_sparse.experiments import runner
from fedmap_sparse.experiments.config import Config, build
from fedmap_sparse.experiments.data import Dataset, Split
from fedmap_sparse.experiments.setting import prepared
from fedmap_sparse.experiments.shares import Shares, placed
from fedmap_sparse.experiments.training import LocalTraining, make_client
from fedmap_sparse.flat import flatten


def table(samples: int = 60, groups: bool = True) -> Dataset:
    rng = torch.Generator().manual_seed(0)
    splits = [
        Split(torch.randn(n, 6, generator=rng), torch.arange(n) % 3) for n in (samples, 12, 12)
    ]
    sites = np.arange(samples) % 4 if groups else None
    return Dataset("table", 3, *splits, "made here", sites)


def small(out: Path, **options: Any) -> Config:
    return quick(out, dataset="table.npz", **{"batch_size": 8, "rounds": 2, **options})


def setting(config: Config, dataset: Dataset, **options: Any) -> Any:
    return prepared(
        config.with_threads(1),
        torch.nn.Linear(6, 3),
        dataset,
        runner.partition(config, dataset, **options),
        torch.device("cpu"),
        own_model=True,
        rounds=1,
        budget=1,
    )


def test_a_client_for_each_group(tmp_path: Path) -> None:
    dataset = table()
    config = small(tmp_path, partition="groups")
    with setting(config, dataset) as made:
        for client in range(4):
            expected = dataset.train.images[client::4]
            assert torch.equal(made.shares[client].images, expected)
    summary = runner.run(config, data=dataset)
    assert summary["fedmap"]["rounds"] == 2
    with pytest.raises(ConfigError, match="the data have 4 groups: clients=4, not 3"):
        runner.run(small(tmp_path / "b", partition="groups", clients=3), data=dataset)
    with pytest.raises(ConfigError, match="the data have no groups"):
        runner.run(small(tmp_path / "b", partition="groups"), data=table(groups=False))


def test_parts_from_python(tmp_path: Path) -> None:
    dataset = table()
    parts = [[0, 1, 2], [3, 4], [5], [10, 59]]
    with setting(small(tmp_path), dataset, parts=parts) as made:
        assert made.shares.sizes == {0: 3, 1: 2, 2: 1, 3: 2}
        assert torch.equal(made.shares[3].images, dataset.train.images[[10, 59]])
    runner.run(small(tmp_path), data=dataset, parts=parts)
    with pytest.raises(ConfigError, match="from Python"):
        runner.run(small(tmp_path), data=dataset, parts=parts[::-1], resume=True)
    with pytest.raises(ConfigError, match="parts: 4 parts were given: clients=4, not 5"):
        runner.run(small(tmp_path / "b", clients=5), data=dataset, parts=parts)


def test_label_noise_is_for_training_alone(tmp_path: Path) -> None:
    dataset = table()
    options: dict[str, Any] = {"holdout": 0.25, "partition": "groups"}
    with (
        setting(small(tmp_path, label_noise=0.5, **options), dataset) as noisy,
        setting(small(tmp_path, **options), dataset) as clean,
    ):
        wrong = sum(int((noisy.shares[c].labels != clean.shares[c].labels).sum()) for c in range(4))
        assert wrong == sum(round(0.5 * n) for n in clean.shares.sizes.values())
        assert torch.equal(noisy.clients._held.labels, clean.clients._held.labels)
        assert torch.equal(noisy.validation.labels, dataset.validation.labels)


def test_a_straggler_does_a_part_of_its_steps(tmp_path: Path) -> None:
    dataset = table()
    config = small(
        tmp_path, clients=2, local_epochs=3, stragglers=0.5, straggler_steps=0.4, partition="iid"
    )
    shares = Shares(
        dataset.train, runner.partition(config, dataset), torch.device("cpu"), nhwc=False
    )
    train = LocalTraining(config, shares, Phases())
    rng = np.random.default_rng(0)
    steps = [
        len(list(train._batches(at_round, name, 30, rng)))
        for at_round in range(40)
        for name in (0, 1)
    ]
    assert set(steps) == {12, 5}  # 3 epochs of 4; 0.4 of that
    assert 25 <= steps.count(5) <= 55
    one = LocalTraining(
        build({**config.to_dict(), "stragglers": 1.0, "straggler_steps": 0.01}), shares, Phases()
    )
    assert len(list(one._batches(0, 0, 30, rng))) == 1


def test_cohorts_by_samples_favour_large_clients() -> None:
    sizes = {0: 10, 1: 30, 2: 60, 3: 0}
    cohorts = [draw(range(4), at_round, 1, 0.0, 5, 0, sizes)[0] for at_round in range(500)]
    counts = np.bincount([c[0] for c in cohorts], minlength=4) / 500
    assert counts[3] == 0
    np.testing.assert_allclose(counts[:3], [0.1, 0.3, 0.6], atol=0.07)


def test_sampling_by_samples_counts_updates_alike(tmp_path: Path) -> None:
    dataset = table()
    parts = [range(40), range(40, 50), range(50, 59), [59]]
    config = small(tmp_path, sampling="samples", participation=0.5, baseline=False)
    runner.run(config, data=dataset, parts=parts)
    assert all(r["cohort"] == 2 for r in records(tmp_path))


def test_seeds_of_data_and_of_weights_are_apart(tmp_path: Path) -> None:
    dataset = table()
    parts = [
        runner.partition(small(tmp_path, **seeds), dataset)
        for seeds in ({"seed": 1}, {"seed": 2, "data_seed": 1}, {"seed": 1, "data_seed": 2})
    ]
    assert all(map(np.array_equal, parts[0], parts[1]))
    assert not all(map(np.array_equal, parts[0], parts[2]))
    weights = [
        next(runner._template(small(tmp_path, **seeds), dataset, None).parameters())
        for seeds in ({"seed": 1}, {"seed": 2, "model_seed": 1}, {"seed": 1, "model_seed": 2})
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_learning_rates_warm_up_and_follow_a_cosine() -> None:
    config = build({"lr": 0.4, "rounds": 10, "warmup": 3, "lr_schedule": "cosine"})
    rates = [config.learning_rate(r) for r in range(10)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4:] == pytest.approx([0.2 * (1 + math.cos(math.pi * r / 7)) for r in range(1, 7)])
    with pytest.raises(ConfigError, match="warmup: expected a round before rounds=10, got 10"):
        build({"rounds": 10, "warmup": 10})
    with pytest.raises(ConfigError, match=r"lr_decay: goes with lr_schedule=decay, got 0\.9"):
        build({"lr_schedule": "cosine", "lr_decay": 0.9})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_nhwc_is_the_same_images_in_another_order_of_memory(channels: int, shared: bool) -> None:
    split = Split(torch.randn(9, channels, 5, 4), torch.arange(9))
    parts = [np.array([4, 1]), np.array([0, 8, 3])]
    shares = Shares(split, parts, torch.device("cpu"), nhwc=True, shared=shared)
    for client, part in enumerate(parts):
        images = shares[client].images
        assert torch.equal(images, split.images[torch.from_numpy(part)])
        assert images.stride() == (20 * channels, 1, 4 * channels, channels)
    whole = placed(split, torch.device("cpu"), nhwc=True)
    assert torch.equal(whole.images, split.images)
    assert whole.images.stride() == (20 * channels, 1, 4 * channels, channels)
    # What decides for PyTorch, with one channel too: the output of a layer follows.
    assert torch.nn.Conv2d(channels, 7, 3)(whole.images).stride(1) == 1
    assert len(shares.shared) == (2 if shared else 0)


def test_a_sequence_stays_as_it_is() -> None:
    split = Split(torch.randn(9, 5, 4), torch.arange(9))
    shares = Shares(split, [np.arange(9)], torch.device("cpu"), nhwc=True)
    assert torch.equal(shares[0].images, split.images)
    assert torch.equal(placed(split, torch.device("cpu"), nhwc=True).images, split.images)


def test_a_client_is_what_the_options_say(tmp_path: Path) -> None:
    config = quick(tmp_path, keep_optimizer=True, uplink_dtype="int8", delta=True, prox_mu=0.1)
    client = make_client(config, flatten(torch.nn.Linear(3, 2)))
    assert (client.keep_optimizer, client.dtype, client.delta, client.prox_mu) == (
        True, "int8", True, 0.1
    )  # fmt: skip


def test_cifar_wants_its_folder(tmp_path: Path) -> None:
    with pytest.raises(datasets.DataError, match="cifar100: name the folder"):
        runner.run(quick(tmp_path, dataset="cifar100"))
