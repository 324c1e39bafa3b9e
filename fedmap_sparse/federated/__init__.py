"""The round: a server and its clients, bytes in and bytes out."""

from fedmap_sparse.errors import NeedsMask, RoundFailed
from fedmap_sparse.federated.aggregation import Aggregator, RoundResult
from fedmap_sparse.federated.arrays import ArraySection, array_sections
from fedmap_sparse.federated.client import FedMapClient, MakeOptimizer
from fedmap_sparse.federated.global_model import Criterion
from fedmap_sparse.federated.server import FedMapServer
from fedmap_sparse.federated.updates import Bytes, ClientId

__all__ = [
    "Aggregator",
    "ArraySection",
    "Bytes",
    "ClientId",
    "Criterion",
    "FedMapClient",
    "FedMapServer",
    "MakeOptimizer",
    "NeedsMask",
    "RoundFailed",
    "RoundResult",
    "array_sections",
]
