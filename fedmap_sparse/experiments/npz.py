"""Arrays from an .npz file that may come from anyone: its headers are checked before its bytes.

An .npz is a zip of .npy files. Both name sizes, and a few kilobytes can name terabytes: all of
them are checked against each other and against this machine before any array is read.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedmap_sparse import _files
from fedmap_sparse.errors import DataError

Array = NDArray[Any]

#: Beyond this, arrays that expand more than a hundredfold are taken for a zip bomb.
_HARMLESS = 1 << 30
_LONGEST_HEADER = 10_000


def read(path: Path, names: Sequence[str]) -> tuple[dict[str, Array], list[str]]:
    """Those of the arrays `names` that the file has, and the names of all that it has.

    Raises:
        DataError: no such file, not an .npz, damaged, or larger than this machine can hold.
    """
    try:
        descriptor, size = _files.open_regular(path)
    except FileNotFoundError:
        raise DataError(f"no file {path}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as stream:
        if not zipfile.is_zipfile(stream):
            raise DataError(f"{path}: not an .npz file (those are zip archives)")
        try:
            with zipfile.ZipFile(stream) as archive:
                members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
                chosen = {name: members[name] for name in names if name in members}
                _check_sizes(path, size, chosen)
                for name, member in chosen.items():
                    with archive.open(member) as file:
                        _check_header(path, name, file, member.file_size)
                arrays = {}
                for name, member in chosen.items():
                    with archive.open(member) as file:
                        # Without pickle a file can hold arrays only, never code.
                        arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        except DataError:
            raise
        # zipfile, zlib, lzma, NumPy and the parser that it uses have a dozen kinds of error.
        except Exception as error:
            text = str(error) or type(error).__name__
            raise DataError(f"{path}: cannot be read as .npz: {text}") from error
    return arrays, list(members)


def _check_sizes(path: Path, on_disk: int, members: dict[str, zipfile.ZipInfo]) -> None:
    total = sum(member.file_size for member in members.values())
    if total > _memory() // 2:
        raise DataError(
            f"{path}: its arrays take {total:,} bytes, this machine has {_memory():,} of memory"
        )
    if total > max(_HARMLESS, 100 * on_disk):
        raise DataError(
            f"{path}: {on_disk:,} bytes that expand to {total:,}: taken for a zip bomb; "
            "save it with numpy.savez, uncompressed"
        )


def _check_header(path: Path, name: str, file: IO[bytes], size: int) -> None:
    """Refuse an array whose header names another size than the archive does."""
    version = np.lib.format.read_magic(file)
    reader = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if reader is None:
        raise DataError(f"{path}: {name} is in .npy version {version}, not 1.0 or 2.0")
    shape, _, dtype = reader(file, max_header_size=_LONGEST_HEADER)
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds Python objects, not numbers")
    if any(length < 0 for length in shape):
        raise DataError(f"{path}: {name} has the shape {list(shape)}")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != size - file.tell():
        raise DataError(
            f"{path}: {name} is {dtype} of shape {list(shape)}, which needs {wanted:,} bytes; "
            f"the file has {size - file.tell():,}"
        )


def _memory() -> int:
    """Bytes of memory in this machine; 16 GiB where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 16 << 30
