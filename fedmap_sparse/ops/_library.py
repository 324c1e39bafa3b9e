"""How an op is registered with torch, and the one way past torch's dispatcher.

An op has one schema. The plain-torch reference is its default, for every device; C++ is registered
for CPU tensors, Triton or CUDA C++ for CUDA tensors, and anyone may register a kernel for another
device:
`torch.library.Library("fedmap_sparse", "IMPL").impl("pack_out", kernel, "PrivateUse1")`. Beside
the default overload, which the device decides, there is one overload for each implementation
(`torch.ops.fedmap_sparse.pack_out.reference`): that is what `backend=` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends
from fedmap_sparse._backends import native
from fedmap_sparse.ops._rules import Rule, check

#: `define` and `impl` cost 1.7-2.6 us per call, `custom_op` 7.5-17 us.
LIBRARY = torch.library.Library("fedmap_sparse", "DEF")
#: Every op by name.
OPS: dict[str, Op] = {}

# Private torch APIs. With a torch that lacks one of them nothing goes direct.
_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_tracing: Any = getattr(torch._C, "_get_tracing_state", None)
_profiling: Any = getattr(torch.autograd, "_profiler_enabled", None)
_transforms: Any = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_bypass = None not in (native, _modes, _tracing, _profiling)
_ORDINARY = (torch.Tensor, torch.nn.Parameter)
_overridden = torch.overrides.has_torch_function
_compiling = torch.compiler.is_dynamo_compiling
_increment_version = torch.autograd.graph.increment_version
_threads = torch.get_num_threads


def direct(first: Any, backend: str | None) -> bool:
    """Whether an op whose first tensor is `first` may go straight to C++, past the dispatcher.

    The way through it costs 2 to 4 us of an op's 5. It serves those who want to see the op: a
    compiler, a mode, a tracer, a profiler, a subclass. True if none of them is active. The other
    arguments are for C++ to judge (`Op.attempt`).
    """
    return (
        not _compiling()
        and _bypass
        and type(first) in _ORDINARY
        and first.is_cpu
        and (backend or _backends._forced or "cpu") == "cpu"
        and not (_modes() or _tracing() or _profiling() or _overridden((first,)))
    )


def follows(t: Tensor) -> bool:
    """Whether autograd has to follow what is made of `t`."""
    return t.requires_grad and torch.is_grad_enabled()


def transformed() -> bool:
    """Whether a transform of torch.func is active, outside of a graph that is being compiled."""
    if torch.compiler.is_compiling():
        return False
    return _transforms is not None and _transforms() is not None


class Op:
    """One op: `fedmap_sparse::<schema>`.

    Args:
        schema: as torch writes it, without the namespace.
        fake: a function of the op's arguments that gives empty results of the right shape.
        reference: the op in plain torch, for any device.
        cpu: the op by C++: a function of the native module by its name, or one that has further
            arguments as those do: `threads`, and `attempt`, true if nothing was checked yet; the
            result is then None if C++ declined.
        triton: the op by Triton kernels. None: the reference serves CUDA tensors too.
        cuda: the op by CUDA C++, which serves CUDA tensors where NVRTC is at hand; Triton does
            otherwise, and where it returns NotImplemented, unless it was forced.
        rules: what the public function's arguments have to be, for `check`. C++ holds the same
            rules; tests/ops/test_rules.py compares the two.
    """

    def __init__(
        self,
        schema: str,
        fake: Callable[..., Any],
        *,
        reference: Callable[..., Any],
        cpu: Callable[..., Any] | str | None = None,
        triton: Callable[..., Any] | None = None,
        cuda: Callable[..., Any] | None = None,
        rules: Sequence[Rule] = (),
    ) -> None:
        self.name, arguments = schema.split("(", 1)
        self.rules = rules
        self._cpu: Any = getattr(native, cpu, None) if isinstance(cpu, str) else cpu
        self._fake = fake
        self._changed: list[int] = []
        self._void = False
        self.default = self._define(self.name, arguments)
        of_schema = self.default._schema
        self._changed = [i for i, a in enumerate(of_schema.arguments) if a.is_write]
        self._void = not of_schema.returns
        self._forms: dict[str, Any] = {}
        keys = {"reference": "CompositeExplicitAutograd", "cpu": "CPU", "": "CUDA"}
        given = {
            "reference": reference,
            "cpu": None if native is None or cpu is None else self._checked,
            "triton": None if triton is None else _on_device("triton", triton),
            "cuda": None if cuda is None else _on_device("cuda", cuda),
            # What a CUDA device has by itself.
            "": None if triton is None else _by_device(triton, cuda),
        }
        for backend, implementation in given.items():
            if implementation is not None:
                run = self._run(implementation)
                if backend in keys:
                    LIBRARY.impl(self.name, run, keys[backend])
                if not backend:
                    continue
                form = f"{self.name}.{backend}"
                self._forms[backend] = self._define(form, arguments)
                LIBRARY.impl(form, run, "CompositeExplicitAutograd")
        OPS[self.name] = self

    def _define(self, name: str, arguments: str) -> Any:
        LIBRARY.define(f"{name}({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fedmap_sparse::{name}", self._fake, lib=LIBRARY)
        stem, _, overload = name.partition(".")
        return getattr(getattr(torch.ops.fedmap_sparse, stem), overload or "default")

    def _run(self, implementation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            try:
                result = implementation(*args)
            finally:
                self._bump_versions(args)
            return None if self._void else result

        return run

    def _checked(self, *args: Any) -> Any:
        return self._cpu(*args, _threads(), False)

    def _bump_versions(self, args: tuple[Any, ...]) -> None:
        """A graph that saved what these tensors held raises in its backward, as in torch."""
        _increment_version([args[i] for i in self._changed if args[i] is not None])

    @property
    def overloads(self) -> list[Any]:
        """The default and the form of each implementation."""
        return [self.default, *self._forms.values()]

    def check(self, **arguments: Any) -> None:
        """Raise TypeError or ValueError unless the arguments are as the op's rules want them."""
        check(self.rules, arguments)

    def attempt(self, *args: Any) -> Any:
        """The result of C++ for unchecked arguments, None if it declined.

        It declines unless all are plain CPU tensors that fit. Only where `direct` was true.
        """
        result = self._cpu(*args, _threads(), True)
        if self._changed and result is not None:
            self._bump_versions(args)
        return result

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """The op, by the dispatcher, or the implementation that is forced."""
        if backend is None and _backends._forced is None:
            return self.default(*args)
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        name = _backends.forced(backend, first.device)
        form = self._forms.get(name)  # type: ignore[arg-type]  # one of the two is not None
        if form is None and name == "cuda":
            form = self._forms.get("triton")
        if form is None:
            there = ", ".join(self._forms)
            raise NotImplementedError(f"{self.name}: no backend {name!r}; there are: {there}")
        return form(*args)


def _on_device(backend: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        _backends.require(backend)
        result = _backends.on_device(implementation, args)
        if result is NotImplemented:
            raise NotImplementedError(f"backend {backend!r} does not take these arguments")
        return result

    return run


def _by_device(triton: Callable[..., Any], cuda: Callable[..., Any] | None) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if cuda is not None and _backends.available("cuda"):
            result = _backends.on_device(cuda, args)
            if result is not NotImplemented:
                return result
        _backends.require("triton")
        return _backends.on_device(triton, args)

    return run
