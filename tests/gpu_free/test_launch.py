"""Kernels launched without Triton's own launch path: the same ones, and seen by all that watch."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from gpucheck.driver import _Driver, compile_only
from gpucheck.interpreter import guard
from ladder.catalogue import workloads
from triton import knobs
from triton.runtime import jit

from fedmap_sparse import triton_kernels
from fedmap_sparse.triton_kernels import _launch
from fedmap_sparse.triton_kernels._launch import launch

NUMBERS = (0, 1, 2, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, 2**40, 2**63 - 16)
TYPES = (torch.int16, torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16)


@triton.jit(do_not_specialize=["b"], do_not_specialize_on_alignment=["y"])
def toy(x, y, z, a, b, c: tl.int64, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    if z is not None:
        tl.store(y + at, tl.load(z + at) + a + b + c)
    else:
        tl.store(y + at, tl.load(x + at) + a + b + c)


class Launches:
    """What a driver that runs nothing was asked to run, and how often Triton was asked for it."""

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.asked = 0

    def setdefault(self, key: str, kernel: Any) -> None:
        self.ran.append(kernel)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    seen, ask = Launches(), jit.compute_cache_key

    def asked(*arguments: Any) -> Any:
        seen.asked += 1
        return ask(*arguments)

    with compile_only(90):
        monkeypatch.setattr(_Driver, "compiled", seen)
        monkeypatch.setattr(jit, "compute_cache_key", asked)
        monkeypatch.setattr(_launch, "_compiled", {})
        yield seen


def shapes(arguments: list[Any], i: int) -> Iterator[list[Any]]:
    """Other lists: argument `i` of another alignment, type, size or value."""
    given = arguments[i]
    if isinstance(given, torch.Tensor):
        room = torch.zeros(64, dtype=torch.uint8)
        others = [room[at:].view(t) for t in TYPES for at in (0, 8) if not at % t.itemsize]
        others += [room.view(t)[1:] for t in TYPES]
        others.append(torch.zeros(16))
    elif isinstance(given, int):
        others = list(NUMBERS)
    else:
        others = [None]
    for other in others:
        yield [*arguments[:i], other, *arguments[i + 1 :]]


def assert_no_coarser_than_triton(kernel: Any, arguments: list[Any], constants: Any) -> int:
    """Lists with one key are one to Triton too."""
    bind = kernel.device_caches[triton.runtime.driver.active.get_current_device()][4]
    meant: dict[Any, Any] = {}
    for i in range(len(arguments)):
        for j in range(i, len(arguments)):
            for first in shapes(arguments, i):
                for given in shapes(first, j) if j != i else [first]:
                    key = _launch._key(kernel, 0, (4, None), tuple(given), constants)
                    meaning = bind(*given, **constants)[1]
                    assert meant.setdefault(key, meaning) == meaning
            if len(arguments) > 6:  # pairs of arguments for the toy alone
                break
    return len(meant)


def test_the_key_tells_apart_what_triton_does(launches: Launches) -> None:
    x = torch.zeros(16)
    assert assert_no_coarser_than_triton(toy, [x, x, None, 3, 5, 7], {"SIZE": 16}) > 1000


def test_a_coarser_key_is_noticed(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(kernel: Any, device: Any, options: Any, arguments: Any, constants: Any) -> Any:
        return tuple(type(a) for a in arguments)

    monkeypatch.setattr(_launch, "_key", coarse)
    with pytest.raises(AssertionError):
        assert_no_coarser_than_triton(toy, [torch.zeros(16)] * 3 + [3, 5, 7], {"SIZE": 16})


def test_every_kernel_has_such_a_key_and_its_constants_last(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: dict[str, int] = {}

    def instead(
        kernel: Any,
        grid: tuple[int, ...],
        *given: Any,
        num_warps: int = 4,
        maxnreg: int | None = None,
        **constants: Any,
    ) -> None:
        assert kernel.arg_names == [*kernel.arg_names[: len(given)], *constants]
        assert all(p.is_constexpr == (p.name in constants) for p in kernel.params)
        if kernel.__name__ not in met:
            met[kernel.__name__] = assert_no_coarser_than_triton(kernel, list(given), constants)

    for module in pkgutil.iter_modules(triton_kernels.__path__):
        loaded = importlib.import_module(f"fedmap_sparse.triton_kernels.{module.name}")
        if hasattr(loaded, "launch"):
            monkeypatch.setattr(loaded, "launch", instead)
    for workload in workloads(4096):
        workload.run()
    assert len(met) >= 25
    assert min(met.values()) > 3


def test_a_number_that_no_kernel_is_specialised_on_is_no_new_entry(launches: Launches) -> None:
    x = torch.zeros(16)
    for b in (1, 2, 16, 10**6):
        launch(toy, (1,), x, x, None, 3, b, 7, SIZE=16)
    assert len(_launch._compiled) == 1
    launch(toy, (1,), x, x, None, 3, 2**40, 7, SIZE=16)
    launch(toy, (1,), x, x, None, 3, 2, 7, SIZE=16, num_warps=1)
    launch(toy, (1,), x, x, None, 3, 2, 7, SIZE=16, maxnreg=64)
    assert len(_launch._compiled) == 4
    assert [kernel.metadata.maxnreg for kernel in _launch._compiled.values()] == [None] * 3 + [64]


def test_launchers_call_launch() -> None:
    for path in Path(triton_kernels.__file__).parent.glob("*.py"):
        found = re.findall(r"^ +\w+\[.*\]\(", path.read_text(), re.M)
        assert not found or path.stem == "_launch", (path.name, found)


@pytest.mark.parametrize("size", [65536, 65537])
def test_a_second_launch_runs_what_triton_would(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    chosen = {w.name: w for w in workloads(size)}
    for name in ("pack float32 0.5", "masked_sgd float32 0.5", "select float32", "deposit 0.5"):
        monkeypatch.setattr(_launch, "_KNOWN", False)
        chosen[name].run()
        by_triton, launches.ran = launches.ran, []
        monkeypatch.setattr(_launch, "_KNOWN", True)
        chosen[name].run()
        launches.ran, launches.asked = [], 0
        chosen[name].run()
        assert launches.asked == 0
        assert len(launches.ran) == len(by_triton)
        assert all(a is b for a, b in zip(launches.ran, by_triton, strict=True))
        launches.ran = []


def test_triton_launches_where_somebody_watches(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = torch.zeros(16), torch.zeros(16)

    def run() -> int:
        """How often Triton is asked at the second launch."""
        for _ in range(2):
            launches.asked = 0
            launch(toy, (1,), x, y, None, 3, 5, 7, SIZE=16)
        return launches.asked

    assert run() == 0
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(print)
        assert run() == 1
        chain.remove(print)
    toy.add_pre_run_hook(lambda *given, **named: None)
    assert run() == 1
    toy.pre_run_hooks.clear()
    monkeypatch.setattr(_launch, "_KNOWN", False)
    assert run() == 1
    monkeypatch.setattr(_launch, "_KNOWN", True)
    with guard() as watch:
        assert run() == 0
    assert watch.launches == ["toy", "toy"]
    assert run() == 0


def test_what_is_kept_is_bounded(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_MOST", 4)
    x = torch.zeros(16)
    for a in range(3, 16):
        launch(toy, (1,), x, x, None, a, 5, 7, SIZE=16)
        assert 1 <= len(_launch._compiled) <= 4
