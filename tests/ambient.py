"""Runs the package under a state of torch that a user may have set: `FEDMAP_SPARSE_AMBIENT=NAME`.

The state is set inside of the package's own public calls, so that the tests' own tensors stay as
they are; anomaly mode and deterministic algorithms are set for the whole run.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

_inside = 0
_lock = threading.Lock()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The default is the whole process's: of threads the first one in sets it, the last one out
    puts it back."""
    global _inside
    before = torch.get_default_dtype()
    if torch.compiler.is_compiling():  # Dynamo takes no lock; of threads there is one
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
        return
    with _lock:
        _inside += 1
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


#: Set in each public call.
INSIDE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
#: Set for the whole run.
AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}


def not_under(*names: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test in these states, whose subject they change; what the package gives is not."""
    return pytest.mark.skipif(os.environ.get("FEDMAP_SPARSE_AMBIENT") in names, reason=reason)


#: Why tests that write into what a call gave do not run in inference mode.
FROZEN = "what a call gives in inference mode may not be written outside of it: torch's rule"
#: Why tests of the way that a call takes do not run under a default device.
MODE = "a default device is a mode of torch, and under a mode every op is torch's to dispatch"
#: Why tests with a caller's own function do not run there.
OWN = "the caller's own function runs inside the call, and its tensors are on the default device"


def install(name: str) -> None:
    """Let every public call of the package run under the state of this name."""
    if name in AROUND:
        AROUND[name]().__enter__()
        return
    state = INSIDE[name]
    import fedmap_sparse as fs
    from fedmap_sparse import codec, layout, mask, ops, optim

    # Function transforms and autograd through an op are no business of inference mode.
    skipped = {"pack", "unpack"} if name == "inference" else set()
    for module in (ops, codec, fs):
        for public in module.__all__:
            found = getattr(module, public)
            if inspect.isfunction(found) and public not in skipped:
                setattr(module, public, _within(state, found))
    classes = (
        fs.FlatParameters,
        fs.FedMapServer,
        fs.FedMapClient,
        layout.FlatLayout,
        mask.Mask,
        ops.Accumulator,
        codec.Message,
        optim.MaskedSGD,
        optim.MaskedAdamW,
    )
    for owner in classes:
        for key, found in list(vars(owner).items()):
            if key.startswith("_") and key not in ("__init__", "__le__", "__and__", "__or__"):
                continue
            if inspect.isfunction(found):
                setattr(owner, key, _within(state, found))
            elif isinstance(found, staticmethod):
                setattr(owner, key, staticmethod(_within(state, found.__func__)))
            elif isinstance(found, functools.cached_property):
                found.func = _within(state, found.func)
    for base in (optim.MaskedOptimizer,):
        for key in ("set_mask", "load_state_dict", "state_dict", "_step"):
            setattr(base, key, _within(state, getattr(base, key)))


def _within(
    state: Callable[[], AbstractContextManager[Any]], call: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        with state():
            return call(*args, **kwargs)

    return run
