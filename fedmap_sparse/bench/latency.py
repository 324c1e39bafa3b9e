"""What a call costs before any work: each op on 1,000 elements, beside an op that does nothing.

The floor of these records is an empty op of `Library.define`; what counts is the time beyond it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from fedmap_sparse.bench import cases, steps
from fedmap_sparse.bench.case import Setting, Trial, case

SIZE = 1000
CALLS = 200

_TIMED: dict[str, Callable[[Setting], Trial]] = {
    "select": cases.select,
    "pack": cases.pack,
    "unpack": cases.unpack,
    "extract": cases.extract,
    "deposit": cases.deposit,
    "masked_sgd": steps.masked_sgd,
    "masked_adamw": steps.masked_adamw,
    "accumulate": lambda s: cases.accumulate(replace(s, clients=2)),
}


#: A library unregisters its ops when it is collected.
_libraries: list[torch.library.Library] = []


@cache
def empty_op() -> Callable[[Any], None]:
    library = torch.library.Library("fedmap_sparse_bench", "FRAGMENT")
    library.define("empty(Tensor x) -> ()")
    library.impl("empty", lambda x: None, "CompositeExplicitAutograd")
    _libraries.append(library)
    op: Callable[[Any], None] = torch.ops.fedmap_sparse_bench.empty.default
    return op


def _register(name: str, build: Callable[[Setting], Trial]) -> None:
    @case(f"latency_{name}", densities=(0.1,), devices=("cpu",), group="latency", fixed_n=SIZE)
    def trial(s: Setting) -> Trial:
        empty, argument = empty_op(), torch.zeros(SIZE)
        return replace(
            build(s),
            peers={},
            floor=lambda: empty(argument),
            calls=CALLS,
            state_bytes=None,
            clients=None,
        )


for _name, _build in _TIMED.items():
    _register(_name, _build)
