"""The rules for arguments stand twice: in Python, which says what is wrong, and in C++, which looks
at unchecked arguments. Both refuse whatever breaks a rule, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ambient import MODE, not_under
from op_calls import NAMES, Call, make, mask, normal, outcome, same, segments
from torch import Tensor

from fedmap_sparse import Mask, _backends
from fedmap_sparse.ops import _library, _rules, _segments
from fedmap_sparse.ops._library import OPS, Op

pytestmark = pytest.mark.skipif(_backends.native is None, reason="fedmap_sparse._native is missing")

ALL = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int8)


class Declined(Exception):
    """C++ did not take the arguments."""


def bent(t: Tensor) -> Tensor:
    """The same elements, not side by side."""
    return torch.stack([t, t], -1)[..., 0]


def broken_tensors(
    t: Tensor, dtypes: Any, sized: bool, placed: bool = True
) -> Iterator[tuple[str, Any]]:
    yield "a string", "a string"
    for dtype in ALL:
        if dtype not in dtypes:
            yield f"of {dtype}", t.to(dtype)
    yield "strided", bent(t)
    yield "sparse", t.to(torch.float32).to_sparse()
    if placed:
        yield "on meta", t.to("meta")
    if sized:
        yield "longer", torch.cat([t, t[:1]])
        yield "shorter", t[:-1].clone()


def broken_masks(m: Mask, sized: bool, placed: bool) -> Iterator[tuple[str, Any]]:
    yield "a string", "a string"
    if sized:
        yield "longer", mask(n=m.numel + 1, keep=m.nnz)
        yield "of a word more", mask(n=m.numel + 32, keep=m.nnz)
    if placed:
        yield "on meta", m.to("meta")


def violations(call: Call) -> Iterator[tuple[str, str, Any]]:
    """(argument, what is wrong with it, a value) for each way to break a rule of the op."""
    for rule in OPS[call.op].rules:
        value = call.given.get(rule.name)
        match rule:
            case _rules.Dense():
                if value is None:  # masters of float32 values
                    value = torch.zeros(100)
                if not rule.optional:
                    yield rule.name, "None", None
                others = [r for r in OPS[call.op].rules if not isinstance(r, _rules.Number)]
                sized, placed = rule.numel is not None, len(others) > 1
                for what, bad in broken_tensors(value, rule.dtypes, sized, placed):
                    yield rule.name, what, bad
            case _rules.Bitmap():
                if not rule.optional:
                    yield rule.name, "None", None
                placed = bool(rule.beside)
                for what, bad in broken_masks(value, rule.numel is not None, placed):
                    yield rule.name, what, bad
            case _rules.Alike(sized=True):
                if not rule.beside:
                    yield rule.name, "none", []
                for what, bad in broken_tensors(value[0], rule.dtypes, True):
                    yield rule.name, f"second {what}", [value[0], bad]
                    if what != "on meta":
                        yield rule.name, f"first {what}", [bad, value[1]]
                yield rule.name, "second of float16", [value[0], value[1].half()]
            case _rules.Alike():
                for what, bad in broken_tensors(value, torch_floats(), False):
                    yield rule.name, what, bad
                yield rule.name, "None", None
            case _rules.Bitmaps():
                for what, bad in broken_masks(value, True, True):
                    yield rule.name, what, bad
            case _rules.Keep():
                for bad in (-1, call.given["within"].nnz + 1, True, 2.0, None, "2"):
                    yield rule.name, repr(bad), bad
                if rule.least:
                    yield rule.name, "0", 0
            case _rules.Trim():
                for bad in (-1, len(call.given[rule.of]), 2**70, True, 1.0, None, "1"):
                    yield rule.name, repr(bad), bad
            case _rules.Weight(many=True):
                for bad in ([1], [1, 2, 3], [1, 0], [-1, 1], [1, torch.inf], [torch.nan, 1],
                            [1, torch.nan], [True, 1], [1, "2"]):  # fmt: skip
                    yield rule.name, repr(bad), bad
            case _rules.Weight():
                for bad in (0, -1.0, torch.inf, torch.nan, True, "2"):
                    yield rule.name, repr(bad), bad
            case _rules.Number():
                outside = [b - 1 for b in (rule.least, rule.above) if b is not None]
                above = [rule.above] if rule.above is not None else []
                below = [int(rule.below)] if rule.below is not None else []
                for bad in (True, "2", None, torch.inf, torch.nan, *outside, *above, *below):
                    yield rule.name, repr(bad), bad
                if rule.whole:
                    yield rule.name, "1.0", 1.0
            case _rules.Block():
                for bad in (0, 32, 65, 1088, -64, True, 64.0):
                    yield rule.name, repr(bad), bad
            case _segments.Gradients():
                grad = value[0]
                yield rule.name, "none", []
                yield rule.name, "two", [grad, grad]
                for what, bad in broken_tensors(grad, (torch.float32,), True):
                    yield rule.name, what, [bad]
                yield "segments", "shorter", segments(numel=grad.numel() - 8)
            case _segments.Within():
                yield "values", "shorter than the mask", normal(call.given["mask"].numel - 8)
            case _segments.Masters():
                yield "values", "float16 without masters", call.given["values"].half()
            case _:
                assert rule.name == "max_exp_avg_sq", f"no violations of {rule}"
                yield rule.name, "None", None


def torch_floats() -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.float16, torch.bfloat16)


CASES = [
    pytest.param(name, number, id=f"{name}: {argument} {what}")
    for name in NAMES
    for number, (argument, what, _) in enumerate(violations(make(name)))
]


def violate(name: str, number: int) -> tuple[Call, dict[str, Any], dict[str, Tensor]]:
    call = make(name)
    argument, _, bad = list(violations(call))[number]
    kept = {w: call.given[w].clone() for w in call.written if w != argument}
    return call, {argument: bad}, kept


def unchanged(call: Call, kept: dict[str, Tensor]) -> bool:
    return all(torch.equal(call.given[w], t) for w, t in kept.items())


@pytest.mark.parametrize(("name", "number"), CASES)
def test_both_refuse_what_breaks_a_rule(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, changes, kept = violate(name, number)
    with monkeypatch.context() as patch:  # Python alone
        patch.setattr(_library, "_bypass", False)
        with pytest.raises((TypeError, ValueError)) as alone:
            call(**changes)
        assert unchanged(call, kept)
    with pytest.raises((TypeError, ValueError)) as both:
        call(**changes)
    assert (both.type, str(both.value)) == (alone.type, str(alone.value))
    assert unchanged(call, kept)

    def declined(*args: Any, **how: Any) -> None:
        raise Declined

    # C++ alone: without Python's checks nothing reaches a kernel, it is left to the dispatcher.
    monkeypatch.setattr(Op, "check", lambda self, **given: None)
    monkeypatch.setattr(_segments, "check_gradients", lambda grads, *rest: grads)
    monkeypatch.setattr(Op, "__call__", declined)
    # Or what Python meets on the way: the size of what is no tensor, a division by a block of 0.
    with pytest.raises(Exception):  # noqa: B017, PT011  # the point is that nothing was written
        call(**changes)
    assert unchanged(call, kept)


@not_under("meta", reason=MODE)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", torch_floats(), ids=str)
def test_both_take_what_the_rules_allow(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C++ alone, then Python and the dispatcher: the same results for each dtype."""

    def converted() -> Call:
        call = make(name)
        floats = {
            r.name for r in OPS[call.op].rules if getattr(r, "dtypes", None) == torch_floats()
        }
        for key in {"values", "packed", "payload"} & call.given.keys():
            if key in floats or name in ("select", "threshold"):
                call.given[key] = call.given[key].to(dtype)
        for key in {"grads", "payloads"} & call.given.keys():
            call.given[key] = [t.to(dtype) for t in call.given[key]]
        if "master" in call.given and dtype != torch.float32:
            call.given["master"] = torch.zeros(100)
        return call

    def fail(*args: Any, **how: Any) -> None:
        raise AssertionError("C++ declined what the rules allow")

    call = converted()
    with monkeypatch.context() as patch:
        patch.setattr(Op, "__call__", fail)
        direct = outcome(call)
    monkeypatch.setattr(_library, "_bypass", False)
    assert same(direct, outcome(converted()))


def test_every_op_has_a_call() -> None:
    reached = {make(name).op for name in NAMES}
    assert reached | {"pack", "unpack"} == set(OPS)


def test_averages_are_no_option() -> None:
    for name in ("exp_avg", "exp_avg_sq"):
        with pytest.raises(TypeError, match=f"{name}: expected a torch.Tensor"):
            make("adamw")(**{name: None})
