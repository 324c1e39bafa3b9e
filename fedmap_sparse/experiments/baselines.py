"""The arms of an experiment, which share everything but the method."""

from __future__ import annotations

from fedmap_sparse.experiments.config import Config
from fedmap_sparse.schedule import Dense, Schedule


def arms(config: Config) -> dict[str, Schedule]:
    """The schedule of each arm by name, in the order they run.

    `dense` is plain FedAvg: the same weights at the start, the same samples, order, cohorts and
    dropouts, the same messages without a mask, and nothing pruned. A run that is dense itself has
    no other arm.
    """
    found = {config.arm: config.make_schedule()}
    if config.has_dense_arm:
        found[Dense.kind] = Dense()
    return found
