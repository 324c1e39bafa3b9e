"""The cases of `fedmap-sparse bench` under pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

One group an op and density, with ours, its peers and the memory's floor in it. Figures to publish
come from `fedmap-sparse bench`, which interleaves them and rotates its inputs beyond the cache.
"""

from functools import lru_cache
from typing import Any

import pytest

from fedmap_sparse.bench import runner
from fedmap_sparse.bench.case import Case, Setting, Trial

LARGE_MODEL = 1_000_000


def contenders() -> list[Any]:
    """Ours, floor and peers of each case; their names are those of a tiny trial."""
    found = []
    for one in runner.registry().values():
        if (one.fixed_n or 0) > LARGE_MODEL:
            continue
        for density in one.densities:
            tiny = one.build(Setting(one.fixed_n or 1024, density))
            found += [
                pytest.param(one, density, name, id=f"{one.op}-{density:g}-{name}")
                for name in ("ours", "floor", *tiny.peers)
            ]
    return found


@lru_cache(maxsize=1)
def checked_trial(op: str, density: float, n: int) -> Trial:
    trial = runner.registry()[op].build(Setting(n, density))
    trial.check()
    return trial


@pytest.mark.parametrize(("one", "density", "name"), contenders())
def test_op(one: Case, density: float, name: str, benchmark: Any, request: Any) -> None:
    size = one.fixed_n or request.config.getoption("--size")
    trial = checked_trial(one.op, density, size)
    benchmark.group = f"{one.op} d={density:g} n={size:,}"
    benchmark.extra_info["bytes"] = trial.nbytes
    peer = trial.peers.get(name)
    run = peer.run if peer else {"ours": trial.ours, "floor": trial.floor}[name]
    if peer and peer.reset:
        benchmark.pedantic(run, setup=peer.reset, rounds=10, warmup_rounds=1)
    else:
        benchmark.pedantic(run, rounds=10, warmup_rounds=1, iterations=trial.calls)
