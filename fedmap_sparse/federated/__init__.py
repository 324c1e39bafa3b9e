"""The round: a server and its clients, bytes in and bytes out."""

from fedmap_sparse.errors import NeedsMask, RoundFailed
from fedmap_sparse.federated.aggregation import Bytes, ClientId
from fedmap_sparse.federated.client import FedMapClient, MakeOptimizer
from fedmap_sparse.federated.server import FedMapServer, RoundResult

__all__ = [
    "Bytes",
    "ClientId",
    "FedMapClient",
    "FedMapServer",
    "MakeOptimizer",
    "NeedsMask",
    "RoundFailed",
    "RoundResult",
]
