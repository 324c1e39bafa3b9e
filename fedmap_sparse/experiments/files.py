"""How a run writes: every file whole or not at all, by one process at a time."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from fedmap_sparse import _command
from fedmap_sparse.errors import ConfigError

#: Errors that say that another process has the lock.
_TAKEN = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}
#: File systems without locks answer with one of these.
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


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
            os.replace(beside, path)  # noqa: PTH105
            _flush_folder(path.parent)
        except OSError as error:
            with suppress(OSError):
                os.unlink(beside)  # noqa: PTH108
            raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, data: bytes | bytearray) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
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


class Lock:
    """The lock file `path`, held from here to `release` or to the end of the process.

    The lock is the operating system's. The file stays: removing it would let two processes each
    lock a file of that name.

    Attributes:
        sure: False where the file system knows no locks, so that nothing is held.

    Raises:
        ConfigError: another process holds it; the message names it.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.sure = True
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _try_lock(self._descriptor)
            # A help to who is refused. The lock does not need it, so a full disk does not matter.
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
                os.write(self._descriptor, f"{os.getpid()}\n".encode())
        except OSError as error:
            self.sure = False
            if error.errno in _NO_LOCKS:
                return
            holder = os.read(self._descriptor, 20).decode("ascii", "replace").strip()
            self.release()
            if error.errno not in _TAKEN:
                raise
            who = f" (process {holder})" if holder.isdigit() else ""
            raise ConfigError(f"{path.parent}: another run is at work in it{who}") from None

    def release(self) -> None:
        """Let others in."""
        os.close(self._descriptor)


def _try_lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        # Beyond what is written, so that another process can read the number of the holder.
        os.lseek(descriptor, 1024, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
