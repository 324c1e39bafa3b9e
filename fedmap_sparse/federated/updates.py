"""A round's updates as they come from outside: ids, bytes, claims."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedmap_sparse import _checks
from fedmap_sparse.codec import meta
from fedmap_sparse.codec.container import MAX_INTEGER, NO_DIGEST, as_bytes, parse_header
from fedmap_sparse.codec.envelope import unseal
from fedmap_sparse.errors import AuthenticationError

ClientId = int | str
Bytes = bytes | bytearray | memoryview

#: Without `max_samples` a claim counts at most this many times the median claim.
TIMES_MEDIAN = 10


@dataclass
class Collected:
    """A round's updates by client.

    Attributes:
        messages: each client's that differ, out of their envelopes.
        unproved: clients of whom nothing but messages without a good envelope came, and why.
        size: the bytes of all.
    """

    messages: dict[ClientId, list[object]]
    unproved: dict[ClientId, str]
    size: int


def collected(
    updates: Iterable[tuple[ClientId, Bytes]], opened: Callable[[ClientId, object], object]
) -> Collected:
    """The updates, each `opened`: what is not proved does not count against its client's own."""
    found: dict[ClientId, list[object]] = {}
    unproved: dict[ClientId, str] = {}
    total = 0
    for client, sealed in updates:
        total += size(sealed)
        try:
            data = opened(client, sealed)
        except (ValueError, TypeError) as error:
            unproved[client] = str(error)
            continue
        own = found.setdefault(client, [])
        if not any(_equal(data, other) for other in own):
            own.append(data)
    return Collected(found, {c: why for c, why in unproved.items() if c not in found}, total)


def opener(
    keys: Mapping[ClientId, bytes] | None, at_round: int
) -> Callable[[ClientId, object], object]:
    """A function that opens the envelope of an update; without keys it returns its argument."""

    def opened(client: ClientId, data: object) -> object:
        if keys is None:
            return data
        if client not in keys:
            raise AuthenticationError(f"envelope: expected a key for client {client!r}, got none")
        return unseal(held(data), keys[client], client, at_round, "update")

    return opened


def size(data: object) -> int:
    """The bytes of a message; 0 for what is none."""
    try:
        return memoryview(data).nbytes if isinstance(data, bytes | bytearray | memoryview) else 0
    except ValueError:  # a view whose memory was released
        return 0


def held(data: object) -> bytes:
    """The message as bytes, which cannot change after they were checked.

    Raises:
        TypeError: it is not bytes, bytearray or a contiguous memoryview.
        ValueError: it is a memoryview that was released.
    """
    return data if type(data) is bytes else bytes(as_bytes(data))


def _equal(a: object, b: object) -> bool:
    if a is b:
        return True
    try:
        return size(a) == size(b) and held(a) == held(b)
    except (TypeError, ValueError):
        return False


def cap(messages: Iterable[object], answers: bytes) -> int | None:
    """Ten times the median of the samples that answers to a broadcast claim; None for none."""
    claims = []
    for data in messages:
        try:
            header, _, _ = parse_header(held(data)[:128])
        except (ValueError, TypeError):
            continue  # it will be refused
        if header.samples and header.answers == answers != NO_DIGEST:
            claims.append(header.samples)
    return TIMES_MEDIAN * median(claims) if claims else None


def median(claims: Sequence[int]) -> int:
    """The lower median: with two claims, the smaller."""
    return sorted(claims)[(len(claims) - 1) // 2]


def ordered(clients: Iterable[ClientId], order: Sequence[ClientId] | None) -> list[ClientId]:
    """The clients in the order of the sum.

    Raises:
        TypeError: ids of two types, and no order.
        ValueError: a client that `order` lacks, or has twice.
    """
    ids = list(clients)
    if order is None:
        if len({type(c) for c in ids}) > 1:
            raise TypeError(
                "updates: expected client ids that are all ints or all strings, got both"
            )
        return sorted(ids)
    places = {client: place for place, client in enumerate(order)}
    if len(places) != len(order):
        raise ValueError("order: expected each client once, got one twice")
    if missing := [c for c in ids if c not in places]:
        raise ValueError(f"order: expected client {missing[0]!r} in it, got none")
    return sorted(ids, key=places.__getitem__)


def trusted(
    clients: Iterable[ClientId], weights: Mapping[ClientId, int] | None
) -> dict[ClientId, int] | None:
    """The caller's weights of these clients, checked."""
    if weights is None:
        return None
    found = {}
    for client in clients:
        weight = _checks.number(weights.get(client))
        if isinstance(weight, bool) or not isinstance(weight, int):
            raise ValueError(f"weights: expected an int for client {client!r}, got {weight!r}")
        if not 1 <= weight <= MAX_INTEGER:
            raise ValueError(f"weights: expected 1 to 2^53 for client {client!r}, got {weight}")
        found[client] = weight
    return found


def check_least(name: str, value: object) -> None:
    """Raise unless `value` is an int of at least 1."""
    value = _checks.number(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def checked_record(record: Mapping[str, meta.Value]) -> dict[str, meta.Value]:
    """A copy of what every broadcast shall say; raise as `meta.write` where none can."""
    if taken := {"lr", "snapshot"} & set(record):
        raise ValueError(f"record: expected other names than the round's own, got {min(taken)!r}")
    meta.write(record)
    return dict(record)
