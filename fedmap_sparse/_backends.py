"""The only dispatch: which implementation of an op runs.

`reference` is plain torch, on any device. `cpu` is the C++ extension, for CPU tensors. `triton` is
for CUDA tensors (and for CPU tensors under Triton's interpreter). The default follows the device;
`backend=` or the environment variable `FEDMAP_SPARSE_BACKEND` (read at import) force one. A forced
backend that cannot serve raises; nothing falls back after a failure.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

NAMES = ("reference", "cpu", "triton")
_forced = os.environ.get("FEDMAP_SPARSE_BACKEND") or None

native: ModuleType | Any
try:
    native = importlib.import_module("fedmap_sparse._native")
    _native_error = ""
except ImportError as error:  # a source tree that was not built: only `reference` can serve
    native = None
    _native_error = str(error)


@functools.cache
def _missing(name: str) -> str:
    """Why `name` cannot run on this machine, or an empty string."""
    if name == "cpu" and native is None:
        return f"the C++ extension did not load ({_native_error}); build it with `pip install .`"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (`pip install fedmap-sparse[triton]`)"
        if importlib.util.find_spec("fedmap_sparse.triton_kernels") is None:
            return "this version has no Triton kernels yet"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "no CUDA device is available and TRITON_INTERPRET is not 1"
    return ""


def backends() -> dict[str, str]:
    """Every backend by name, with `"available"` or the reason why it is not.

    >>> import fedmap_sparse as fs
    >>> fs.backends()["reference"]
    'available'
    """
    return {name: _missing(name) or "available" for name in NAMES}


def pick(backend: str | None, device: torch.device) -> str:
    """The backend that serves `device`: `backend`, else the forced one, else the device's own.

    Raises:
        ValueError: unknown name, or a backend that cannot serve tensors of `device`.
        RuntimeError: the backend is not available here; the message names those that are.
    """
    name = backend or _forced
    if name is None:
        name = "cpu" if device.type == "cpu" else "triton"
    elif name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    elif name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' serves CPU tensors, got a tensor on {device}")
    # Dynamo traces through the cache into what it cannot trace: there a missing backend fails when
    # the graph runs.
    if not torch.compiler.is_compiling() and (reason := _missing(name)):
        usable = ", ".join(n for n in NAMES if not _missing(n))
        raise RuntimeError(f"backend {name!r} is not available: {reason}. Available: {usable}")
    return name


def kernels(stem: str) -> ModuleType:
    """The Triton kernels of one stem; imported at first use, as `import fedmap_sparse` must not."""
    name = f"fedmap_sparse.triton_kernels.{stem}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        message = f"{stem}: no Triton kernel yet; use backend='reference' or 'cpu'"
        raise NotImplementedError(message) from None


def threads() -> int:
    """Threads for native calls: what `torch.set_num_threads` said."""
    return torch.get_num_threads()


# What torch does not say in public. With a torch that lacks one of them nothing goes direct.
_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_tracing: Any = getattr(torch._C, "_get_tracing_state", None)
_profiling: Any = getattr(torch.autograd, "_profiler_enabled", None)
_direct = None not in (native, _modes, _tracing, _profiling)
_ORDINARY = (torch.Tensor, torch.nn.Parameter)
_overridden = torch.overrides.has_torch_function


def direct(backend: str | None, first: Any) -> bool:
    """Whether an op whose first tensor is `first` may go straight to C++, past torch's dispatcher.

    The way through it costs 2 to 4 us of an op's 5 and serves those who want to see the op: a
    compiler, a mode, a tracer, a profiler, a subclass. None is here if this is true. The other
    arguments are for C++ to judge: what it does not take (csrc/module.cpp, `attempt`) goes the
    usual way, by the checks in Python and the dispatcher.
    """
    return (
        not torch.compiler.is_dynamo_compiling()
        and _direct
        and type(first) in _ORDINARY
        and first.is_cpu
        and (backend or _forced or "cpu") == "cpu"
        and not (_modes() or _tracing() or _profiling() or _overridden((first,)))
    )


def written(*tensors: torch.Tensor | None) -> None:
    """Tell autograd that these changed: a graph that saved what they held raises, as in torch."""
    torch.autograd.graph.increment_version([t for t in tensors if t is not None])


def on_device(implementation: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    if not first.is_cuda:
        return implementation(*args)
    with torch.cuda.device(first.device):
        return implementation(*args)


# One library for the package. `define` + `impl` costs 1.7-2.6 us a call, `custom_op` 7.5-17 us.
_library = torch.library.Library("fedmap_sparse", "DEF")


def define(schema: str, fake: Callable[..., Any], **implementations: Callable[..., Any]) -> Any:
    """Register `fedmap_sparse::<schema>`, whose last argument is `str backend`; return the op.

    `implementations` maps a backend's name to a function of the op's arguments less `backend`;
    `fake` likewise gives empty results of the right shape.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    arguments = getattr(torch.ops.fedmap_sparse, name).default._schema.arguments
    changed = [i for i, argument in enumerate(arguments) if argument.is_write]

    def run(*args: Any) -> Any:
        if args[-1] == "triton":
            result = on_device(implementations["triton"], args[:-1])
        else:
            result = implementations[args[-1]](*args[:-1])
        if changed:
            written(*[args[i] for i in changed])
        return result

    def run_fake(*args: Any) -> Any:
        return fake(*args[:-1])

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fedmap_sparse::{name}", run_fake, lib=_library)
    return getattr(torch.ops.fedmap_sparse, name).default
