"""Each barrier of each kernel, dropped in turn from the compiled code: the emulator must notice."""

from __future__ import annotations

import functools

import pytest
import torch
from gpucheck.driver import emulate
from gpucheck.emulator import Emulator
from ladder import WHOLE
from ladder.catalogue import Workload, workloads

from fedmap_sparse.triton_kernels import select

_N = 6000
_QUICK = ("unpack float32 0.5",)
_WHOLE = (*_QUICK, "extract 0.5", "pack float32 0.5", "deposit 0.5", "masked_sgd float32 0.5",
          "masked_adamw float32 0.1", "weighted_mean 10 float32", "cast float32 float16",
          "quantize_int8 feedback", "select float32", "select, bracket missed",
          "encode_values float16", "decode_values float16")  # fmt: skip


_ROUND = "guards scratch against the round before; a program's loop runs once at these sizes"
_OWN = "a warp's 256 elements gather the 32 registers of symbols that it stored itself"
_SAME = (
    "between a gather and a scan whose addresses the layout fixes: no byte of scratch is "
    "touched by two warps on its two sides"
)
# Survivors, and why: nothing goes wrong without them at these sizes.
EXPLAINED = {
    "_add_up 0": f"{_ROUND} (with chunks of 512 and one program for 1100 blocks it is noticed)",
    **{f"_join {i}": _OWN for i in (0, 1, 2, 14)},
    "_refine 0": _ROUND,
    **dict.fromkeys(("_unpack_rows 1", "_pack_rows 1", "_pack_rows 6"), _SAME),
}


def _without_room() -> list[torch.Tensor]:
    """A selection whose candidates do not fit, so that its histograms are taken of all values."""
    values = torch.randn(_N, generator=torch.Generator().manual_seed(0))
    search = select._Search([values], [None], _N, _N // 3)
    search.capacity = 10
    return search.mask()


@functools.cache
def catalogue() -> dict[str, Workload]:
    missed = Workload("select, bracket missed", _N, _without_room, 0.0, 0.0, 0.0)
    return {w.name: w for w in [*workloads(_N), missed]}


def run(workload: Workload) -> tuple[list[str], list[Emulator]]:
    with emulate(blocks=2) as session:
        session.show(**workload.shown)
        workload.run()
    return session.faults, session.kernels


def without(ptx: str, barrier: int) -> str:
    parts = ptx.split("bar.sync")
    return (
        "bar.sync".join(parts[: barrier + 1])
        + "bar.warp.sync"
        + "bar.sync".join(parts[barrier + 1 :])
    )


@pytest.mark.parametrize("name", _WHOLE if WHOLE else _QUICK)
def test_dropped_barriers_are_noticed(name: str, summary: list[str]) -> None:
    workload = catalogue()[name]
    faults, kernels = run(workload)
    assert not faults
    for kernel in kernels:
        kernel.reached.clear()  # by another workload
    run(workload)
    total, missed = 0, []
    for kernel in kernels:
        if kernel.threads == 32:  # the threads of one warp run in step here
            continue
        ptx, reached = kernel.ptx, sorted(kernel.reached)
        try:
            for barrier in reached:
                kernel.load(without(ptx, barrier))
                if not any("race" in fault for fault in run(workload)[0]):
                    missed.append(f"{kernel.program.name} {barrier}")
        finally:
            kernel.load(ptx)
        total += len(reached)
    summary.append(
        f"{name}: {total - len(missed)} of {total} dropped barriers noticed; not {missed}"
    )
    unexplained = [barrier for barrier in missed if barrier not in EXPLAINED]
    assert len(unexplained) <= 0.05 * total, unexplained
