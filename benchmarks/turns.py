"""ISA levels and fetch distances in turns, in one process, on 26 M float32:

    python benchmarks/turns.py select,masked_sgd avx2:0:0 avx2 avx512_core

A variant is LEVEL[:READS[:WRITES]]: bytes that are asked for ahead of reads and of writes
(csrc/core/ahead.h), by default what this machine's processor has. The floor runs as the first
variant.
"""

import argparse
from functools import partial

import torch

from fedmap_sparse._backends import native
from fedmap_sparse.bench import runner
from fedmap_sparse.bench.case import Setting
from fedmap_sparse.bench.timing import Contender, Plan, interleave

N, SETS = 26_214_400, 3


def take(variant: str, own: tuple[int, int]) -> None:
    level, *given = variant.split(":")
    reads, writes = (*map(int, given), *own[len(given) :])
    native.set_isa(level)
    native.set_read_ahead(reads)
    native.set_write_ahead(writes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", help="names, as of `fedmap-sparse bench --ops`, with commas")
    parser.add_argument("variants", nargs="+", metavar="VARIANT")
    parser.add_argument("--density", type=float, default=0.1)
    args = parser.parse_args()
    own = native.read_ahead(), native.write_ahead()
    for op in args.ops.split(","):
        case = runner.registry()[op]
        trials = [case.build(Setting(N, args.density, seed=10 * i)) for i in range(SETS)]
        for variant in args.variants:
            take(variant, own)
            trials[0].check()
        runs = {v: (v, [t.ours for t in trials]) for v in args.variants}
        runs["floor"] = args.variants[0], [t.floor for t in trials]
        contenders = [
            Contender(name, each, [partial(take, variant, own)] * SETS)
            for name, (variant, each) in runs.items()
        ]
        interleave(contenders, Plan(rounds=31, budget_s=1.0), torch.device("cpu"))
        for c in contenders:
            low, middle, high = (1e3 * c.quantile(q) for q in (0.2, 0.5, 0.8))
            print(f"{op:<14} {c.name:<18} {middle:7.2f} ms  ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
