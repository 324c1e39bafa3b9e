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
    """Markdown: mean test accuracy, and points lost against the honest mean; a rule per column."""
    lines = []
    for density in DENSITIES:
        honest = mean(rows, "accuracy", attack="none", rule="mean", density=density)
        if honest is None:
            continue
        lines += [
            "",
            f"Density {density:g}. Honest clients and the mean: {honest:.1%}.",
            "",
            f"| attack | {' | '.join(RULES)} |",
            f"|---|{'---|' * len(RULES)}",
        ]
        for attack, count in [("none", 0), *itertools.product(ATTACKS, sorted(ATTACKERS))]:
            texts = []
            for rule in RULES:
                where = {"attack": attack, "attackers": count, "rule": rule, "density": density}
                found = mean(rows, "accuracy", **where)
                lost = None if found is None else 100 * (honest - found)
                texts.append("not run" if lost is None else f"{-lost:+.1f}")
            name = "none" if attack == "none" else f"{attack}, {count} of 10"
            lines.append(f"| {name} | {' | '.join(texts)} |")
    costs = []
    for rule in RULES:
        cost = mean(rows, "aggregate_ms", rule=rule, density=1.0)
        costs.append("not run" if cost is None else f"{cost:.1f} ms")
    lines += ["", f"Aggregating one dense round: {dict(zip(RULES, costs, strict=True))}"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print what is there, play nothing")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    args = parser.parse_args()
    wanted = [] if args.table else cells(tuple(args.seeds))
    rows = fill(
        PATH, wanted, options, ("accuracy", "validation_accuracy", "refused", "aggregate_ms")
    )
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
