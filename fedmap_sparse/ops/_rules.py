"""Rules for arguments: what each argument of an op has to be, and the errors that say so.

Each op's file lists its rules in the order in which they are checked. C++ holds the same for plain
CPU tensors (csrc/bindings) without saying what is wrong; tests/ops/test_rules.py breaks each rule
and sees that both refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fedmap_sparse import _checks
from fedmap_sparse.mask import check_mask

#: The arguments of a public function by name.
Arguments = Mapping[str, Any]
Size = Callable[[Arguments], int]

FLOAT32 = (torch.float32,)


class Rule(Protocol):
    """Something that one argument has to be."""

    @property
    def name(self) -> str: ...
    def check(self, given: Arguments) -> None: ...


def check(rules: Sequence[Rule], given: Arguments) -> None:
    """Raise TypeError or ValueError at the first rule that does not hold."""
    for rule in rules:
        rule.check(given)


@dataclass(frozen=True)
class Dense:
    """A contiguous tensor.

    Attributes:
        name: of the argument.
        dtypes: those it may have.
        numel: its size; None: any.
        why: what that size is, for the message.
        beside: the argument, a tensor or a mask, whose device it shares.
        optional: whether it may be None.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = _checks.FLOAT_DTYPES
    numel: Size | None = None
    why: str = "the size of the result"
    beside: str = ""
    optional: bool = False

    def check(self, given: Arguments) -> None:
        value = given[self.name]
        if value is None and self.optional:
            return
        _checks.check_tensor(self.name, value, self.dtypes)
        if self.numel is not None:
            _checks.check_numel(self.name, value, self.numel(given), self.why)
        if self.beside:
            _checks.check_device(self.name, value, given[self.beside].device)


@dataclass(frozen=True)
class Bitmap:
    """A Mask, of `numel` elements (None: of any number), on the device of `beside`."""

    name: str
    numel: Size | None = None
    beside: str = ""
    optional: bool = False

    def check(self, given: Arguments) -> None:
        value = given[self.name]
        if value is None and self.optional:
            return
        check_mask(self.name, value, None if self.numel is None else self.numel(given))
        if self.beside:
            _checks.check_device(self.name, value.words, given[self.beside].device)


@dataclass(frozen=True)
class Alike:
    """A list of contiguous tensors of one dtype and device, and of one size if `sized`.

    They are as the first tensor of `beside`, another list; without it, as their own first.
    """

    name: str
    sized: bool = False
    dtypes: tuple[torch.dtype, ...] = _checks.FLOAT_DTYPES
    beside: str = ""

    def check(self, given: Arguments) -> None:
        tensors = given[self.name]
        for t in tensors:
            _checks.check_tensor(self.name, t, self.dtypes)
            first = given[self.beside or self.name][0]
            if t.dtype != first.dtype:
                wanted, got = _checks.short(first.dtype), _checks.short(t.dtype)
                raise TypeError(f"{self.name}: expected one dtype, {wanted}, got {got}")
            if self.sized:
                _checks.check_numel(self.name, t, first.numel(), "the size of the first")
            _checks.check_device(self.name, t, first.device)


@dataclass(frozen=True)
class Bitmaps:
    """A list of masks or None, one per tensor of `of` and over as many elements."""

    name: str
    of: str

    def check(self, given: Arguments) -> None:
        masks, tensors = given[self.name], given[self.of]
        if len(masks) != len(tensors):
            raise ValueError(
                f"{self.name}: expected {len(tensors)} masks, one per tensor, got {len(masks)}"
            )
        for mask, t in zip(masks, tensors, strict=True):
            if mask is not None:
                check_mask(self.name, mask, t.numel())
                _checks.check_device(self.name, mask.words, t.device)


@dataclass(frozen=True)
class Keep:
    """The number of survivors wanted: at least `least`, at most what is eligible."""

    name: str = "keep"
    least: int = 0

    def check(self, given: Arguments) -> None:
        keep = given[self.name]
        if isinstance(keep, bool) or not isinstance(keep, int | torch.SymInt):
            raise TypeError(f"keep: expected an int, got {type(keep).__name__}")
        eligible = sum(
            t.numel() if m is None else m.nnz
            for t, m in zip(given["values"], given["within"], strict=True)
        )
        if not self.least <= keep <= eligible:
            raise ValueError(f"keep: expected {self.least} <= keep <= {eligible}, got {keep}")


@dataclass(frozen=True)
class Trim:
    """How many of `of` are left out at each end: fewer than half."""

    name: str = "trim"
    of: str = "vectors"

    def check(self, given: Arguments) -> None:
        trim, count = given[self.name], len(given[self.of])
        if isinstance(trim, bool) or not isinstance(trim, int | torch.SymInt):
            raise TypeError(f"{self.name}: expected an int, got {type(trim).__name__}")
        if not 0 <= 2 * trim < count:
            most = (count - 1) // 2
            raise ValueError(
                f"{self.name}: expected 0 <= {self.name} <= {most} of {count} {self.of}, got {trim}"
            )


@dataclass(frozen=True)
class Weight:
    """A finite number above 0, or a list of them, one per payload."""

    name: str
    many: bool = False

    def check(self, given: Arguments) -> None:
        value = given[self.name]
        for weight in value if self.many else [value]:
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise TypeError(f"weight: expected a number, got {type(weight).__name__}")
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"weight: expected a finite number above 0, got {weight}")


@dataclass(frozen=True)
class Block:
    """How many values share a scale: a multiple of 64 from 64 to 1024."""

    name: str = "block"

    def check(self, given: Arguments) -> None:
        block = given[self.name]
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"block: expected an int, got {type(block).__name__}")
        if not 64 <= block <= 1024 or block % 64:
            raise ValueError(f"block: expected a multiple of 64 from 64 to 1024, got {block}")


@dataclass(frozen=True)
class Number:
    """A finite number in a range; an int if it is `whole`."""

    name: str
    least: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False

    def check(self, given: Arguments) -> None:
        value = given[self.name]
        kinds = int if self.whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds):
            wanted = "an int" if self.whole else "a number"
            raise TypeError(f"{self.name}: expected {wanted}, got {type(value).__name__}")
        bounds = {"at least": self.least, "above": self.above, "below": self.below}
        holds = (
            -math.inf < value < math.inf,
            self.least is None or value >= self.least,
            self.above is None or value > self.above,
            self.below is None or value < self.below,
        )
        if not all(holds):
            wanted = " and ".join(f"{w} {b}" for w, b in bounds.items() if b is not None)
            raise ValueError(f"{self.name}: expected a finite number {wanted}, got {value}")
