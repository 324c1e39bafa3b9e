"""Selections of inputs with ties: times beside a normal input's, and the kernels they go to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_run.bench import Bench, by_profiler

#: What is made of normal values, in this order of interest.
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "constant": torch.ones_like,
    "zeros": torch.zeros_like,
    "two values": lambda x: torch.where(x > 0, 1.0, -2.0).to(x.dtype),
    "3% not zero": lambda x: x * (x > 1.88),
    "16 values": lambda x: x.clamp(-2, 2).mul(4).round(),
    "sorted": lambda x: x.abs().sort().values,
}
_SHARES = (0.1, 0.5)


def ties(bench: Bench) -> None:
    """Each input in both widths; "of normal" is its time over the normal input's of that width."""
    from fedmap_sparse.triton_kernels import select

    n, rows = bench.n, dict[str, Any]()
    for dtype in (torch.float32, torch.bfloat16):
        drawn = torch.randn(n, device=bench.device, dtype=dtype)
        usual: dict[float, float] = {}
        for name, make in INPUTS.items():
            if bench.left() < 2:
                bench.note(left_out=f"from {name} of {dtype} on: no time left")
                return
            values = make(drawn)
            for share in _SHARES:
                run = functools.partial(
                    select.magnitude_mask, [values], [None], n, round(n * share)
                )
                us = bench.median(run, repeats=7)
                usual.setdefault(share, us)
                row = {"us": us, "of normal": round(us / usual[share], 2) if us else None}
                if bench.real and share == _SHARES[0]:
                    row["kernels_us"] = by_profiler(run, 2)
                short = str(dtype).removeprefix("torch.")
                rows[f"{name} {short} {share}"] = row
            bench.note(n=n, ties=rows)
