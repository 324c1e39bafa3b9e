"""Every public op on small arguments, for the tests that go over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import Mask, ops
from fedmap_sparse.ops import masked_adamw, masked_sgd
from fedmap_sparse.ops._segments import Segments

N = 1000

#: The public names of `fedmap_sparse.ops`. One more or less is a decision, for the changelog too.
PUBLIC = [
    "Accumulator",
    "add_gaussian_",
    "all_finite",
    "cast",
    "clip_difference_",
    "deposit",
    "dequantize_int8",
    "extract",
    "from_fixed",
    "magnitude_mask",
    "magnitude_threshold",
    "masked_adamw_",
    "masked_sgd_",
    "pack",
    "prune_",
    "quantize_int8",
    "squared_distances",
    "to_fixed",
    "trimmed_mean",
    "unpack",
    "weighted_mean",
    "zero_pruned_",
]


@dataclass
class Call:
    """One op on fresh arguments: `run(**given)`.

    Attributes:
        op: the name of the torch op that it reaches.
        given: the arguments.
        written: those that it changes.
    """

    op: str
    run: Callable[..., Any]
    given: dict[str, Any]
    written: tuple[str, ...] = ()

    def __call__(self, **changes: Any) -> Any:
        return self.run(**(self.given | changes))


@cache
def mask(seed: int = 1, keep: int = 100, n: int = N, within: Mask | None = None) -> Mask:
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return ops.magnitude_mask(values, keep, within=within, backend="reference")


def child() -> Mask:
    return mask(seed=2, keep=40, within=mask())


def normal(n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def segments(flags: int = 0, numel: int = N) -> Segments:
    table = Segments([0], [numel])
    table.scalars[0, :7] = torch.tensor([0.1, 0.9, 0.99, 1e-8, 0.01, 0.9, 0.99])
    table.rows[0, 3] = flags
    return table


def add(sums: Tensor, payload: Tensor, weight: float, backend: str | None = None) -> None:
    accumulator = ops.Accumulator(sums.numel(), backend=backend)
    accumulator.sums = sums
    accumulator.add(payload, weight)


def mean(sums: Tensor, out: Tensor, backend: str | None = None) -> Tensor:
    accumulator = ops.Accumulator(sums.numel(), backend=backend)
    accumulator.sums, accumulator.total = sums, 3.0
    return accumulator.mean(out=out)


_AVERAGES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _selected() -> dict[str, Any]:
    return {"values": normal(), "keep": 40, "within": mask()}


def _step(flags: int, *states: str) -> dict[str, Any]:
    given = {"values": normal(), "mask": mask(), "grads": [normal(seed=3)]}
    return {
        **given,
        "segments": segments(flags),
        **{name: torch.ones(100) for name in states},
        "master": None,
    }


_MAKERS: dict[str, Callable[[], Call]] = {
    "select": lambda: Call("magnitude_mask", ops.magnitude_mask, _selected()),
    "threshold": lambda: Call("magnitude_threshold", ops.magnitude_threshold, _selected()),
    "zero": lambda: Call(
        "zero_pruned_",
        ops.zero_pruned_,
        {"values": normal(), "mask": child(), "before": mask()},
        ("values",),
    ),
    "pack": lambda: Call(
        "pack_out",
        ops.pack,
        {"values": normal(), "mask": mask(), "out": torch.zeros(100)},
        ("out",),
    ),
    "unpack": lambda: Call(
        "unpack_out",
        ops.unpack,
        {"packed": normal(100), "mask": mask(), "out": torch.zeros(N)},
        ("out",),
    ),
    "extract": lambda: Call("extract", ops.extract, {"mask": child(), "parent": mask()}),
    "deposit": lambda: Call(
        "deposit", ops.deposit, {"bits": mask(keep=40, n=100), "parent": mask()}
    ),
    "mean": lambda: Call(
        "weighted_mean_out",
        ops.weighted_mean,
        {"payloads": [normal(), normal(seed=1)], "weights": [1, 2.5], "out": torch.zeros(N)},
        ("out",),
    ),
    "add": lambda: Call(
        "accumulate_add_",
        add,
        {"sums": torch.zeros(N, dtype=torch.float64), "payload": normal(), "weight": 2.0},
        ("sums",),
    ),
    "round": lambda: Call(
        "accumulate_mean_out",
        mean,
        {"sums": normal().double(), "out": torch.zeros(N)},
        ("out",),
    ),
    "trimmed": lambda: Call(
        "trimmed_mean_out",
        ops.trimmed_mean,
        {"vectors": [normal(seed=s) for s in range(3)], "trim": 1, "out": torch.zeros(N)},
        ("out",),
    ),
    "distances": lambda: Call(
        "squared_distances",
        ops.squared_distances,
        {"vectors": [normal(), normal(seed=1)], "others": [normal(seed=2), normal(seed=3)]},
    ),
    "cast": lambda: Call(
        "cast_out",
        lambda values, out, **how: ops.cast(values, torch.float16, out=out, **how),
        {"values": normal(), "out": torch.zeros(N, dtype=torch.float16)},
        ("out",),
    ),
    "finite": lambda: Call("all_finite", ops.all_finite, {"values": normal()}),
    "quantize": lambda: Call(
        "quantize_int8_out",
        ops.quantize_int8,
        {"values": normal(), "block": 128, "residual": torch.zeros(N)},
        ("residual",),
    ),
    "dequantize": lambda: Call(
        "dequantize_int8",
        ops.dequantize_int8,
        {"q": torch.arange(N).to(torch.int8), "scales": normal(4), "block": 256},
    ),
    "clip": lambda: Call(
        "clip_difference_",
        ops.clip_difference_,
        {"values": normal(), "start": normal(seed=1), "max_norm": 1.0},
        ("values",),
    ),
    "noise": lambda: Call(
        "add_gaussian_",
        ops.add_gaussian_,
        {"values": normal(), "std": 0.5, "seed": 7, "stream": 2},
        ("values",),
    ),
    "to_fixed": lambda: Call(
        "to_fixed_out",
        ops.to_fixed,
        {"values": normal(), "clip": 2.0, "scale": 1000.0, "weight": 3},
    ),
    "from_fixed": lambda: Call(
        "from_fixed",
        ops.from_fixed,
        {"sums": (1000 * normal()).to(torch.int32), "divisor": 3000.0},
    ),
    "sgd": lambda: Call(
        "masked_sgd_",
        masked_sgd.step_segments_,
        _step(0, "momentum_buffer"),
        ("values", "momentum_buffer"),
    ),
    "adamw": lambda: Call(
        "masked_adamw_",
        masked_adamw.step_segments_,
        _step(masked_adamw.adamw_flags(amsgrad=True), *_AVERAGES),
        ("values", *_AVERAGES),
    ),
}
NAMES = list(_MAKERS)


def make(name: str) -> Call:
    """The call of this name, its arguments made anew: calls change them."""
    return _MAKERS[name]()


def outcome(call: Call) -> list[Any]:
    """What a call returns and changes."""
    result = call()
    changed = [call.given[name] for name in call.written]
    if isinstance(result, Mask):
        return [result.numel, result.nnz, result.words, result.rank, *changed]
    return [*([] if result is None else [result]), *changed]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
