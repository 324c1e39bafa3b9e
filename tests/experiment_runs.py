"""Small runs of an experiment, and whether two ended alike."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse.experiments import checkpoint
from fedmap_sparse.experiments.config import Config, build
from fedmap_sparse.experiments.progress import Observer


def quick(out: Path, **options: Any) -> Config:
    """Two seconds at most; one thread, as the tensors are tiny."""
    small = {"dataset": "digits", "model": "mlp", "clients": 4, "rounds": 4, "batch_size": 64}
    return build({**small, "threads": 1, "out": str(out), **options})


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records(out)]


def same_results(one: Path, other: Path) -> None:
    """Everything but seconds, bit for bit."""
    assert timeless(one) == timeless(other)
    for name in ("model.safetensors", "broadcast.fedmap"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [checkpoint.load(out / "checkpoint.safetensors")["arms"] for out in (one, other)]
    for arms in states:
        for arm in arms.values():
            for _, client in arm["clients"]:
                # A kept optimizer follows a new mask at its next step, a loaded one at once.
                client["optimizer"] = client["optimizer"] is not None
    same_tree(states[0], states[1])
    timed = {"seconds", "phases", "overhead"}
    kept = []
    for out in (one, other):
        summary = json.loads((out / "summary.json").read_text())
        kept.append(
            {n: {k: v for k, v in arm.items() if k not in timed} for n, arm in summary.items()}
        )
    assert kept[0] == kept[1]


def same_tree(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same_tree(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            same_tree(a, b)
    else:
        assert one == other


class StopAfter(Observer):
    """Interrupts a run as Ctrl-C would, once so many rounds have ended."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def round(self, record: dict[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
