"""CIFAR-10 and CIFAR-100 from the binary versions that their authors give out, in a local folder.

Format (cs.toronto.edu/~kriz/cifar.html): records of one byte of label (CIFAR-100: coarse, then
fine), then 3,072 bytes of an image, channels first.
"""

from __future__ import annotations

import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from numpy.typing import NDArray

from fedmap_sparse import _files
from fedmap_sparse.errors import DataError

Bytes = NDArray[np.uint8]

_IMAGE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
#: The largest file there is (CIFAR-100's train.bin) has 154 MB.
_MOST = 1 << 28


@dataclass(frozen=True)
class Source:
    """One of the two: its archive, its folder within, its files, the bytes of a label."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int
    classes: int


SOURCES = {
    "cifar10": Source(
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",),
        1,
        10,
    ),
    "cifar100": Source(
        "cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), ("test.bin",), 2, 100
    ),
}


def read(name: str, folder: Path) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Training images uint8 [n, 3, 32, 32] and labels [n], test images and labels.

    Args:
        name: "cifar10" or "cifar100" (its 100 fine classes).
        folder: with the archive, or with its files, or with the folder that it unpacks to.

    Raises:
        DataError: files that are missing, damaged, or of another form.
    """
    source = SOURCES[name]
    wanted = (*source.train, *source.test)
    for place in (folder, folder / source.folder):
        if any((place / file).exists() for file in wanted):
            files = {file: _from_folder(place / file) for file in wanted}
            break
    else:
        files = _from_archive(folder / source.archive, source, wanted)
    parts = {file: _parsed(f"{folder}: {file}", data, source) for file, data in files.items()}
    train, test = (
        [np.concatenate([parts[file][i] for file in group]) for i in (0, 1)]
        for group in (source.train, source.test)
    )
    return train[0], train[1], test[0], test[1]


def _from_folder(path: Path) -> bytes:
    try:
        return _files.read_regular(path, _MOST)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _from_archive(path: Path, source: Source, wanted: tuple[str, ...]) -> dict[str, bytes]:
    if not path.is_file():
        raise DataError(
            f"no {source.archive}, and no {wanted[0]}, in {path.parent}: the binary version is at "
            "www.cs.toronto.edu/~kriz/cifar.html"
        )
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = PurePosixPath(member.name).name
                if file in wanted and member.isreg():
                    if member.size > _MOST:
                        raise DataError(
                            f"{path}: {file} has {member.size:,} bytes, at most {_MOST:,}"
                        )
                    stream: IO[bytes] | None = archive.extractfile(member)
                    assert stream is not None
                    found[file] = stream.read()
                if len(found) == len(wanted):
                    break
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if missing := [file for file in wanted if file not in found]:
        raise DataError(f"{path}: no {', '.join(missing)} in it")
    return found


def _parsed(what: str, data: bytes, source: Source) -> tuple[Bytes, Bytes]:
    size = source.labels + _PIXELS
    if not data or len(data) % size:
        raise DataError(f"{what}: expected records of {size} bytes, got {len(data):,} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    labels = records[:, source.labels - 1]
    if labels.max() >= source.classes:
        raise DataError(
            f"{what}: expected labels below {source.classes}, got {labels.max()}; is it the binary "
            "version?"
        )
    return records[:, source.labels :].reshape(-1, *_IMAGE), labels
