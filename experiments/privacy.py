"""Accuracy at equal epsilon: `python experiments/privacy.py`, then `--table`.

300 clients of scikit-learn's digits (4 images each), all of them in each round, an mlp,
central noise; densities 1, .5 and .1, pruned gradually in rounds 1 to 8 of 20; three seeds. Each
cell that `results/privacy.csv` lacks is played. It wants the extra `privacy`.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from cells import RESULTS, fill, mean

from fedmap_sparse.federated import privacy

PATH = RESULTS / "privacy.csv"
DENSITIES = (1.0, 0.5, 0.1)
#: Noise multipliers; 0 is the clipped mean without noise.
NOISES = (0.0, 8.0)
SEEDS = (0, 1, 2)
ROUNDS = 20
CLIENTS = 300
DELTA = 1e-3


def cells(seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        {"noise": noise, "density": density, "seed": seed}
        for noise, seed, density in itertools.product(
            sorted(NOISES, reverse=True), seeds, DENSITIES
        )
    ]


def options(cell: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dataset": "digits",
        "model": "mlp",
        "clients": CLIENTS,
        "rounds": ROUNDS,
        "local_epochs": 2,
        "batch_size": 4,
        "lr": 0.5,
        "momentum": 0.0,
        "seed": cell["seed"],
        "max_norm": 1.0,
        "dp_noise": cell["noise"],
        "dp_delta": DELTA,
    }
    if cell["density"] == 1:
        return {**found, "schedule": "dense"}
    return {
        **found,
        "schedule": "iterative",
        "target": 1 - cell["density"],
        "prune_start": 1,
        "prune_end": 8,
        "criterion": "fan_in",
    }


def table(rows: list[dict[str, str]]) -> list[str]:
    """Markdown: test accuracy of each seed."""
    lines = [
        f"| epsilon at delta {DELTA:g} | {' | '.join(f'density {d:g}' for d in DENSITIES)} |",
        f"|---|{'---|' * len(DENSITIES)}",
    ]
    for noise in NOISES:
        epsilon = privacy.epsilon(noise, ROUNDS, delta=DELTA, clients=CLIENTS)
        texts = []
        for density in DENSITIES:
            found = [mean(rows, "accuracy", noise=noise, density=density, seed=s) for s in SEEDS]
            known = [f"{accuracy:.1%}" for accuracy in found if accuracy is not None]
            texts.append(", ".join(known) or "not run")
        lines.append(f"| {epsilon:.3g} (noise {noise:g}) | {' | '.join(texts)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print what is there, play nothing")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    args = parser.parse_args()
    wanted = [] if args.table else cells(tuple(args.seeds))
    rows = fill(PATH, wanted, options, ("accuracy", "validation_accuracy"))
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
