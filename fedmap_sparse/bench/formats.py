"""What people send otherwise, for a receiver that has nothing: a mask and the values under it."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedmap_sparse.mask import Mask

Array = np.ndarray[Any, Any]
Write = Callable[[], bytes]


@dataclass(frozen=True)
class Sparse:
    """Values with zeros, and where they are kept; `rows` is the same in rows of 1,024 or one."""

    dense: Array
    keep: Array

    @property
    def rows(self) -> tuple[int, int]:
        return (-1, 1024) if self.keep.size % 1024 == 0 else (1, -1)

    def with_values(self, *index: Array) -> bytes:
        return b"".join(part.tobytes() for part in (*index, self.dense[self.keep]))

    def bitmap(self) -> Array:
        return np.packbits(self.keep, bitorder="little")

    def positions(self, kind: type[np.integer[Any]] = np.int64) -> Array:
        return np.flatnonzero(self.keep).astype(kind)

    def saved(self) -> bytes:
        stream = io.BytesIO()
        np.save(stream, self.dense)
        return stream.getvalue()

    def csr(self) -> bytes:
        keep = self.keep.reshape(self.rows)
        starts = np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32)
        return self.with_values(starts, np.nonzero(keep)[1].astype(np.int32))


def _safetensors(save: Any, s: Sparse) -> Write:
    return lambda: save.save({"mask": s.bitmap(), "values": s.dense[s.keep]})


def _zstandard(zstandard: Any, s: Sparse) -> Write:
    return lambda: zstandard.ZstdCompressor(level=3).compress(s.saved())


def _blosc2(blosc2: Any, s: Sparse) -> Write:
    options = {"codec": blosc2.Codec.ZSTD, "filters": [blosc2.Filter.BITSHUFFLE], "typesize": 4}
    return lambda: blosc2.compress2(s.dense, **options)


def _scipy(sparse: Any, s: Sparse) -> Write:
    dense = s.dense.reshape(s.rows)

    def write() -> bytes:
        made = sparse.csr_array(dense)
        return b"".join(part.tobytes() for part in (made.indptr, made.indices, made.data))

    return write


def _pyroaring(pyroaring: Any, s: Sparse) -> Write:
    def write() -> bytes:
        positions = pyroaring.BitMap(s.positions(np.uint32))
        positions.run_optimize()
        return bytes(positions.serialize()) + s.dense[s.keep].tobytes()

    return write


#: Peers that need a package: its name, that of the peer, the module, and what writes.
OPTIONAL: dict[str, tuple[str, str, Callable[[Any, Sparse], Write]]] = {
    "safetensors": ("safetensors of packed", "safetensors.numpy", _safetensors),
    "zstandard": ("numpy.save, zstd-3", "zstandard", _zstandard),
    "blosc2": ("blosc2, bitshuffle + zstd", "blosc2", _blosc2),
    "scipy": ("scipy.sparse CSR", "scipy.sparse", _scipy),
    "pyroaring": ("pyroaring positions", "pyroaring", _pyroaring),
}


def of(values: Tensor, mask: Mask) -> dict[str, Write]:
    """Each format that can be written here, by its name."""
    keep = mask.to_bool()[: values.numel()]
    s = Sparse((values * keep).numpy(), keep.numpy())
    found: dict[str, Write] = {
        "numpy.save, dense": s.saved,
        "COO int64": lambda: s.with_values(s.positions()),
        "COO int32": lambda: s.with_values(s.positions(np.int32)),
        "CSR int32": s.csr,
        "bitmap": lambda: s.with_values(s.bitmap()),
        "Rice positions": lambda: s.with_values(rice(s.positions(), s.keep.size)),
    }
    for package, (name, module, write) in OPTIONAL.items():
        if importlib.util.find_spec(package):
            found[name] = write(importlib.import_module(module), s)
    return found


def rice(positions: Array, size: int) -> Array:
    """Gaps between survivors in Golomb's code with the best power of two, as STC sends positions.

    Sattler et al. 2019 (arXiv 1903.02891), algorithm 3; b* from the density.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    density = max(positions.size, 1) / max(size, 1)
    golden = np.log((np.sqrt(5) - 1) / 2)
    low = max(0, 1 + int(np.floor(np.log2(golden / np.log(1 - min(density, 1 - 1e-9))))))
    quotients = gaps >> low
    ends = np.cumsum(quotients + 1 + low)
    bits = np.ones(int(ends[-1]) if ends.size else 0, np.uint8)
    bits[ends - low - 1] = 0  # ends the quotient's ones
    for i in range(low):
        bits[ends - low + i] = (gaps >> (low - 1 - i)) & 1
    return np.packbits(bits)
