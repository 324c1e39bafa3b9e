"""Clients trained in worker processes: the same bits, and one clear error where something dies."""

import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_federation import bits, make, make_bench, train
from torch import Tensor

from fedmap_sparse.engines.nursery import MOST, Nursery
from fedmap_sparse.engines.shared import SharedTensor
from fedmap_sparse.engines.workers import Workers
from fedmap_sparse.errors import WorkerDied
from fedmap_sparse.federated import RoundFailed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="worker processes want POSIX")


@contextmanager
def workers(make: Any, processes: int = 2, **options: Any) -> Iterator[Workers]:
    """Each process takes two seconds of CPU to start, so they are few."""
    pool = Workers(make, processes, **options)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# Of 12 clients a process gets three at once, which share a broadcast and its decoded message.
@pytest.mark.parametrize(
    ("processes", "keep", "dtype", "cohort", "least"),
    [(2, False, "float32", 5, 4), (1, True, "int8", 5, 4), (1, False, "float32", 12, 9)],
)
def test_the_bits_are_those_of_one_after_another(
    processes: int, keep: bool, dtype: str, cohort: int, least: int
) -> None:
    options: dict[str, Any] = {
        "keep": keep, "dtype": dtype, "cohort": cohort, "dropout": 0.3, "seed": 3,
        "min_updates": least,
    }  # fmt: skip
    number = cohort + 2
    alone = make(number, **options)
    with workers(partial(make_bench, keep=keep, dtype=dtype), processes) as pool:
        together = make(number, workers=pool, **options)
        draws = []
        for _ in range(6):
            one, other = alone.round(), together.round()
            assert one == other
            assert torch.equal(bits(alone.server.params), bits(together.server.params))
            assert same(*map(clients, (alone, together)))
            draws.append(one.attempts)
        assert max(draws) > 1  # a cohort whose answers were not used was put back
        later = make(number, **options)
        later.load_state_dict(together.state_dict())
        assert later.round() == together.round()
        assert torch.equal(bits(later.server.params), bits(together.server.params))
        assert together.phases["wait"] >= 0
        before = together.state_dict()
        together.server.min_updates = number + 1
        with pytest.raises(RoundFailed):
            together.round()
        assert not keep or same(before["clients"], together.state_dict()["clients"])
        pids = pool.pids
        pool.close()
        pool.close()
        assert all(map(is_gone, pids))
        assert not pool.ready()


def clients(engine: Any) -> Any:
    """Their states; a kept optimizer follows a new mask at its next step, a loaded one at once."""
    return [[name, {**s, "optimizer": None}] for name, s in engine.state_dict()["clients"]]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_workers_are_started_once_that_pays() -> None:
    with workers(make_bench, planned=1000) as pool:
        pool.spent(0.001)
        assert not pool.ready()
        pool.spent(1.0)
        engine, alone = make(2, workers=pool), make(2)
        while not pool.ready():
            engine.round()
            alone.round()
        engine.round()
        alone.round()
        assert "wait" in engine.phases
        assert torch.equal(bits(alone.server.params), bits(engine.server.params))


def raises(name: Any, client: Any, message: Any) -> Any:
    if name == 2:
        raise KeyError("no such thing")
    return train(name, client, message)


def dies(name: Any, client: Any, message: Any) -> Any:
    if name == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(name, client, message)


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(
    ("train", "error", "text"),
    [
        (raises, KeyError, "no such thing"),
        (dies, WorkerDied, r"worker process \d+ was ended by SIGKILL while training client 1; out"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_raised_and_ends_them_all(
    train: Any, error: type[Exception], text: str, processes: int
) -> None:
    with workers(partial(make_bench, train=train), processes) as pool:
        engine = make(4, workers=pool)
        assert pool.ready()
        pids = pool.pids
        assert len(set(pids)) == processes
        with pytest.raises(error, match=text) as caught:
            engine.round()
        assert all(map(is_gone, pids))
        if error is KeyError:
            assert "in raises" in caught.value.__notes__[0]
        # Nothing has changed, and the round can be had without them.
        assert all(client.have is None for client in engine.clients.values())
        alone = make(4)
        assert engine.round() == alone.round()


def alive(group: int) -> list[int]:
    """The processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            after_name = path.read_text().rpartition(")")[2].split()
            if int(after_name[2]) == group:
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is not there")
@pytest.mark.parametrize("when", ["importing", "ready"])
def test_workers_that_were_not_used_are_ended(when: str) -> None:
    pool = Workers(make_bench, 3)
    group = pool.pids[0]
    assert when == "importing" or pool.ready()
    assert len(alive(group)) == (1 if when == "importing" else 4)
    pool.close()
    assert not alive(group)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is not there")
def test_a_program_has_one_thread_when_it_forks() -> None:
    with workers(make_bench, 2, threads=2) as pool:
        assert pool.ready()
        group = os.getpgid(pool.pids[0])
        assert len(list(Path(f"/proc/{group}/task").iterdir())) == 1


def sleeps(link: Any) -> None:
    link.send_bytes(b"here")
    time.sleep(60)


@pytest.mark.parametrize("number", [1, 2] if MOST > 1 else [1])
def test_a_busy_nursery_ends_at_once_where_its_caller_ignores_sigterm(number: int) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        nursery = Nursery(sleeps, number)
        for connection in nursery.connections:
            assert connection.recv_bytes() == b"here"
        start = time.monotonic()
        nursery.end()
        assert time.monotonic() - start < 30
    finally:
        signal.signal(signal.SIGTERM, before)
        for connection in nursery.connections:
            connection.close()


def unmakeable() -> Any:
    raise RuntimeError("cannot be made here")


def test_what_cannot_be_made_says_so() -> None:
    with (
        workers(unmakeable, processes=1) as pool,
        pytest.raises(RuntimeError, match="cannot be made here"),
    ):
        make(2, workers=pool).round()


@pytest.mark.parametrize("name", ["processes", "threads"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        Workers(make_bench, **{"processes": 2, "threads": 1, name: 0})


def test_a_server_with_keys_trains_here() -> None:
    with workers(make_bench, planned=1) as pool:
        plain = make(2)
        plain.server.keys = {0: bytes(32), 1: bytes(32)}
        with pytest.raises(ValueError, match="workers: expected a server without keys"):
            type(plain)(plain.server, plain.clients, train, workers=pool)


def test_shared_tensors_are_mapped_not_copied() -> None:
    shared = SharedTensor((2, 3), torch.float32)
    assert torch.equal(shared.tensor, torch.zeros(2, 3))
    descriptor = os.dup(shared.descriptor)
    loaded = pickle.loads(pickle.dumps(shared))
    loaded.tensor[1, 2] = 5
    assert shared.tensor[1, 2] == 5
    loaded.descriptor = descriptor  # in one process both would close the same one
    assert SharedTensor((0, 4), torch.int64).tensor.shape == (0, 4)
