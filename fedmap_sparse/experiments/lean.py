"""What a run does without: torch's compiler, and giving memory back between two layers.

The compiler's import takes 4 s of CPU and compiles nothing here.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Methods of an optimizer that torch hides from its compiler; hiding one imports the compiler.
_HIDDEN = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")


def leave_compiler() -> list[Any]:
    """From here on optimizers do not import `torch._dynamo`; returns what was changed for that.

    torch wraps these methods so that each, at its first call, imports the compiler and asks it to
    leave the method alone. What the compiler would answer is remembered on the method: here it is
    the method itself. Where torch does so no longer, or the compiler is in use already, nothing is
    done.
    """
    if "torch._dynamo" in sys.modules:
        return []
    wrapped = (getattr(torch.optim.Optimizer, name, None) for name in _HIDDEN)
    methods = [m for w in wrapped if (m := getattr(w, "__wrapped__", None)) is not None]
    for method in methods:
        method.__dynamo_disable = method
    return methods


@contextmanager
def no_compiler() -> Iterator[None]:
    """As `leave_compiler`, for as long as this block runs."""
    methods = leave_compiler()
    try:
        yield
    finally:
        for method in methods:
            del method.__dynamo_disable


#: Parameters of glibc's mallopt, and a size above all tensors of a step.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 1 << 30


def keep_memory() -> None:
    """From here on this process keeps freed memory for the next tensor, instead of giving it back.

    glibc gives large blocks back to the system at once, which then clears each page anew. Other C
    libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _KEPT)
            mallopt(_M_TRIM_THRESHOLD, _KEPT)
