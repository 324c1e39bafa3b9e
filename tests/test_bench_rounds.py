"""Whole rounds under `bench --round`: what is measured, and that the arms do the same work."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmap_sparse import backends
from fedmap_sparse.bench import main, memory, rounds
from fedmap_sparse.bench.case import PHASES

if backends()["cpu"] != "available":
    pytest.skip(f"cpu backend: {backends()['cpu']}", allow_module_level=True)
pytest.importorskip("rich", reason="rich prints the table")


def test_a_record(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    code = main(
        ["--round", "--models", "resnet20", "--densities", ".1", "--quick", "--json", str(file)]
    )
    assert code == 0
    [record] = json.loads(file.read_text())["records"]
    assert (record["op"], record["clients"], record["density"]) == ("round_resnet20", 10, 0.1)
    assert set(record["peers"]) == {"Boolean masks, torch.save", "Boolean masks, Flower FedAvg"}
    for arm in (record, *record["peers"].values()):
        assert set(arm["phases_s"]) == set(PHASES)
        assert all(seconds > 0 for seconds in arm["phases_s"].values())
        assert 0 < arm["p20_s"] <= arm["median_s"] <= arm["p80_s"]
    # 24,000 survivors and 2,700 dense numbers beside 272,000 numbers.
    for peer in record["peers"].values():
        assert 8 < peer["payload_bytes"] / record["payload_bytes"] < 14
    assert record["forward_backward_s"] > 0


def test_arms_that_differ_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = rounds.Packed.weights
    monkeypatch.setattr(
        rounds.Packed, "weights", lambda arm: {name: w * 1.01 for name, w in right(arm).items()}
    )
    file = tmp_path / "r.json"
    words = ["--round", "--models", "resnet20", "--densities", ".1", "--quick"]
    assert main([*words, "--json", str(file)]) == 1
    [refused] = json.loads(file.read_text())["refused"]
    assert "expected the model of Boolean masks" in refused["reason"]
    assert "was not timed" in capsys.readouterr().out


def test_models_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--round", "--models", "resnet21"]) == 2
    assert "models: expected any of resnet20" in capsys.readouterr().err


def test_arrays_are_serialised_as_flower_does() -> None:
    common = pytest.importorskip("flwr.common", reason="Flower is not installed")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert rounds.array_bytes(array) == common.ndarrays_to_parameters([array]).tensors[0]
    assert np.array_equal(np.load(io.BytesIO(rounds.array_bytes(array))), array)


@pytest.mark.skipif(not memory.known(), reason="this system does not count resident memory")
def test_peak_memory() -> None:
    with memory.peak() as used:
        held = torch.ones(16 << 20)  # 64 MiB, freed before the end
        del held
        torch.ones(1 << 20)
    # Each thread reports its pages to the kernel's count in batches.
    assert 62 << 20 <= used.bytes < 80 << 20


def test_mobilenet_and_minilm_run_forward() -> None:
    from fedmap_sparse.bench import models

    images = torch.randn(2, 3, 64, 64)
    assert models.mobilenetv2()(images).shape == (2, 1000)
    assert models.minilm()(torch.randint(30522, (2, 5))).shape == (2, 384)
