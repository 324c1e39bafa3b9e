"""Files: looked at before they are read, written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from fedmap_sparse import _command

_BINARY: int = getattr(os, "O_BINARY", 0)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path | str) -> tuple[int, int]:
    """Open an ordinary file for reading: its descriptor, which the caller closes, and its size.

    A pipe would block and a device never end, so both are refused, at once.

    Raises:
        OSError: no such file, no ordinary one, or a path that no file can have.
    """
    try:
        # Without O_NONBLOCK the open itself would wait for a pipe's writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    except ValueError as error:  # a NUL in the path, or text that the file system cannot encode
        raise OSError(errno.EINVAL, f"not a path: {error}", str(path)) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"expected an ordinary file, got {kind}", str(path))
    return descriptor, status.st_size


def read_regular(path: Path | str, most: int) -> bytes:
    """All of an ordinary file of at most `most` bytes.

    Raises:
        OSError: as `open_regular`, or a file that is larger; none of it is read then.
    """
    descriptor, size = open_regular(path)
    with open(descriptor, "rb") as stream:  # noqa: PTH123  # closes the descriptor
        if size <= most:
            data = stream.read(most + 1)
            if len(data) <= most:
                return data
            size = len(data)
        raise OSError(errno.EFBIG, f"expected at most {most:,} bytes, got {size:,}", str(path))


def write_atomically(path: Path, data: bytes | bytearray, keep: Path | None = None) -> None:
    """Write `path` so that a reader, a crash or a full disk finds the old file or the new one.

    The data go to a file beside it, on to the disk, and then under its name. With `keep` the old
    file goes there; between the two renames `keep` alone is there.

    Raises:
        OSError: with `path` as its file; the old file is untouched.
    """
    beside = path.with_name(f".{path.name}.partial")
    with _command.held():
        try:
            _write(beside, data)
            if keep is not None:
                with suppress(FileNotFoundError):
                    os.replace(path, keep)  # noqa: PTH105  # counted and failed by the crash tests
            os.replace(beside, path)  # noqa: PTH105  # counted and failed by the crash tests
            _flush_folder(path.parent)
        except OSError as error:
            with suppress(OSError):
                os.unlink(beside)  # noqa: PTH108  # counted likewise
            raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, data: bytes | bytearray) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY
    descriptor = os.open(path, flags, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    """A rename is on the disk once its folder is; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
