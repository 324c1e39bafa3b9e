"""Flower: the round as a Strategy, and what a ClientApp calls to answer it (Message API, 1.41).

    ServerApp: FedMap(server).start(grid, ...)     ClientApp: fedmap_train(message, context, ...)

`SecureFedMap` and `fedmap_secure_train` are the round over Flower's SecAgg+. `CodecMod` and
`CodecGrid` put the codec around anyone's ClientApp and strategy instead.
"""

from fedmap_sparse.engines.flower.client import (
    ContextState,
    FileState,
    State,
    fedmap_evaluate,
    fedmap_train,
)
from fedmap_sparse.engines.flower.codec import CodecGrid, CodecMod
from fedmap_sparse.engines.flower.secure import SecureFedMap, fedmap_secure_train
from fedmap_sparse.engines.flower.strategy import FedMap

__all__ = [
    "CodecGrid",
    "CodecMod",
    "ContextState",
    "FedMap",
    "FileState",
    "SecureFedMap",
    "State",
    "fedmap_evaluate",
    "fedmap_secure_train",
    "fedmap_train",
]
