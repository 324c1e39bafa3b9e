"""The vectors that the native self-check reads too: references and C++ give the bytes in them."""

from __future__ import annotations

from typing import Any

import pytest
from stored_messages import module

op_vectors = module("op_vectors")
VECTORS = list(op_vectors.read())
NAMES = [f"{number}-{op}" for number, (op, _, _) in enumerate(VECTORS, 1)]


def check(op: str, given: dict[str, Any], wanted: dict[str, Any], backend: str) -> None:
    got = op_vectors.RUNS[op](given, backend)
    assert {name: op_vectors.spelled(value) for name, value in got.items()} == {
        name: op_vectors.spelled(value) for name, value in wanted.items()
    }


@pytest.mark.parametrize(("op", "given", "wanted"), VECTORS, ids=NAMES)
def test_references(op: str, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    check(op, given, wanted, "reference")


@pytest.mark.parametrize(("op", "given", "wanted"), VECTORS, ids=NAMES)
def test_every_level(isa: str, op: str, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    check(op, given, wanted, "cpu")


def test_each_op_has_a_vector() -> None:
    assert {op for op, _, _ in VECTORS} == set(op_vectors.RUNS)
