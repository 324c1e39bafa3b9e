"""`bench --device cuda` as far as it goes without one: each case under the emulator, the clocks
beside a stand-in for the device's events."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpucheck.driver import emulate

from fedmap_sparse import _backends
from fedmap_sparse.bench import floors, report, runner, timing
from fedmap_sparse.bench.case import Setting

pytest.importorskip("rich", reason="rich prints the table")

# The emulator has to be shown what kernels reach by tables of addresses: test_contracts.py does.
_BY_ADDRESS = ("accumulate", "masked_sgd", "masked_adamw")
CASES = [
    one
    for one in runner.registry().values()
    if "cuda" in one.devices
    and one.fixed_n is None
    and one.op not in _BY_ADDRESS
    and not one.group.startswith("robust")  # by address too
]


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.op)
def test_cases_hold_on_the_device(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_missing", lambda name: "")
    monkeypatch.setattr(_backends, "_forced", "triton")
    with emulate() as session:
        trial = one.build(Setting(3001, one.densities[-1]))
        trial.check()
        trial.ours()
    assert session.launches
    assert not session.faults


class Event:
    """Of a device that takes 2 ms for whatever lies between two events."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 2.0


def test_times_of_the_device_and_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("device"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: waits.append("queue"))
    monkeypatch.setattr(timing, "flush", lambda: waits.append("flush"))
    calls: list[int] = []
    ours = timing.Contender("ours", [lambda: calls.append(0), lambda: calls.append(1)])
    copy = timing.Contender("floor", [floors.device_copy(1000, torch.device("cpu"))])
    timing.interleave([ours, copy], timing.Plan(3, 1.0, 2), SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    assert ours.samples == copy.samples == [2e-3] * 3
    assert len(ours.call_samples) == 3
    assert calls == [0, 1] + [0, 1] * 3  # warmed up, then each turn the device's and the call's
    assert waits[:4] == ["device", "flush", "queue", "device"]
    record = {"op": "pack", "n": 1, "density": 0.1, "dtype": "float32", "median_s": 2e-3,
              "p20_s": 1e-3, "p80_s": 3e-3, "gbps": 1.0, "ratio_to_floor": 1.25, "call_s": 5e-3,
              "peers": {}}  # fmt: skip
    assert report.over_floor(record) == "80%"
    columns = {column.header for column in report.table([record]).columns}
    assert {"of a copy", "call"} <= columns
