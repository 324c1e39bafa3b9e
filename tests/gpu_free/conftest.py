"""The rungs of the ladder as one fixture: the same test runs interpreted and as compiled PTX."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ladder import WHOLE, coarser

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


RUNGS = {"interpreter, shuffled 1": ("guard", 1), "ptx sm_90": ("emulate", 3)}
if WHOLE:
    RUNGS |= {"interpreter": ("guard", None), "interpreter, shuffled 2": ("guard", 2)}

#: Lines that tests want printed at the end of the run.
SUMMARY: list[str] = []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SUMMARY:
        terminalreporter.section("the ladder")
        for line in SUMMARY:
            terminalreporter.write_line(line)


@pytest.fixture
def summary() -> list[str]:
    return SUMMARY


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer, so that what was not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=RUNGS)
def rung(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> Iterator[Any]:
    """Launches go to one rung; it fails the test for any fault."""
    from gpucheck.driver import emulate
    from gpucheck.interpreter import guard

    from fedmap_sparse import _backends, triton_kernels

    # The decorator asks whether kernels are interpreted: import them before a guard says yes.
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        importlib.import_module(f"fedmap_sparse.triton_kernels.{module.name}")
    monkeypatch.setattr(_backends, "_missing", lambda name: "")
    how, seed = RUNGS[request.param]
    enter = guard(seed) if how == "guard" else emulate(seed=seed)
    shapes = coarser() if how == "guard" else contextlib.nullcontext()
    with np.errstate(all="ignore"), shapes, enter as session:
        yield session
    assert not session.faults
