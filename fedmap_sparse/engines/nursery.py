"""New processes that have imported all they need: one program imports, and forks them.

The caller's process is not forked: it may have threads, and a fork of it may hang. Nor is it
`multiprocessing` that starts them, which would import the caller's script a second time. The
program has one thread while it forks. Importing torch takes 2 s of CPU and 150 MB, which all of its
processes share.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection

#: How many processes one program may fork. macOS's own libraries do not bear a fork.
MOST = 1 << 10 if sys.platform == "linux" else 1
_PATIENCE_S = 5.0
_PROGRAM = """
import json, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the caller may ignore it
given = json.loads(sys.argv[1])
sys.path[:] = given["path"]
from fedmap_sparse.engines import nursery
nursery.raise_them(given["target"], given["links"], given["tell"])
"""


class Nursery:
    """One program and its processes; with one, the program itself is the process.

    Args:
        target: a function of a module: called in each process with its end of a connection.
        number: of processes, at most `MOST`.
        descriptors: that they inherit, under the same numbers.

    Attributes:
        connections: one to each process, from when it is started; they are the caller's to close.
    """

    def __init__(
        self, target: Callable[[Connection], None], number: int, descriptors: Sequence[int] = ()
    ) -> None:
        pairs = [socket.socketpair() for _ in range(number)]
        links = [theirs.fileno() for _, theirs in pairs]
        self._told, tell = os.pipe()
        given = {
            "path": sys.path,
            "target": [target.__module__, target.__qualname__],
            "links": links,
            "tell": tell,
        }
        self._program = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(given)],
            stdin=subprocess.DEVNULL,
            pass_fds=[*links, tell, *descriptors],
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # numpy's BLAS would start threads
            process_group=0,  # Ctrl-C is for the parent, which ends them
        )
        os.close(tell)
        self._codes: dict[int, int] = {}
        self.connections = []
        for ours, theirs in pairs:
            theirs.close()
            self.connections.append(Connection(ours.detach()))

    @property
    def pid(self) -> int:
        """Of the program."""
        return self._program.pid

    def code(self, pid: int) -> int | None:
        """The exit code of a process or the program that ended; None if it is not known in 5 s."""
        if pid == self.pid:
            with suppress(subprocess.TimeoutExpired):
                return self._program.wait(_PATIENCE_S)
            return None
        told = select.poll()
        told.register(self._told, select.POLLIN)
        while pid not in self._codes and told.poll(1e3 * _PATIENCE_S):
            lines = os.read(self._told, 1 << 12).decode()
            if not lines:  # the program has ended
                break
            for line in lines.splitlines():
                ended, code = map(int, line.split())
                self._codes[ended] = code
        return self._codes.get(pid)

    def end(self) -> None:
        """End the program and its processes."""
        self._program.terminate()
        self._program.wait()
        os.close(self._told)


def raise_them(target: Sequence[str], links: Sequence[int], tell: int) -> None:
    """What the program does: fork a process for each link, and tell what becomes of them."""
    module, name = target
    serve: Callable[[Connection], None] = getattr(import_module(module), name)
    if len(links) == 1:
        serve(Connection(links[0]))
        return
    running: set[int] = set()

    def end(*_: object) -> None:
        for pid in running:
            os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until all are in `running`
    for link in links:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            for other in {*links, tell} - {link}:  # each end closes with its one process
                os.close(other)
            serve(Connection(link))
            return
        running.add(pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for link in links:
        os.close(link)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        with suppress(BrokenPipeError):
            os.write(tell, f"{pid} {os.waitstatus_to_exitcode(status)}\n".encode())
