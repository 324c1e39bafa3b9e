"""One run at a time in a folder."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from fedmap_sparse.errors import ConfigError

#: Errors that say that another process has the lock.
_TAKEN = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}
#: File systems without locks answer with one of these.
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


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
