"""Selections of inputs with ties: times beside a normal input's, and the kernels they go to."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_run.bench import Bench, by_profiler
from gpu_run.extras import selections

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
#: Whose kernels the profiler takes apart.
_WATCHED = ("normal float32 0.1", "constant float32 0.1", "zeros float32 0.1")


def ties(bench: Bench) -> None:
    """Each input in both widths, by each implementation; "of normal" is its time over the normal
    input's of that width and implementation.

    The profiler comes last: its first start alone takes seconds.
    """
    n, rows = bench.n, dict[str, Any]()
    watched: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        drawn = torch.randn(n, device=bench.device, dtype=dtype)
        usual: dict[tuple[float, str], float] = {}
        short = str(dtype).removeprefix("torch.")
        for name, make in INPUTS.items():
            if bench.left() < 1:
                bench.note(left_out=f"from {name} of {short} on: no time left")
                return
            values = make(drawn)
            for share, (mark, select) in itertools.product(_SHARES, selections().items()):
                run = functools.partial(select, [values], [None], n, round(n * share))
                us = bench.median(run, repeats=7)
                normal = usual.setdefault((share, mark), us)
                title = f"{name} {short} {share}{mark}"
                rows[title] = {"us": us, "of normal": round(us / normal, 2) if us else None}
                if title in _WATCHED:
                    watched[title] = run
            bench.note(n=n, ties=rows)
    for title, run in watched.items() if bench.real else ():
        if bench.left() < 5:
            bench.note(left_out=f"the kernels of {title}: no time left")
            return
        rows[title]["kernels_us"] = by_profiler(run, 1)
        bench.note(ties=rows)
