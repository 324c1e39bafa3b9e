"""What the checkpoint of a run has to hold: its checksum is good, its author may not be."""

from __future__ import annotations

import math
from typing import Any

from fedmap_sparse.errors import StateError
from fedmap_sparse.federated.state import count, field

_NUMBER: tuple[type, ...] = (int, float)
_MAYBE: tuple[type, ...] = (int, float, type(None))
#: The fields of a record and their types.
_RECORD: dict[str, type | tuple[type, ...]] = {
    "arm": str, "round": int, "accuracy": _NUMBER, "loss": _MAYBE, "clients": dict,
    "train_loss": _MAYBE, "density": _NUMBER, "keep": int, "layers": dict, "starving": dict,
    "lr": _NUMBER, "uplink_bytes": int, "downlink_bytes": int, "bytes": dict, "cohort": int,
    "dropped": list, "attempts": int, "refused": dict, "seconds": dict,
}  # fmt: skip
#: The types of what its dicts hold, and the names that are read.
_WITHIN: dict[str, tuple[type | tuple[type, ...], tuple[str, ...]]] = {
    "clients": (_MAYBE, ("mean", "std", "worst", "worst_client")),
    "layers": (_NUMBER, ()),
    "starving": (str, ()),
    "bytes": (int, ()),
    "refused": (str, ()),
    "seconds": (_NUMBER, ("train", "evaluate", "total")),
}


def check(state: Any) -> None:
    """Check everything of a checkpoint but the arms' states, which their engines check.

    Raises:
        StateError: a field that is missing, of another type or not finite, or records that are not
            those of the arms' rounds; the message names it.
    """
    for name in ("data", "python"):
        field(state, name, str)
    field(state, "config", dict)
    arms, records = field(state, "arms", dict), field(state, "records", list)
    rounds: dict[str, int] = dict.fromkeys(arms, 0)
    for number, record in enumerate(records):
        try:
            _check_record(record)
        except StateError as error:
            raise StateError(f"records.{number}.{error}") from error
        arm = record["arm"]
        if record["round"] != rounds.get(arm):
            raise StateError(f"records.{number}: expected the next round of an arm, got another")
        rounds[arm] += 1
    for arm, ended in rounds.items():
        if count(field(field(arms, arm, dict), "server", dict), "round") != ended:
            raise StateError(
                f"arms.{arm}.server.round: expected {ended}, as its records, got another"
            )


def _check_record(record: Any) -> None:
    for name, kinds in _RECORD.items():
        _finite(name, field(record, name, kinds))
    for name, (kinds, needed) in _WITHIN.items():
        inside = record[name]
        for key in {**dict.fromkeys(needed), **inside}:
            _finite(f"{name}.{key}", field(inside, key, kinds))


def _finite(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise StateError(f"{name}: expected a finite number, got {value}")
