"""`fedmap-sparse bench` on a device, as much of it as there is time for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from gpu_run.bench import Bench, Skip

#: In this order; the rest of the bench's ops make their peers for seconds, or have none.
OPS = (
    "select", "pack", "masked_adamw", "masked_sgd", "unpack", "extract", "deposit", "cast_bfloat16",
    "accumulate", "quantize_int8", "select_within",
)  # fmt: skip
DENSITY = 0.1
#: 0.2 s a call on an H200, 1,500 times a selection's: its turns would take the time of all others.
LEFT_OUT = ("torch.kthvalue",)


def cells(cases: dict[str, Any]) -> Iterator[tuple[Any, float]]:
    """One of each op, at density 0.1 where it has that; then the others."""
    first = {
        op: DENSITY if DENSITY in cases[op].densities else cases[op].densities[0] for op in OPS
    }
    yield from ((cases[op], density) for op, density in first.items())
    for op in OPS:
        yield from ((cases[op], d) for d in cases[op].densities if d != first[op])


def without(build: Any) -> Any:
    """A case's `build` whose trials lack what is left out."""

    def built(setting: Any) -> Any:
        trial = build(setting)
        kept = {name: peer for name, peer in trial.peers.items() if name not in LEFT_OUT}
        return replace(trial, peers=kept)

    return built


def peers(bench: Bench) -> None:
    """Float32; one input set each, as the clock flushes the cache."""
    from fedmap_sparse.bench import runner, timing
    from fedmap_sparse.bench.case import Setting

    planned = list(cells(runner.registry()))
    if not bench.real:
        bench.note(cases=[f"{one.op} {density}" for one, density in planned])
        raise Skip("peers are timed on a device only")
    options = runner.Options(
        cases=[one for one, _ in planned], sizes=[bench.n], densities=None, dtypes=[torch.float32],
        device=bench.device, inputs="normal", plan=timing.Plan(21, 0.2, 3), most_sets=1,
    )  # fmt: skip
    records, refused = [], []
    bench.note(header=runner.header(options, ["device=cuda"]), peers_left_out=LEFT_OUT)
    for at, (one, density) in enumerate(planned):
        if bench.left() < 2:
            bench.note(left_out=[f"{o.op} {d}" for o, d in planned[at:]])
            break
        setting = Setting(bench.n, density, torch.float32, bench.device)
        result = runner.measure(
            replace(one, build=without(one.build)), setting, options.plan, options.most_sets
        )
        if isinstance(result, runner.Refused):
            refused.append(result.as_dict())
        else:
            records.append(result)
        bench.note(records=records, refused=refused)
    if refused:
        raise RuntimeError(f"{len(refused)} cases failed their check")
