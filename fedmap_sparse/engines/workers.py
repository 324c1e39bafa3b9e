"""Processes that train the clients of an `InProcessEngine`, several at once, to the same bits.

Each worker is a new Python with a client and a `train` of its own. A client comes to it as its
state and the bytes of the broadcast, and leaves as the bytes of its update and its new state, so
any worker can train any client, and the engine's own clients are always up to date.
"""

from __future__ import annotations

import os
import pickle  # between a run and processes that it started itself, over their own socket
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fedmap_sparse.codec import Message
from fedmap_sparse.engines.nursery import MOST, Nursery
from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.engines.shared import SharedTensor
from fedmap_sparse.errors import WorkerDied
from fedmap_sparse.federated import ClientId, FedMapClient

#: `(client id, client, the broadcast it received) -> (samples, mean loss)`: one local training.
Train = Callable[[ClientId, FedMapClient, Message], tuple[int, float | None]]

#: Seconds of training that workers must save before they are started: the import of torch takes two
#: seconds of CPU.
WORTH = 3.0


@dataclass(frozen=True)
class Bench:
    """What a worker trains with.

    Attributes:
        client: takes on the state of each client in turn.
        train: as the engine's.
        phases: seconds that `train` adds to.
    """

    client: FedMapClient
    train: Train
    phases: Phases


@dataclass(frozen=True)
class Job:
    """A client to be trained.

    Attributes:
        data: the broadcast.
        state: of the client.
        stateful: whether its new state is wanted, beside its update.
    """

    name: ClientId
    data: bytes
    state: dict[str, Any]
    stateful: bool


@dataclass(frozen=True)
class Trained:
    """A client's answer; `state` is None unless the job asked for it."""

    name: ClientId
    update: bytes
    state: dict[str, Any] | None


