"""Attacks beside aggregators: `python experiments/attacks.py`, then `--table`.

Ten clients of scikit-learn's digits, IID, an mlp, 2 or 3 of them hostile; dense and 90% pruned;
three seeds. Each cell that `results/attacks.csv` lacks is played, so that a run that was stopped
goes on. `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from cells import RESULTS, fill, mean

PATH = RESULTS / "attacks.csv"
ATTACKS = ("sign", "noise", "constant", "labels", "little", "copy")
RULES = ("mean", "norm", "median", "trimmed", "geometric", "krum")
DENSITIES = (1.0, 0.1)
SEEDS = (0, 1, 2)
COLUMNS = ("accuracy", "validation_accuracy", "refused", "aggregate_ms")
ROUNDS = 8
#: The stronger attack first, for a run that is stopped.
ATTACKERS = (3, 2)


def cells(seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    groups = [[("none", 0), *((attack, ATTACKERS[0]) for attack in ATTACKS)]]
    groups += [[(attack, count) for attack in ATTACKS] for count in ATTACKERS[1:]]
    return [
        {"attack": attack, "attackers": count, "rule": rule, "density": density, "seed": seed}
        for pairs in groups
        for seed in seeds
        for (attack, count), density, rule in itertools.product(pairs, DENSITIES, RULES)
    ]


def options(cell: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dataset": "digits",
        "model": "mlp",
        "clients": 10,
        "rounds": ROUNDS,
        "local_epochs": 2,
        "lr": 0.1,
        "seed": cell["seed"],
        "aggregator": cell["rule"],
    }
    if cell["density"] == 1:
        found["schedule"] = "dense"
    else:
        found |= {"target": 1 - cell["density"], "prune_end": ROUNDS // 2}
    if cell["attack"] != "none":
        found |= {"attack": cell["attack"], "attackers": cell["attackers"]}
    if cell["rule"] in ("trimmed", "krum"):
        found["hostile"] = cell["attackers"] or 3
    return found


def table(rows: list[dict[str, str]]) -> list[str]:
    """Markdown: points of mean test accuracy against honest clients and the mean, by rule."""
    lines = []
    for density in DENSITIES:
        honest = {
            seed: mean(rows, "accuracy", attack="none", rule="mean", density=density, seed=seed)
            for seed in SEEDS
        }
        known = [a for a in honest.values() if a is not None]
        if not known:
            continue
        lines += [
            "",
            f"Density {density:g}. Honest, the mean: {sum(known) / len(known):.1%} on test.",
            "",
            f"| attack | seeds | {' | '.join(RULES)} |",
            f"|---|---|{'---|' * len(RULES)}",
        ]
        for attack, count in [("none", 0), *itertools.product(ATTACKS, sorted(ATTACKERS))]:
            lost = [
                _lost(rows, honest, attack=attack, attackers=count, rule=rule, density=density)
                for rule in RULES
            ]
            seeds = min(map(len, lost))
            if seeds:
                texts = [f"{100 * sum(each[:seeds]) / seeds:+.1f}" for each in lost]
                name = "none" if attack == "none" else f"{attack}, {count} of 10"
                lines.append(f"| {name} | {seeds} | {' | '.join(texts)} |")
    return lines


def _lost(
    rows: list[dict[str, str]], honest: dict[int, float | None], **where: object
) -> list[float]:
    """Differences of accuracy from the honest run of the same seed, by seed."""
    found = []
    for seed, reference in honest.items():
        accuracy = mean(rows, "accuracy", **where, seed=seed)
        if accuracy is not None and reference is not None:
            found.append(accuracy - reference)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print what is there, play nothing")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    args = parser.parse_args()
    wanted = [] if args.table else cells(tuple(args.seeds))
    rows = fill(PATH, wanted, options, COLUMNS)
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
