"""Flower: the round as a Strategy, and what a ClientApp calls to answer it (Message API, 1.41).

    ServerApp: FedMap(server).start(grid, ...)     ClientApp: fedmap_train(message, context, ...)

`CodecMod` and `CodecGrid` put the codec around anyone's ClientApp and strategy instead.
"""

from fedmap_sparse.engines.flower.client import (
    ContextState,
    FileState,
    State,
    fedmap_evaluate,
    fedmap_train,
)
from fedmap_sparse.engines.flower.codec import CodecGrid, CodecMod
from fedmap_sparse.engines.flower.strategy import FedMap

__all__ = [
    "CodecGrid",
    "CodecMod",
    "ContextState",
    "FedMap",
    "FileState",
    "State",
    "fedmap_evaluate",
    "fedmap_train",
]
