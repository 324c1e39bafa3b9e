"""Named arrays as one message beside a description of what it holds: for engines that move arrays.

The receiver of such a system does not know the names and shapes beforehand, so they travel with the
message. It says how much memory it will spend on them at most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np

from fedmap_sparse import codec
from fedmap_sparse.errors import FormatError
from fedmap_sparse.layout import FlatLayout

#: The most elements that a receiver accepts if it says nothing: 4 GiB of float32.
MAX_NUMEL = 1 << 30


def encode_arrays(
    arrays: Mapping[str, np.ndarray], *, dtype: str = "float32", sparse: bool = True
) -> tuple[bytes, str]:
    """(message, description) of arrays by name.

    Args:
        arrays: as `encode_state_dict` takes them. float64 travels as float32.
        dtype: of the values on the wire.
        sparse: leave out the zeros of prunable arrays (two or more dimensions). Zeros of both signs
            come back as +0.0: a weight times a mask is often -0.0. False keeps every bit.
    """
    described = {name: [list(a.shape), a.dtype.str] for name, a in arrays.items()}
    native = {name: a.astype(a.dtype.newbyteorder("="), copy=False) for name, a in arrays.items()}
    layout = _layout(native)
    masks = {e.name: native[e.name] != 0 for e in layout.prunable_entries} if sparse else None
    message = codec.encode_state_dict(native, masks, layout=layout, dtype=dtype)
    return message, json.dumps(described)


def decode_arrays(
    message: bytes, description: str, *, max_numel: int = MAX_NUMEL
) -> dict[str, np.ndarray]:
    """The arrays of `encode_arrays`.

    Raises:
        FormatError: a description that is malformed or of more than `max_numel` elements, or a
            message that does not fit it.
    """
    like: dict[str, np.ndarray] = {}
    dtypes: dict[str, np.dtype] = {}
    try:
        for name, (shape, dtype) in json.loads(description).items():
            if not all(isinstance(n, int) and n >= 0 for n in shape):
                raise ValueError(f"{name}: expected a shape, got {shape}")
            max_numel -= math.prod(shape)
            if max_numel < 0:
                raise ValueError(f"{name}: expected fewer elements in all, got more")
            dtypes[name] = np.dtype(dtype)
            native = dtypes[name].newbyteorder("=")
            like[name] = np.empty(tuple(shape), native)  # takes no memory until written
        layout = _layout(like)
    except (ValueError, TypeError, AttributeError, MemoryError, RecursionError) as error:
        raise FormatError(f"description: {error}") from error
    state = codec.decode_state_dict(message, like=like, layout=layout)
    return {name: a.astype(dtypes[name], copy=False) for name, a in state.items()}


def _layout(arrays: Mapping[str, np.ndarray]) -> FlatLayout:
    """No two are tied, even if they share memory at one end."""
    return FlatLayout.from_state_dict(arrays, aliases={})
