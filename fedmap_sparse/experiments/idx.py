"""Fashion-MNIST's files: IDX, an array of bytes behind a header of its shape."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmap_sparse.errors import DataError

Array = NDArray[Any]

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
HOW_TO_GET = (
    "Debian and Ubuntu have it as the package dataset-fashion-mnist; its authors' copy is at "
    "github.com/zalandoresearch/fashion-mnist. The data set fashion-mnist-subset needs no files."
)


def read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes with ``rank`` dimensions, gzip-compressed if it ends so.

    Format: two zero bytes, the type (8), the rank, then each dimension as a big-endian uint32, then
    the bytes. Raises DataError for anything else, truncation and trailing bytes included.
    """
    try:
        on_disk = path.stat().st_size
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * rank)
            if len(header) < 4 + 4 * rank:
                raise DataError(f"{path}: the header has {len(header)} of {4 + 4 * rank} bytes")
            if header[:4] != bytes((0, 0, 8, rank)):
                raise DataError(
                    f"{path}: not an IDX file of bytes with {rank} dimensions: it starts with "
                    f"{header[:4].hex()}, not {bytes((0, 0, 8, rank)).hex()}"
                )
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
            size = math.prod(shape)
            if size > 2**31:
                raise DataError(f"{path}: claims {size} bytes, more than the 2 GiB allowed")
            # Deflate makes a byte of 1,032 at most.
            if size > on_disk * (1032 if path.suffix == ".gz" else 1):
                raise DataError(f"{path}: shape {shape} needs {size} bytes, the file has less")
            data = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(data) != size:
        found = "more" if len(data) > size else f"{len(data)}"
        raise DataError(f"{path}: shape {shape} needs {size} bytes, the file has {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_fashion_mnist(folder: Path) -> tuple[Array, Array, Array, Array]:
    """Training images [n, h, w] and labels [n], test images and labels, from four IDX files."""
    paths = []
    for name in IDX_FILES:
        found = [p for p in (folder / name, folder / f"{name}.gz") if p.is_file()]
        if not found:
            raise DataError(f"no {name} or {name}.gz in {folder}. {HOW_TO_GET}")
        paths.append(found[0])
    images, labels, test_images, test_labels = (
        read_idx(path, rank) for path, rank in zip(paths, (3, 1, 3, 1), strict=True)
    )
    return images, labels, test_images, test_labels
