"""Which implementations of an op this machine has, and the compiled module itself.

`reference` is plain torch, on any device. `cpu` is the C++ extension, for CPU tensors. `triton` is
for CUDA tensors (and for CPU tensors under Triton's interpreter). `cuda` is CUDA C++ for CUDA
tensors, of those ops that have it (selection); where it is forced, Triton serves the others. The
device decides, through
torch's dispatcher (see `ops/_library.py`); `backend=` or the environment variable
`FEDMAP_SPARSE_BACKEND` (read at import) force one. A forced backend that cannot serve raises, and
nothing falls back after a failure. In a tree whose extension is not built, `reference` serves CPU
tensors too, and importing the package warns of it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

#: The oldest torch that hands out DLPack's C exchange API, by which C++ reads tensors.
MIN_TORCH = (2, 11)
NAMES = ("reference", "cpu", "triton", "cuda")
_forced = os.environ.get("FEDMAP_SPARSE_BACKEND") or None


def _check_torch(version: str) -> None:
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        raise ImportError(f"fedmap_sparse needs torch {wanted} or later, found torch {version}")


_check_torch(torch.__version__)

native: ModuleType | Any
try:
    native = importlib.import_module("fedmap_sparse._native")
    _native_error = ""
except ImportError as error:
    native = None
    _native_error = str(error)
    warnings.warn(
        f"fedmap_sparse: the C++ extension did not load ({error}), so that slow reference code "
        "serves CPU tensors; build it with `pip install .`",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _missing(name: str) -> str:
    """Why `name` cannot run on this machine, or an empty string."""
    if name == "cpu" and native is None:
        return f"the C++ extension did not load ({_native_error}); build it with `pip install .`"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (`pip install fedmap-sparse[triton]`)"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "no CUDA device is available and TRITON_INTERPRET is not 1"
    if name == "cuda":
        # By its name: what is lowest imports nothing from above.
        return str(importlib.import_module("fedmap_sparse.cuda_kernels._driver").missing())
    return ""


def backends() -> dict[str, str]:
    """Every backend by name, with `"available"` or the reason why it is not.

    Returns:
        A dict with the keys "reference", "cpu", "triton" and "cuda".

    >>> import fedmap_sparse as fs
    >>> fs.backends()["reference"]
    'available'
    """
    return {name: _missing(name) or "available" for name in NAMES}


def require(name: str) -> None:
    """Raise RuntimeError, naming the backends there are, unless `name` can run here."""
    if reason := _missing(name):
        usable = ", ".join(n for n in NAMES if not _missing(n))
        raise RuntimeError(f"backend {name!r} is not available: {reason}. Available: {usable}")


def forced(backend: str | None, device: torch.device) -> str | None:
    """The backend that `backend=` or the environment forces, checked; None: the device decides.

    Raises:
        ValueError: unknown name, or a backend that cannot serve tensors of `device`.
        RuntimeError: the backend is not available here; the message names those that are.
    """
    name = backend or _forced
    if name is None:
        return None
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' serves CPU tensors, got a tensor on {device}")
    if name == "cuda" and device.type != "cuda":
        raise ValueError(f"backend 'cuda' serves CUDA tensors, got a tensor on {device}")
    # Dynamo traces through the cache into what it cannot trace: there a missing backend fails when
    # the graph runs.
    if not torch.compiler.is_compiling():
        require(name)
    return name


def pick(backend: str | None, device: torch.device) -> str:
    """The backend that serves `device`, for what is no torch op: forced, else the device's own.

    Raises as `forced` does, and RuntimeError for a CUDA device without Triton.
    """
    name = forced(backend, device)
    if name is None:
        if device.type == "cpu":
            return "cpu" if native is not None else "reference"
        if device.type != "cuda":
            return "reference"
        name = "triton"
        if not torch.compiler.is_compiling():
            require(name)
    return "triton" if name == "cuda" else name


def available(name: str) -> bool:
    """Whether `name` can run on this machine."""
    return not _missing(name)


def kernels(stem: str, language: str = "triton") -> ModuleType:
    """The kernels of one stem in "triton" or "cuda"; imported at first use, as `import
    fedmap_sparse` must not."""
    return importlib.import_module(f"fedmap_sparse.{language}_kernels.{stem}")


def threads() -> int:
    """Threads for native calls: what `torch.set_num_threads` said."""
    return torch.get_num_threads()


def on_device(implementation: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    if not first.is_cuda or first.device.index == torch.cuda.current_device():  # a guard: 2.6 us
        return implementation(*args)
    with torch.cuda.device(first.device):
        return implementation(*args)
