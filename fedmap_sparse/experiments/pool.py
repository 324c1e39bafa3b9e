"""Runs in processes of their own, each with its share of the cores.

A worker is a spawned process that takes one run after another, so that importing torch is paid for
once. Checkpoints make it safe to kill one at any time, and that is how all of them end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

from fedmap_sparse.experiments.report import ARM_NAMES

#: A run's name and its options, for `config.build`.
Task = tuple[str, dict[str, Any]]
LOG = "log.txt"


def work(
    tasks: Sequence[Task],
    *,
    processes: int,
    threads: int,
    overwrite: bool,
    rounds: bool,
    tell: Callable[[str], None],
) -> dict[str, str]:
    """Run every task; name to reason of those that failed. Ctrl-C ends all processes.

    Args:
        threads: of each process, where a run's options name none.
        overwrite: start runs anew instead of going on with them.
        rounds: tell each round.
        tell: is told, in one line each, how runs went.
    """
    context = multiprocessing.get_context("spawn")
    left, failed = deque(tasks), dict[str, str]()
    workers = [_Worker(context, threads) for _ in range(min(processes, len(tasks)))]
    ended = 0
    try:
        for worker in workers:
            worker.give(left.popleft(), overwrite, rounds)
        while busy := [worker for worker in workers if worker.task]:
            ready = wait([worker.connection for worker in busy])
            for worker in (w for w in busy if w.connection in ready):
                name = worker.task
                kind, text = worker.hear()
                if kind == "round":
                    tell(f"{name}: {text}")
                    continue
                ended += 1
                if kind != "done":
                    failed[name] = text
                tell(f"{ended}/{len(tasks)}  {name}: {'' if kind == 'done' else 'failed: '}{text}")
                worker.task = ""
                if kind == "died":
                    workers[workers.index(worker)] = worker = _Worker(context, threads)
                if left:
                    worker.give(left.popleft(), overwrite, rounds)
    finally:
        for worker in workers:
            worker.end()
    return failed


class _Worker:
    """A process, and the run that it is at; an empty name where it has none."""

    def __init__(self, context: SpawnContext, threads: int) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads))
        with _no_interrupt():
            self.process.start()
        theirs.close()
        self.task = ""

    def give(self, task: Task, overwrite: bool, rounds: bool) -> None:
        self.task = task[0]
        with contextlib.suppress(OSError):  # it died: `hear` says so
            self.connection.send((task[1], overwrite, rounds))

    def hear(self) -> tuple[str, str]:
        try:
            kind, text = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return "died", f"its process ended by {how}; where memory gave out, fewer jobs help"
        return kind, text

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C waits until the end, and never reaches a process that is started within.

    A terminal sends it to every process of the command; the first one alone is to answer.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # The first process of all starts this one too, which would let Ctrl-C through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, threads: int) -> None:
    """The worker: one run after another, until the connection is closed."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            values, overwrite, rounds = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(connection, values, overwrite, rounds))


def _end_with_parent() -> None:
    """A killed command must not leave its runs at work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _outcome(
    connection: Connection, values: dict[str, Any], overwrite: bool, rounds: bool
) -> tuple[str, str]:
    """One run, with its lines in log.txt; how it ended."""
    from fedmap_sparse.errors import FedMapError
    from fedmap_sparse.experiments import progress, runner
    from fedmap_sparse.experiments.config import build
    from fedmap_sparse.experiments.folder import Record

    class Watch(progress.Lines):
        def round(self, record: Record) -> None:
            super().round(record)
            if rounds:
                connection.send(("round", self.line(record)))

    config = build(values)
    try:
        log = _log(config.folder, overwrite)
        with log, contextlib.redirect_stdout(log):
            try:
                summary = runner.run(
                    config, resume=not overwrite, overwrite=overwrite, observer=Watch()
                )
            except Exception as error:
                if not isinstance(error, FedMapError | OSError):
                    traceback.print_exc(file=log)
                print(f"failed: {error}", file=log)
                raise
    except Exception as error:
        text = " ".join(str(error).split("\n")) or type(error).__name__
        return "failed", text if isinstance(
            error, FedMapError
        ) else f"{text} ({config.folder / LOG})"
    return "done", "; ".join(
        f"{ARM_NAMES[name]} {arm['accuracy']:.2%} of test, {arm['seconds']:.1f} s"
        + ("".join(f", {line}" for line in arm["starving"][:1]))
        for name, arm in summary.items()
    )


def _log(folder: Path, anew: bool) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / LOG).open("w" if anew else "a")
