"""Ops as torch sees them: which implementation runs, and what modes and profilers see, though
plain calls go straight to C++, past the dispatcher.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import pytest
import torch
from ambient import MODE, not_under
from op_calls import NAMES, N, make, mask, normal, outcome, same, segments
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fedmap_sparse as fs
from fedmap_sparse import Mask, _backends, ops
from fedmap_sparse.ops import _library, masked_sgd
from fedmap_sparse.ops._library import OPS, Op

pytestmark = pytest.mark.skipif(_backends.native is None, reason="needs the C++ extension")


class SeesDispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


class Noted(Tensor):
    """A subclass, as a user's own would be; `seen` are the functions called on it."""

    seen: ClassVar[set[str]] = set()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.add(str(func))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(_library, "_bypass", False)


@not_under("meta", reason=MODE)
@pytest.mark.parametrize("name", NAMES)
def test_plain_tensors_go_direct(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **how: Any) -> None:
        raise AssertionError("went through the dispatcher")

    call = make(name)
    monkeypatch.setattr(Op, "__call__", fail)
    outcome(call)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_a_forced_backend_is_the_one_called(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    call, wanted = make(name), outcome(make(name))
    op = OPS[call.op]
    form = op._forms[backend]
    monkeypatch.setattr(_library, "_bypass", False)
    monkeypatch.setitem(op._forms, backend, lambda *a: (called.append(backend), form(*a))[1])
    call.given["backend"] = backend
    assert same(outcome(call), wanted)
    assert called == [backend]


def test_backends_that_cannot_serve_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    m = mask()
    with pytest.raises(ValueError, match="one of reference, cpu, triton, cuda, got 'gpu'"):
        ops.pack(normal(), m, backend="gpu")
    with pytest.raises(ValueError, match="backend 'cpu' serves CPU tensors, got a tensor on meta"):
        ops.pack(normal().to("meta"), m.to("meta"), backend="cpu")
    reason = "triton is not installed (`pip install fedmap-sparse[triton]`)"
    monkeypatch.setattr(_backends, "_missing", lambda name: reason if name == "triton" else "")
    with pytest.raises(RuntimeError, match=r"fedmap-sparse\[triton\].*Available: reference, cpu"):
        ops.pack(normal(), m, backend="triton")
    # What is registered for CUDA tensors, without any: it asks before it launches.
    cuda = torch.ops.fedmap_sparse.pack_out.triton
    with pytest.raises(RuntimeError, match=r"fedmap-sparse\[triton\].*Available: reference, cpu"):
        cuda(normal(), m.words, m.rank, torch.empty(100))


@pytest.mark.parametrize("name", NAMES)
def test_each_device_has_its_kernel(name: str) -> None:
    op = f"fedmap_sparse::{make(name).op}"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(op, "CPU")
    assert has(op, "CUDA") == ("triton" in OPS[make(name).op]._forms)
    assert has(op, "CompositeExplicitAutograd")


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(
    name: str, dispatched: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch checks them."""
    seen: list[tuple[Any, ...]] = []
    call = make(name)
    run = Op.__call__

    def note(self: Op, *args: Any, backend: str | None = None) -> Any:
        seen.append((self, args))
        return run(self, *args, backend=backend)

    dispatched()
    monkeypatch.setattr(Op, "__call__", note)
    call()
    for op, args in seen:
        fresh = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        for form in op.overloads:
            if not str(form).endswith(("triton", "cuda")):
                torch.library.opcheck(form, fresh)


@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_opcheck_of_the_differentiable_forms(name: str) -> None:
    m = mask()
    source, size = (normal(), 100) if name == "pack" else (normal(100), N)
    for form in OPS[name].overloads:
        if not str(form).endswith(("triton", "cuda")):
            torch.library.opcheck(form, (source.requires_grad_(), m.words, m.rank, size))


def test_anyone_may_register_a_kernel_for_another_device() -> None:
    """In a process of its own: a device's name is given once."""
    done = subprocess.run(
        [sys.executable, "-c", _OTHER_DEVICE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["other:0", "1", "2.0"]


_OTHER_DEVICE = """
import torch
from torch.utils import backend_registration
import fedmap_sparse as fs

backend_registration._setup_privateuseone_for_python_backend("other")

class Elsewhere(torch.Tensor):
    @staticmethod
    def __new__(cls, raw):
        device = torch.device("other:0")
        made = torch.Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, device=device)
        made.raw = raw
        return made
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        python = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
        with torch._C._ExcludeDispatchKeyGuard(python):
            return func(*args, **(kwargs or {}))

library = torch.library.Library("fedmap_sparse", "IMPL")
calls = []

def pack_out(source, words, rank, out):
    calls.append(source.device)
    torch.ops.fedmap_sparse.pack_out(source.raw, words.raw, rank.raw, out.raw)

library.impl("pack_out", pack_out, "PrivateUse1")
mask = fs.Mask.from_bool(torch.tensor([True, False, True, False]))
there = fs.Mask(Elsewhere(mask.words), Elsewhere(mask.rank), mask.numel, mask.nnz)
out = Elsewhere(torch.zeros(2))
fs.ops.pack(Elsewhere(torch.tensor([0.0, 1.0, 2.0, 3.0])), there, out=out)
print(calls[0], len(calls), out.raw[1].item())
"""


def profiler() -> AbstractContextManager[Any]:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)


@pytest.mark.parametrize("name", NAMES)
def test_who_watches_sees_the_op(name: str) -> None:
    op = make(name).op
    plain = outcome(make(name))
    for mode in (SeesDispatch(), SeesFunctions()):
        call = make(name)
        with mode:
            result = outcome(call)
        assert same(result, plain)
        assert f"fedmap_sparse.{op}.default" in mode.seen
    call = make(name)
    with profiler() as profile:
        result = outcome(call)
    assert same(result, plain)
    assert f"fedmap_sparse::{op}" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_see_the_op_in_any_argument(name: str) -> None:
    call, plain = make(name), outcome(make(name))
    for key, value in call.given.items():
        fresh = make(name)
        if isinstance(value, Tensor):
            fresh.given[key] = value.as_subclass(Noted)
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            fresh.given[key] = [t.as_subclass(Noted) for t in value]
        elif isinstance(value, Mask):
            words = value.words.as_subclass(Noted)
            fresh.given[key] = Mask(words, value.rank, value.numel, value.nnz)
        else:
            continue
        Noted.seen.clear()
        result = outcome(fresh)
        with torch._C.DisableTorchFunctionSubclass():
            assert same(result, plain)
        assert f"fedmap_sparse.{call.op}.default" in Noted.seen, key


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_in_any_argument_stay_fake_or_are_refused(name: str) -> None:
    from torch._subclasses import FakeTensor, FakeTensorMode
    from torch._subclasses.fake_tensor import DataDependentOutputException

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def faked(value: Any) -> Any:
        if isinstance(value, Tensor):
            return mode.from_tensor(value)
        if isinstance(value, list) and isinstance(value[0], Tensor):
            return [mode.from_tensor(t) for t in value]
        return value

    for key, value in make(name).given.items():
        call = make(name)
        call.given[key] = faked(value)
        if call.given[key] is value:
            continue
        kept = {w: call.given[w].clone() for w in call.written if w != key}
        try:
            result = call()
        except DataDependentOutputException:  # of a result that is a Python number
            result = None
        assert all(torch.equal(call.given[w], k) for w, k in kept.items()), "written from a fake"
        if isinstance(result, Mask):
            assert isinstance(result.words, FakeTensor)


def test_make_fx_traces_the_op() -> None:
    m = mask()
    traced = make_fx(lambda x: ops.pack(x, m))(normal())
    assert "fedmap_sparse.pack_out" in traced.code
    assert torch.equal(traced(normal(seed=7)), ops.pack(normal(seed=7), m))


@pytest.mark.filterwarnings("ignore")  # of its deprecation
def test_jit_trace_traces_the_op() -> None:
    m = mask()
    traced = torch.jit.trace(lambda x: ops.pack(x, m), (normal(),))
    assert torch.equal(traced(normal(seed=7)), ops.pack(normal(seed=7), m))


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.functionalize])
def test_other_transforms_are_refused_as_by_the_op(
    transform: Any, dispatched: Callable[[], None]
) -> None:
    """A step writes in place: an error, or the functional result, never a write past it."""
    m, messages = mask(), []
    argument = normal(3 * N).view(3, N) if transform is torch.func.vmap else normal()
    kept = argument.clone()

    def step(x: Tensor) -> Tensor:
        y = x.clone()
        momentum = torch.ones(100)
        masked_sgd.step_segments_(y, m, [normal()], segments(), momentum_buffer=momentum)
        return y

    for _ in range(2):
        try:
            messages.append(transform(step)(argument).sum().item())
        except RuntimeError as error:
            messages.append(str(error))
        dispatched()
    assert messages[0] == messages[1]
    assert torch.equal(argument, kept)


@not_under("meta", "inference", reason="Dynamo enters neither of them")
@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_sees_the_op(name: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    call = make(name)
    if name == "extract":  # whether a mask is a subset is data
        call.given["mask"] = call.given["parent"]
    compiled = torch.compile(lambda: outcome(call), fullgraph=True, backend=backend)
    result = compiled()
    assert any(f"fedmap_sparse.{call.op}" in code for code in graphs)
    if name != "extract":
        assert same(result, outcome(make(name)))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_versions_of_what_is_written_move(
    name: str, direct: bool, dispatched: Callable[[], None]
) -> None:
    if not direct:
        dispatched()
    call = make(name)
    before = {key: t._version for key, t in call.given.items() if isinstance(t, Tensor)}
    call()
    moved = {key for key, version in before.items() if call.given[key]._version != version}
    assert moved == set(call.written)


def test_backward_over_what_an_op_wrote_raises() -> None:
    weights = normal().requires_grad_()
    loss = (weights * weights).sum()
    ops.zero_pruned_(weights, mask())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_have_no_versions_and_are_written() -> None:
    m = mask()
    with torch.inference_mode():
        values, out = normal(), torch.empty(100)
        ops.pack(values, m, out=out)
        assert torch.equal(out, ops.pack(values, m, backend="reference"))


@pytest.mark.parametrize("name", NAMES)
def test_negated_views_are_read_as_what_they_stand_for(name: str) -> None:
    """The imaginary part of a conjugate has its memory's values negated; DLPack does not say so."""
    for key, value in make(name).given.items():
        if key in make(name).written:
            continue
        call, wanted = make(name), make(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            call.given[key], wanted.given[key] = torch._neg_view(value), -value
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            call.given[key] = [torch._neg_view(t) for t in value]
            wanted.given[key] = [-t for t in value]
        else:
            continue
        assert same(outcome(call), outcome(wanted)), key


def test_an_optimizer_reads_negated_gradients_right() -> None:
    results = []
    for negate in (torch._neg_view, torch.neg):
        torch.manual_seed(0)
        model = torch.nn.Linear(20, 10)
        flat = fs.flatten(model)
        optimizer = fs.optim.MaskedSGD(flat, lr=0.5)
        for p in model.parameters():
            p.grad = negate(torch.ones_like(p))
        optimizer.step()
        results.append(flat.values.clone())
    assert torch.equal(results[0], results[1])


def test_a_torch_without_what_direct_asks_goes_through_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`direct` is true for plain tensors, so the private APIs that it asks exist in this torch."""
    direct = _library.direct
    assert direct(normal(), None)
    assert direct(normal(), "cpu")
    assert not direct(normal(), "reference")
    assert not direct([normal()], None)
    monkeypatch.setattr(_backends, "_forced", "reference")
    assert not direct(normal(), None)
    assert direct(normal(), "cpu")
