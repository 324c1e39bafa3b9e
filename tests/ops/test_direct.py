"""Calls that go straight to C++, past torch's dispatcher: results and errors are those of the op,
and whoever wants to see the op sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fedmap_sparse as fs
from fedmap_sparse import Mask, _backends, ops

pytestmark = pytest.mark.skipif(_backends.native is None, reason="needs the C++ extension")

N = 1000


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


@dataclass
class Call:
    """One op on fresh arguments: `run(**given)`; `written` are those that it changes."""

    op: str
    run: Callable[..., Any]
    given: dict[str, Any]
    written: tuple[str, ...] = ()
    bad: dict[str, list[Any]] = field(default_factory=dict)

    def __call__(self, **changes: Any) -> Any:
        return self.run(**(self.given | changes))


def mask(seed: int = 1, keep: int = 100, n: int = N, within: Mask | None = None) -> Mask:
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return ops.magnitude_mask(values, keep, within=within, backend="reference")


def normal(n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


OTHER_FLOATS: list[Any] = [
    None,
    "a string",
    torch.zeros(N, dtype=torch.float64),
    torch.zeros(N, dtype=torch.int32),
    torch.zeros(2 * N)[::2],
    torch.zeros(N, device="meta"),
    torch.zeros(N + 1),
    torch.zeros(N).to_sparse(),
]
OTHER_MASKS: list[Any] = [None, "a string", mask(n=N + 1), mask(keep=99).to("meta")]
PACKED: list[Any] = [
    torch.zeros(99),
    torch.zeros(100, dtype=torch.int64),
    torch.zeros(100, dtype=torch.float16),
    torch.zeros(200)[::2],
    torch.zeros(100, device="meta"),
]


def sgd(**given: Any) -> None:
    ops.masked_sgd_(given.pop("values"), given.pop("mask"), given.pop("grads"), **given)


def adamw(**given: Any) -> None:
    ops.masked_adamw_(given.pop("values"), given.pop("mask"), given.pop("grads"), **given)


def segments(flags: int = 0, numel: int = N) -> Any:
    table = ops.Segments([0], [numel])
    table.scalars[0, :7] = torch.tensor([0.1, 0.9, 0.99, 1e-8, 0.01, 0.9, 0.99])
    table.rows[0, 3] = flags
    return table


def calls() -> dict[str, Call]:
    """Every op that goes direct. Arguments are made anew: calls change them."""
    values, m = normal(), mask()
    child = mask(seed=2, keep=40, within=m)
    packed = ops.pack(values, m, backend="reference")
    step = {"values": values.clone(), "mask": m, "grads": [normal(seed=3)]}
    bad_step = {
        "values": [*OTHER_FLOATS, torch.zeros(N - 8), torch.zeros(N, dtype=torch.float16)],
        "mask": OTHER_MASKS,
        "grads": [[], [None, None], *[[g] for g in OTHER_FLOATS[1:]]],
        "segments": [segments(numel=N - 8)],
        "master": PACKED,
    }
    return {
        "select": Call(
            "magnitude_mask",
            ops.magnitude_mask,
            {"values": values, "keep": 40, "within": m},
            bad={
                "values": OTHER_FLOATS,
                "keep": [-1, 101, True, 2.0, None],
                "within": OTHER_MASKS[1:],
            },
        ),
        "pack": Call(
            "pack_out",
            ops.pack,
            {"values": values, "mask": m, "out": torch.zeros(100)},
            ("out",),
            {"values": OTHER_FLOATS, "mask": OTHER_MASKS, "out": [*PACKED[:2], *PACKED[3:]]},
        ),
        "unpack": Call(
            "unpack_out",
            ops.unpack,
            {"packed": packed, "mask": m, "out": torch.zeros(N)},
            ("out",),
            {"packed": [*OTHER_FLOATS, *PACKED[:2]], "mask": OTHER_MASKS, "out": OTHER_FLOATS[1:]},
        ),
        "extract": Call(
            "extract",
            ops.extract,
            {"child": child, "parent": m},
            bad={"child": [*OTHER_MASKS, mask(seed=5)], "parent": OTHER_MASKS},
        ),
        "deposit": Call(
            "deposit",
            ops.deposit,
            {"kept": ops.extract(child, m, backend="reference"), "parent": m},
            bad={"kept": [*OTHER_MASKS, m], "parent": [None, "a string", mask(keep=99)]},
        ),
        "mean": Call(
            "weighted_mean_out",
            ops.weighted_mean,
            {"payloads": [normal(), normal(seed=1)], "weights": [1, 2.5], "out": torch.zeros(N)},
            ("out",),
            {
                "payloads": [
                    [],
                    [normal()],
                    [normal(), normal().half()],
                    *[[normal(), p] for p in OTHER_FLOATS],
                ],
                "weights": [[1], [1, 0], [1, torch.inf], [True, 1], [1, "2"]],
                "out": OTHER_FLOATS[1:],
            },
        ),
        "sgd": Call(
            "masked_sgd_",
            sgd,
            {**step, "segments": segments(), "momentum_buffer": torch.ones(100), "master": None},
            ("values", "momentum_buffer"),
            bad_step | {"momentum_buffer": PACKED},
        ),
        "adamw": Call(
            "masked_adamw_",
            adamw,
            {
                **step,
                "segments": segments(ops.adamw_flags(amsgrad=True)),
                "exp_avg": torch.ones(100),
                "exp_avg_sq": torch.ones(100),
                "max_exp_avg_sq": torch.ones(100),
                "master": None,
            },
            ("values", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
            bad_step | {"exp_avg": PACKED, "exp_avg_sq": PACKED, "max_exp_avg_sq": [None, *PACKED]},
        ),
    }


NAMES = list(calls())


def outcome(call: Call) -> list[Any]:
    """What a call returns and changes."""
    result = call()
    changed = [call.given[name] for name in call.written]
    if isinstance(result, Mask):
        return [result.numel, result.nnz, result.words, result.rank, *changed]
    return changed


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(_backends, "_direct", False)


@pytest.mark.parametrize("name", NAMES)
def test_plain_tensors_go_direct(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("went through the dispatcher")

    call = calls()[name]
    for stem, names in {
        "select": ["_mask_op"],
        "pack": ["_pack_op", "_pack_out_op", "_unpack_op", "_unpack_out_op"],
        "extract": ["_extract_op", "_deposit_op"],
        "accumulate": ["_mean_op"],
        "masked_sgd": ["op"],
        "masked_adamw": ["op"],
    }.items():
        for op in names:
            monkeypatch.setattr(import_module(f"fedmap_sparse.ops.{stem}"), op, fail)
    outcome(call)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_results_are_those_of_the_op(
    name: str, dtype: torch.dtype, dispatched: Callable[[], None]
) -> None:
    def converted() -> Call:
        call = calls()[name]
        for key in ("values", "packed"):
            if key in call.given:
                call.given[key] = call.given[key].to(dtype)
        for key in ("grads", "payloads"):
            if key in call.given:
                call.given[key] = [t.to(dtype) for t in call.given[key]]
        if "master" in call.given and dtype != torch.float32:
            call.given["master"] = torch.zeros(100)
        return call

    direct = outcome(converted())
    dispatched()
    assert same(direct, outcome(converted()))


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_the_checks(name: str, dispatched: Callable[[], None]) -> None:
    cases = [(key, index) for key, bad in calls()[name].bad.items() for index in range(len(bad))]
    messages = []
    for _ in range(2):
        for key, index in cases:
            call = calls()[name]
            kept = {w: call.given[w].clone() for w in call.written}
            with pytest.raises((TypeError, ValueError)) as caught:
                call(**{key: call.bad[key][index]})
            messages.append((caught.type, str(caught.value)))
            assert all(torch.equal(call.given[w], kept[w]) for w in call.written)
        dispatched()
    assert messages[: len(cases)] == messages[len(cases) :]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_16_bit_values_want_masters(name: str) -> None:
    call = calls()[name]
    halves = {"values": call.given["values"].half(), "grads": [normal().half()]}
    before = halves["values"].clone()
    with pytest.raises(ValueError, match="master: expected float32 master copies"):
        call(**halves)
    assert torch.equal(halves["values"], before)


def test_averages_are_no_option() -> None:
    for name in ("exp_avg", "exp_avg_sq"):
        with pytest.raises(ValueError, match="dtypes and sizes agree"):
            calls()["adamw"](**{name: None})


def profiler() -> AbstractContextManager[Any]:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)


@pytest.mark.parametrize("name", NAMES)
def test_who_watches_sees_the_op(name: str) -> None:
    op = calls()[name].op
    plain = outcome(calls()[name])
    for mode in (SeesDispatch(), SeesFunctions()):
        call = calls()[name]
        with mode:
            result = outcome(call)
        assert same(result, plain)
        assert f"fedmap_sparse.{op}.default" in mode.seen
    call = calls()[name]
    with profiler() as profile:
        result = outcome(call)
    assert same(result, plain)
    assert f"fedmap_sparse::{op}" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_see_the_op_in_any_argument(name: str) -> None:
    call, plain = calls()[name], outcome(calls()[name])
    for key, value in call.given.items():
        fresh = calls()[name]
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

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def faked(value: Any) -> Any:
        if isinstance(value, Tensor):
            return mode.from_tensor(value)
        if isinstance(value, list) and isinstance(value[0], Tensor):
            return [mode.from_tensor(t) for t in value]
        return value

    for key, value in calls()[name].given.items():
        call = calls()[name]
        call.given[key] = faked(value)
        if call.given[key] is value:
            continue
        kept = {w: call.given[w].clone() for w in call.written if w != key}
        result = call()
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


@pytest.mark.parametrize(
    ("transform", "argument"),
    [
        (lambda f: torch.func.vmap(f), normal(3 * N).view(3, N)),
        (lambda f: torch.func.grad(lambda x: f(x).sum()), normal()),
        (torch.func.functionalize, normal()),
    ],
    ids=["vmap", "grad", "functionalize"],
)
def test_transforms_are_refused_as_by_the_op(
    transform: Any, argument: Tensor, dispatched: Callable[[], None]
) -> None:
    """The ops have no rules for them: an error, not a write past the transform."""
    m, messages = mask(), []

    def zero(x: Tensor) -> Tensor:
        y = x.clone()
        ops.masked_sgd_(y, m, [normal()], segments(), momentum_buffer=torch.ones(100))
        return y

    for _ in range(2):
        for function in (lambda x: ops.pack(x, m), zero):
            try:
                transform(function)(argument)
                messages.append("")
            except RuntimeError as error:
                messages.append(str(error))
        dispatched()
    assert messages[0]
    assert messages[:2] == messages[2:]


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_sees_the_op(name: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    call = calls()[name]
    if name == "extract":  # whether a child is a subset is data
        call.given["child"] = call.given["parent"]
    compiled = torch.compile(lambda: outcome(call), fullgraph=True, backend=backend)
    result = compiled()
    assert any(f"fedmap_sparse.{call.op}" in code for code in graphs)
    if name != "extract":
        assert same(result, outcome(calls()[name]))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_versions_of_what_is_written_move(
    name: str, direct: bool, dispatched: Callable[[], None]
) -> None:
    if not direct:
        dispatched()
    call = calls()[name]
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


def test_gradients_pass_through_pack_and_unpack() -> None:
    m = mask()
    values = normal().requires_grad_()
    ops.unpack(ops.pack(values, m), m).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, m.to_bool().float())
    with torch.no_grad():
        assert not ops.pack(values, m).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_negated_views_are_read_as_what_they_stand_for(name: str) -> None:
    """The imaginary part of a conjugate has its memory's values negated; DLPack does not say so."""
    for key, value in calls()[name].given.items():
        if key in calls()[name].written:
            continue
        call, wanted = calls()[name], calls()[name]
        if isinstance(value, Tensor):
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
    """`direct` is true for plain tensors, so its private questions exist in this torch."""
    assert _backends.direct(None, normal())
    assert _backends.direct("cpu", normal())
    assert not _backends.direct("reference", normal())
    monkeypatch.setattr(_backends, "_forced", "reference")
    assert not _backends.direct(None, normal())
    assert _backends.direct("cpu", normal())
