"""Methods as options that go together: what `method=` sets. docs/guides/baselines.md: sources."""

from __future__ import annotations

from fedmap_sparse.experiments.options import Value

#: Options that are a method's own: with another value it would be another method.
OWN = ("schedule", "criterion", "dtype")

METHODS: dict[str, dict[str, Value]] = {
    "fedmap": {},
    "fedavg": {"schedule": "dense"},
    "fedavg-int8": {"schedule": "dense", "dtype": "int8"},
    "fedsparsify": {"schedule": "cubic", "prune_start": 1, "prune_end": -1},
    "oneshot": {"schedule": "oneshot", "prune_start": 0.5},
    "random": {"criterion": "random"},
    "snip": {"schedule": "oneshot", "prune_start": 0, "criterion": "snip"},
    "feddst": {"schedule": "oneshot", "prune_start": 0, "criterion": "erk"},
    "stc": {"schedule": "dense"},
}


def preset(method: str, rounds: int) -> dict[str, Value]:
    """What a method sets in a run of so many rounds.

    A fraction among rounds is a share of them, a negative number counts from the end.
    """
    found = dict(METHODS[method])
    for key in ("prune_start", "prune_end"):
        value = found.get(key)
        if isinstance(value, float):
            found[key] = int(value * rounds)
        elif isinstance(value, int) and value < 0:
            found[key] = rounds + value
        if key in found:
            found[key] = min(int(found[key]), rounds - 1)
    return found


def alone(method: str, criterion: str | None) -> dict[str, Value | None]:
    """Options that have one value alone with a method: what its messages leave no room for."""
    if method in ("feddst", "stc"):
        return {
            "server_optimizer": "fedavg", "keep_optimizer": False, "delta": False,
            "aggregator": "mean", "max_norm": None, "dp_noise": 0.0,
        }  # fmt: skip
    # The scores that clients send before round 0 have no noise.
    return {"dp_noise": 0.0} if criterion == "snip" else {}
