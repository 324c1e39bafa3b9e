"""Server and clients in one process: clients run one after another, over real messages::

    server.begin_round()
    for each client of the cohort:
        client.receive(server.broadcast(what the client has))
        train
        updates += client.update(...)
    server.aggregate(updates)

Every message is encoded, held as bytes, and decoded; traffic is the `len` of each. A broadcast that
several clients get, to the byte, is decoded once. With `workers` several clients train at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np
from numpy.random import Generator

from fedmap_sparse.codec import Message
from fedmap_sparse.codec.container import bytes_by_kind
from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.engines.workers import Job, Train, Workers
from fedmap_sparse.federated import (
    ClientId,
    FedMapClient,
    FedMapServer,
    NeedsMask,
    RoundFailed,
    RoundResult,
)
from fedmap_sparse.federated import state as saved


@dataclass(frozen=True)
class Round:
    """One round through the engine.

    Attributes:
        result: what the server made of it: accepted and refused updates, loss, uplink bytes.
        cohort: the clients that were sent the broadcast, in ascending order.
        dropped: those of the cohort that never answered.
        downlink_bytes: `len` of every message to a client, sent anew or not, in every attempt.
        uplink_bytes: `len` of every update that was sent, refused ones and those of earlier
            attempts too.
        attempts: how often the cohort was drawn: 1 unless too few answered.
        kinds: the same bytes by direction and kind, such as "downlink mask" or "uplink values".
    """

    result: RoundResult
    cohort: tuple[ClientId, ...]
    dropped: tuple[ClientId, ...]
    downlink_bytes: int
    uplink_bytes: int
    attempts: int = 1
    kinds: Mapping[str, int] = field(default_factory=dict)

    def with_messages_of(self, other: Round) -> Round:
        """This round with the bytes of another one added."""
        return replace(
            self,
            downlink_bytes=self.downlink_bytes + other.downlink_bytes,
            uplink_bytes=self.uplink_bytes + other.uplink_bytes,
            kinds=dict(Counter(self.kinds) + Counter(other.kinds)),
        )


class InProcessEngine:
    """Runs the rounds of a `FedMapServer` over clients in this process.

    Args:
        server: its round counter is the engine's.
        clients: by id, all ints or all strings. They may share one FlatParameters, so that a
            thousand clients cost one model: a client's weights and buffers come with each
            broadcast, and between rounds it has nothing but its mask (and a kept optimizer).
        train: trains the client's module in place after each `receive`. With `client.optimizer`,
            or without.
        cohort: how many clients take part in a round, drawn at random; None: all.
        dropout: probability that a client of the cohort receives the broadcast and then never
            answers.
        attempts: how often a round's cohort is drawn before the round fails for good. It is drawn
            again where too few usable updates came and another draw can differ: a client dropped
            out, or not every client was in the cohort.
        seed: the cohort and the dropouts of a round depend on this, the round and the attempt
            alone, so an engine that resumes needs no random state.
        phases: seconds are added to it: `select` (`begin_round`: selection, pruning, packing the
            broadcast's values), `encode` (`broadcast`, `update`), `decode` (`receive`) and
            `aggregate` (with decoding and checking every update). `train` may add its own. Those
            of workers are divided by their number; `wait` is when not all of them had work.
        sizes: of each client. A cohort is then drawn in proportion to them, without replacement,
            and all updates count alike in the mean (Li et al. 2020, arXiv 1907.02189, scheme II,
            which draws with replacement). None: all clients are as likely.
        workers: train the clients, as soon as they are ready; until then, and with None, clients
            train here, one after another. The bits are the same.

    Raises:
        ValueError: no clients, a cohort outside 1 to their number, a dropout outside 0 <= p < 1,
            no attempts, workers for clients or a server with keys.

    Attributes:
        attempt: draws of the round in progress that failed. It is part of `state_dict`, so that a
            federation that goes on after `RoundFailed` draws anew.
    """

    def __init__(
        self,
        server: FedMapServer,
        clients: Mapping[ClientId, FedMapClient],
        train: Train,
        *,
        cohort: int | None = None,
        dropout: float = 0.0,
        attempts: int = 5,
        seed: int = 0,
        phases: Phases | None = None,
        workers: Workers | None = None,
        sizes: Mapping[ClientId, int] | None = None,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts: expected at least 1, got {attempts}")
        if workers is not None and server.keys is not None:
            raise ValueError("workers: expected a server without keys, got one with keys")
        self.cohort = check_draw(len(clients), cohort, dropout)
        self.server = server
        self.clients = dict(clients)
        self.train = train
        self.dropout = dropout
        self.attempts = attempts
        self.attempt = 0
        self.seed = seed
        self.phases = Phases() if phases is None else phases
        self._kinds: Counter[str] = Counter()
        self.workers = workers
        self.sizes = sizes
        self._messages: dict[Any, Message] = {}  # of this round, by what their receivers had

    def draw(self, at_round: int, attempt: int = 0) -> tuple[list[ClientId], set[ClientId]]:
        """The cohort of a round, ascending, and those of it that will not answer."""
        return draw(
            self.clients, at_round, self.cohort, self.dropout, self.seed, attempt, self.sizes
        )

    def round(self) -> Round:
        """One round, from `begin_round` to `aggregate`, in at most `attempts` draws.

        A client whose answer was not used is as it was before: its error feedback and kept
        optimizer are put back.

        Raises:
            RoundFailed: fewer usable updates than the server's `min_updates` in every draw; model
                and clients are as they were, and another call draws anew.
        """
        with self.phases("select"):
            self.server.begin_round()
        self._kinds.clear()
        downlink = uplink = 0
        for left in reversed(range(self.attempts)):
            cohort, silent = self.draw(self.server.round, self.attempt)
            before = [(c, c.state_dict()) for c in self._stateful(cohort)]
            updates, sent = self._exchange(cohort, silent)
            downlink += sent
            uplink += sum(self._count("uplink", data) for _, data in updates)
            try:
                with self.phases("aggregate"):
                    weights = None if self.sizes is None else dict.fromkeys(self.clients, 1)
                    result = self.server.aggregate(updates, weights=weights)
            except RoundFailed:
                self.attempt += 1
                for client, state in before:
                    client.optimizer = None
                    client.load_state_dict(state)
                if not left or not (silent or len(cohort) < len(self.clients)):
                    raise
                continue
            break
        attempts, self.attempt = self.attempt + 1, 0
        dropped = tuple(c for c in cohort if c in silent)
        kinds = dict(self._kinds)
        return Round(result, tuple(cohort), dropped, downlink, uplink, attempts, kinds)

    def _count(self, direction: str, data: bytes) -> int:
        """The length of a message, which is added to what is known by kind."""
        count_kinds(self._kinds, direction, data)
        return len(data)

    def _stateful(self, cohort: list[ClientId]) -> list[FedMapClient]:
        """The clients whose answer changes what they carry into the next round."""
        clients = (self.clients[name] for name in cohort)
        return [c for c in clients if c.keep_optimizer or c.dtype == "int8"]

    def _exchange(
        self, cohort: list[ClientId], silent: set[ClientId]
    ) -> tuple[list[tuple[ClientId, bytes]], int]:
        """Send the broadcast to a cohort and gather its updates; those, and the bytes sent."""
        updates: list[tuple[ClientId, bytes]] = []
        downlink = 0
        self._messages = {}
        for place, name in enumerate(cohort):
            if self.workers is not None and self.workers.ready():
                came, sent = self._in_workers(self.workers, cohort[place:], silent)
                return [*updates, *came], downlink + sent
            client = self.clients[name]
            message, size = self._send(name, client)
            downlink += size
            if name in silent:
                continue
            start = perf_counter()
            num_samples, loss = self.train(name, client, message)
            with self.phases("encode"):
                updates.append((name, client.update(num_samples, loss)))
            if not client.keep_optimizer:
                client.optimizer = None  # else its state would lie idle until the next receive
            if self.workers is not None:
                self.workers.spent(perf_counter() - start)
        return updates, downlink

    def _in_workers(
        self, workers: Workers, cohort: Sequence[ClientId], silent: set[ClientId]
    ) -> tuple[list[tuple[ClientId, bytes]], int]:
        """As `_exchange`, where the workers train."""
        downlink = 0
        for name in cohort:
            if name in silent:
                downlink += self._send(name, self.clients[name])[1]
        trained = [name for name in cohort if name not in silent]
        start, before = perf_counter(), sum(self.phases.values())
        updates = []
        sent: dict[ClientId, bytes] = {}
        jobs = self._jobs(trained, sent)
        # All of them, before any client changes: a worker may die.
        for done in list(workers.run(jobs, len(trained), self.phases)):
            client = self.clients[done.name]
            if done.state is None:
                client.follow(self.server.mask, self.server.round, self.server.epoch)
            else:
                client.load_state_dict(done.state)
            updates.append((done.name, done.update))
            downlink += self._count("downlink", sent[done.name])
        idle = perf_counter() - start - (sum(self.phases.values()) - before)
        self.phases["wait"] = self.phases.get("wait", 0.0) + max(idle, 0.0)
        return updates, downlink

    def _jobs(self, names: Iterable[ClientId], sent: dict[ClientId, bytes]) -> Iterator[Job]:
        """What a worker has to know of each client; one object for all that know the same.

        Args:
            sent: the broadcast of each is added to it.
        """
        states: dict[bytes | None, dict[str, Any]] = {}
        stateful = {id(c) for c in self._stateful(list(names))}
        for name in names:
            client = self.clients[name]
            with self.phases("encode"):
                data = sent[name] = self.server.broadcast(client.have)
            if id(client) in stateful:
                yield Job(name, data, client.state_dict(), stateful=True)
                continue
            if client.have not in states:
                states[client.have] = client.state_dict()
            yield Job(name, data, states[client.have], stateful=False)

    def _send(self, name: ClientId, client: FedMapClient) -> tuple[Message, int]:
        """Send the broadcast until the client can use it; the message and the bytes it took."""
        sent = 0
        have = client.have
        # A server with keys seals each message for its receiver.
        addressed = {} if self.server.keys is None else {"client": name}
        while True:
            with self.phases("encode"):
                data = self.server.broadcast(have, **addressed)
            sent += self._count("downlink", data)
            key = (have, client.params.values.device)
            known = None if addressed else self._messages.get(key)
            try:
                with self.phases("decode"):
                    message = client.receive(data if known is None else known)
            except NeedsMask as error:
                if error.have == have:  # it was sent what it needs: a retry cannot help
                    raise
                have = error.have
                continue
            self._messages[key] = message
            return message, sent

    def state_dict(self) -> dict[str, Any]:
        """Server and clients between rounds; see their own `state_dict`."""
        return {
            "attempt": self.attempt,
            "server": self.server.state_dict(),
            "clients": [[name, self.clients[name].state_dict()] for name in sorted(self.clients)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, with the same clients.

        Raises:
            ValueError: other clients, or a state that does not fit server or client; nothing is
                changed.
        """
        attempt = saved.count(state, "attempt")
        clients: Sequence[tuple[ClientId, dict[str, Any]]] = saved.field(state, "clients", list)
        if [name for name, _ in clients] != sorted(self.clients):
            wanted, got = len(self.clients), len(clients)
            raise ValueError(f"clients: expected the {wanted} of this engine, got {got} others")
        before = {name: client.state_dict() for name, client in self.clients.items()}
        try:
            for name, own in clients:
                self.clients[name].load_state_dict(own)
            self.server.load_state_dict(saved.field(state, "server", dict))
        except ValueError:
            for name, own in before.items():
                self.clients[name].load_state_dict(own)
            raise
        self.attempt = attempt


def count_kinds(kinds: Counter[str], direction: str, data: bytes) -> None:
    """Add a message's bytes to those of its direction, by kind."""
    kinds.update({f"{direction} {k}": n for k, n in bytes_by_kind(data).items() if n})


def check_draw(clients: int, cohort: int | None, dropout: float) -> int:
    """The size of a cohort, None being all; ValueError as in `InProcessEngine`."""
    if not clients:
        raise ValueError("clients: expected at least one, got none")
    size = clients if cohort is None else cohort
    if not 1 <= size <= clients:
        raise ValueError(f"cohort: expected 1 to {clients} clients, got {size}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
    return size


def draw(
    clients: Iterable[ClientId],
    at_round: int,
    cohort: int,
    dropout: float,
    seed: int,
    attempt: int = 0,
    sizes: Mapping[ClientId, int] | None = None,
) -> tuple[list[ClientId], set[ClientId]]:
    """The cohort of a round, ascending, and those of it that will not answer.

    It depends on the arguments alone, so that every process of a run can draw it. The first draw
    of a round is from (seed, 0, round), further ones from (seed, 0, round, attempt). With `sizes`
    the cohort is drawn in proportion to them.
    """
    rng = generator(seed, 0, at_round, *([attempt] if attempt else []))
    ids = sorted(clients)
    if sizes is None:
        places = rng.permutation(len(ids))[:cohort]
    else:
        shares = np.array([sizes[name] for name in ids], float)
        places = rng.choice(len(ids), cohort, replace=False, p=shares / shares.sum())
    chosen = [ids[i] for i in np.sort(places)]
    silent = rng.random(cohort) < dropout
    return chosen, {c for c, lost in zip(chosen, silent, strict=True) if lost}


def generator(*key: int) -> Generator:
    """A random generator that depends on `key` alone: non-negative ints, such as (seed, round).

    With one for each purpose, round and client, a run needs no random state to resume, and the
    order in which clients run changes nothing.
    """
    return np.random.default_rng(np.random.SeedSequence(key))