class Workers:
    """A pool of worker processes for `InProcessEngine(workers=...)`.

    Bits do not depend on it, as long as `threads` is what the engine's process has: so it may be
    decided by the clock whether the processes are started at all.

    Args:
        make: called once in each worker: its client and its training. Pickled, so a function of a
            module with arguments that can be pickled; a SharedTensor costs nothing.
        processes: how many clients are trained at once.
        threads: of torch and the kernels in each.
        shared: the SharedTensors among the arguments of `make`.
        planned: how many trainings there will be. The workers are started once what is left takes
            `WORTH` seconds longer without them, by the time of those that were done. None: at once.

    Raises:
        ValueError: less than one process or thread.
    """

    def __init__(
        self,
        make: Callable[[], Bench],
        processes: int,
        *,
        threads: int = 1,
        shared: Sequence[SharedTensor] = (),
        planned: int | None = None,
    ) -> None:
        for name, value in (("processes", processes), ("threads", threads)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.processes = processes
        self._threads = threads
        self._make = make
        self._shared = shared
        self._planned = planned
        self._links: list[_Link] = []
        self._nurseries: list[Nursery] = []
        if planned is None:
            self.start()

    @property
    def pids(self) -> list[int]:
        """Of the processes that were started."""
        return [link.pid for link in self._links]

    def start(self) -> None:
        """Start the processes; they get ready on their own."""
        ambient = {
            "threads": self._threads,
            "dtype": torch.get_default_dtype(),
            "precision": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        setup = pickle.dumps((ambient, self._make))
        descriptors = [s.descriptor for s in self._shared]
        while left := self.processes - len(self._links):
            nursery = Nursery(serve, min(left, MOST), descriptors)
            self._nurseries.append(nursery)
            self._links += [_Link(nursery, c, setup) for c in nursery.connections]

    def spent(self, seconds: float) -> None:
        """One training was done without the workers: they are started if that pays from now on."""
        if self._planned is None or self._links:
            return
        self._planned -= 1
        if self._planned * seconds * (1 - 1 / self.processes) > WORTH:
            self.start()

    def ready(self) -> bool:
        """Whether jobs can be given to them. Workers that were asked for are waited for."""
        if not self._links:
            return False
        try:
            for link in self._links:
                link.go_on(block=self._planned is None)
            return all(link.is_ready for link in self._links)
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Iterable[Job], count: int, phases: Phases) -> Iterator[Trained]:
        """Train clients, as many at once as there are processes; answers come as they are ready.

        Args:
            count: how many jobs there are.
            phases: the workers' seconds are added, divided by the number of processes.

        Raises:
            WorkerDied: a worker ended by itself.
            Exception: what `train` raised, the first of them.
            In each case, and where the caller stops early, the processes are ended.
        """
        left, whole = iter(jobs), False
        # Several at once, as a message costs 0.2 ms; few enough that all end at the same time.
        size = max(1, count // (4 * self.processes))
        idle = list(self._links)
        busy: dict[int, _Link] = {}
        try:
            while True:
                while idle and (chunk := list(islice(left, size))):
                    link = idle.pop()
                    link.give(chunk)
                    busy[link.fileno()] = link
                if not busy:
                    break
                for ready in wait(list(busy)):
                    assert isinstance(ready, int)
                    link = busy.pop(ready)
                    answers, seconds = link.take()
                    idle.append(link)
                    for name, value in seconds.items():
                        phases[name] = phases.get(name, 0.0) + value / self.processes
                    yield from answers
            whole = True
        finally:
            if not whole:
                self.close()

    def close(self) -> None:
        """End the processes; may be called twice."""
        for link in self._links:
            link.close()
        for nursery in self._nurseries:
            nursery.end()
        self._links, self._nurseries = [], []


class _Link:
    """One worker process, from its parent's side.

    Args:
        setup: what it makes its bench of. It is sent once the process has imported all, which takes
            seconds: a socket does not hold it, and the parent goes on meanwhile.

    Attributes:
        pid: of the program that will start it, at first.
        is_ready: whether it can be given jobs.
    """

    def __init__(self, nursery: Nursery, connection: Connection, setup: bytes) -> None:
        self._nursery = nursery
        self._connection = connection
        self._setup = setup
        self._names: list[ClientId] = []
        self.pid = nursery.pid
        self.is_ready = False

    def fileno(self) -> int:
        return self._connection.fileno()

    def go_on(self, *, block: bool) -> None:
        """Towards being ready."""
        while not self.is_ready and self._connection.poll(None if block else 0):
            pid = self._receive()
            if pid is None:
                self.is_ready = True
            else:
                self.pid = pid
                self.send(self._setup)

    def give(self, jobs: Sequence[Job]) -> None:
        self._names = [job.name for job in jobs]
        self.send(pickle.dumps(jobs))  # what several jobs share is in it once

    def take(self) -> tuple[list[Trained], dict[str, float]]:
        found: tuple[list[Trained], dict[str, float]] = self._receive()
        return found

    def send(self, data: bytes) -> None:
        try:
            self._connection.send_bytes(data)
        except OSError as error:
            raise self._died() from error

    def _receive(self) -> Any:
        try:
            data = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._died() from error
        kind, value = pickle.loads(data)  # from the worker that this process started
        if kind == "raised":
            raise value
        return value

    def _died(self) -> WorkerDied:
        code = self._nursery.code(self.pid)
        how = "closed its connection" if code is None else f"ended with code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        doing = f"training client {', '.join(map(str, self._names))}" if self._names else "starting"
        return WorkerDied(
            f"worker process {self.pid} {how} while {doing}; out of memory? "
            "processes=1 trains one client after another"
        )

    def close(self) -> None:
        self._connection.close()


def serve(link: Connection) -> None:
    """What a worker process does, until its parent goes."""
    with suppress(EOFError, OSError):
        try:
            _serve(link)
        except (EOFError, OSError):
            raise
        except Exception as error:  # whatever it is, the parent raises it
            link.send_bytes(_raised(error))


def _raised(error: Exception) -> bytes:
    """An exception for the parent; its traceback goes along as a note."""
    error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
    try:
        data = pickle.dumps(("raised", error))
        pickle.loads(data)  # of the line above: whether the parent will be able to
    except Exception:  # an exception of the user's may be one that cannot be pickled
        text = f"{type(error).__name__}: {error}"
        return pickle.dumps(("raised", RuntimeError(text)))
    return data


def _serve(link: Connection) -> None:
    link.send_bytes(pickle.dumps(("here", os.getpid())))
    ambient, make = pickle.loads(link.recv_bytes())  # from the process that started this one
    torch.set_num_threads(ambient["threads"])
    torch.set_default_dtype(ambient["dtype"])
    torch.set_float32_matmul_precision(ambient["precision"])
    if ambient["deterministic"]:  # off in a new process; the call imports the compiler, for 2 s
        torch.use_deterministic_algorithms(True)
    bench: Bench = make()
    link.send_bytes(pickle.dumps(("ready", None)))
    while True:
        jobs: list[Job] = pickle.loads(link.recv_bytes())  # likewise
        bench.phases.clear()
        answers = []
        before: tuple[bytes, Message] | None = None
        for job in jobs:
            client = bench.client
            with bench.phases("decode"):
                client.load_state_dict(job.state)
                known = before[1] if before and job.data is before[0] else job.data
                message = client.receive(known)
            before = job.data, message
            answers.append(_trained(bench, job, message))
        link.send_bytes(pickle.dumps(("done", (answers, dict(bench.phases)))))


def _trained(bench: Bench, job: Job, message: Message) -> Trained:
    client = bench.client
    num_samples, loss = bench.train(job.name, client, message)
    with bench.phases("encode"):
        update = client.update(num_samples, loss)
    state = client.state_dict() if job.stateful else None
    return Trained(job.name, update, state)
