"""Sparse kernels for federated learning with magnitude pruning (FedMap, arXiv 2406.19050)."""

from fedmap_sparse import _command

_command.watch_imports()  # before torch, whose import takes a second

from fedmap_sparse import errors, ops, optim, schedule  # noqa: E402  # after watch_imports
from fedmap_sparse._backends import backends  # noqa: E402  # after watch_imports
from fedmap_sparse.codec import (  # noqa: E402  # after watch_imports
    decode,
    decode_state_dict,
    encode,
    encode_state_dict,
)
from fedmap_sparse.errors import FedMapError, FormatError, NeedsMask, RoundFailed  # noqa: E402  # after watch_imports
from fedmap_sparse.federated import FedMapClient, FedMapServer  # noqa: E402  # after watch_imports
from fedmap_sparse.flat import FlatParameters, flatten  # noqa: E402  # after watch_imports
from fedmap_sparse.layout import FlatLayout  # noqa: E402  # after watch_imports
from fedmap_sparse.mask import Mask  # noqa: E402  # after watch_imports

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
