"""Sparse kernels for federated learning with magnitude pruning (FedMap, arXiv 2406.19050)."""

from fedmap_sparse import errors, ops, optim, schedule
from fedmap_sparse._backends import backends
from fedmap_sparse.codec import (
    decode,
    decode_state_dict,
    encode,
    encode_state_dict,
)
from fedmap_sparse.errors import FedMapError, FormatError, NeedsMask, RoundFailed
from fedmap_sparse.federated import FedMapClient, FedMapServer
from fedmap_sparse.flat import FlatParameters, flatten
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask

__version__ = "0.1.0"

__all__ = [
    "FedMapClient",
    "FedMapError",
    "FedMapServer",
    "FlatLayout",
    "FlatParameters",
    "FormatError",
    "Mask",
    "NeedsMask",
    "RoundFailed",
    "__version__",
    "backends",
    "decode",
    "decode_state_dict",
    "encode",
    "encode_state_dict",
    "errors",
    "flatten",
    "ops",
    "optim",
    "schedule",
]
