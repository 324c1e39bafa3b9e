"""A round's updates as they come from outside: ids, bytes, claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedmap_sparse import _checks
from fedmap_sparse.codec import meta
from fedmap_sparse.codec.container import MAX_INTEGER, NO_DIGEST, as_bytes, parse_header
from fedmap_sparse.codec.envelope import check_client, check_key, unseal
from fedmap_sparse.errors import AuthenticationError

ClientId = int | str
Bytes = bytes | bytearray | memoryview

#: A count of clients names each in a round's result, so it is no larger than that may be.
_MOST_CLIENTS = 1 << 20
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
    for named, sealed in updates:
        client = _checks.number(named)  # NumPy's 7 is 7
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
    wanted = [_checks.number(client) for client in order]
    places = {client: place for place, client in enumerate(wanted)}
    if len(places) != len(wanted):
        raise ValueError("order: expected each client once, got one twice")
    if missing := [c for c in ids if c not in places]:
        raise ValueError(f"order: expected client {missing[0]!r} in it, got none")
    return sorted(ids, key=places.__getitem__)


def participants(clients: int | Iterable[ClientId]) -> tuple[ClientId, ...]:
    """Who took part in a mean that was made elsewhere: ids, or as many numbers from 0.

    Raises:
        TypeError: neither a count nor several ids.
        ValueError: none, a client twice, or a count beyond 2^20.
    """
    clients = _checks.number(clients)
    if isinstance(clients, int) and not isinstance(clients, bool):
        if not 1 <= clients <= _MOST_CLIENTS:
            raise ValueError(f"clients: expected 1 to {_MOST_CLIENTS}, got {clients}")
        return tuple(range(clients))
    if isinstance(clients, bool | str | bytes) or not isinstance(clients, Iterable):
        raise TypeError(f"clients: expected a count or ids, got {type(clients).__name__}")
    ids = tuple(_checks.number(c) for c in clients)
    if len(set(ids)) != len(ids) or not ids:
        raise ValueError(f"clients: expected at least one id, each once, got {len(ids)}")
    return ids


def checked_keys(keys: Mapping[ClientId, bytes]) -> dict[ClientId, bytes]:
    """A server's keys by client. Raises TypeError or ValueError for what is no id or key."""
    if not isinstance(keys, Mapping):
        raise TypeError(f"keys: expected a dict of client to key, got {type(keys).__name__}")
    return {check_client(c): check_key(k) for c, k in keys.items()}


def trusted(
    clients: Iterable[ClientId], weights: Mapping[ClientId, int] | None
) -> dict[ClientId, int] | None:
    """The caller's weights of these clients, checked."""
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected a dict of client to int, got {type(weights).__name__}")
    found = {}
    for client in clients:
        weight = _checks.number(weights.get(client))
        if isinstance(weight, bool) or not isinstance(weight, int):
            raise ValueError(f"weights: expected an int for client {client!r}, got {weight!r}")
        if not 1 <= weight <= MAX_INTEGER:
            raise ValueError(f"weights: expected 1 to 2^53 for client {client!r}, got {weight}")
        found[client] = weight
    return found


def reported(loss: object) -> float | None:
    """A loss as a message carries it: None unless it is finite. Raises TypeError for no number."""
    try:
        value = math.nan if loss is None else float(loss)  # type: ignore[arg-type]  # as said
    except OverflowError:  # an int of 400 digits
        return None
    except (TypeError, ValueError):
        raise TypeError(f"loss: expected a number, got {type(loss).__name__}") from None
    return value if math.isfinite(value) else None


def check_least(name: str, value: object, most: int | None = None) -> None:
    """Raise unless `value` is an int of at least 1, and of `most` at most."""
    value = _checks.number(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected at most {most}, got {value}")


def checked_record(record: Mapping[str, meta.Value]) -> dict[str, meta.Value]:
    """A copy of what every broadcast shall say; raise as `meta.write` where none can."""
    if taken := {"lr", "snapshot"} & set(record):
        raise ValueError(f"record: expected other names than the round's own, got {min(taken)!r}")
    meta.write(record)
    return dict(record)
