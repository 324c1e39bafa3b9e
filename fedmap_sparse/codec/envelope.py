"""An envelope that proves who sent a message: HMAC-SHA256. docs/format.md, 9.

The message inside is unchanged. One key per client, shared with the server.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Literal

from fedmap_sparse import _checks
from fedmap_sparse.codec.container import MAX_INTEGER, Buffer, as_bytes
from fedmap_sparse.errors import AuthenticationError

MAGIC = b"\x89FEDMAC\n"
VERSION = 1
HEAD_BYTES = 32
TAG_BYTES = 32
#: Bytes of a key, at least: those of the hash (RFC 2104).
KEY_BYTES = 32
_HEAD = struct.Struct("<8sHBBHHQQ")
_DIRECTIONS = {"update": 0, "broadcast": 1}
_REFUSED = "envelope: expected one that the shared key, client, round and direction verify"

Direction = Literal["update", "broadcast"]


def check_key(key: object) -> bytes:
    """Raise unless a key is long enough.

    Args:
        key: at least 32 random bytes (`secrets.token_bytes(32)`).

    Returns:
        The key.

    Raises:
        TypeError: it is not bytes.
        ValueError: it is shorter.
    """
    if not isinstance(key, bytes):
        raise TypeError(f"key: expected bytes, got {type(key).__name__}")
    if len(key) < KEY_BYTES:
        raise ValueError(f"key: expected at least {KEY_BYTES} bytes, got {len(key)}")
    return key


def check_client(client: object) -> int | str:
    """Raise unless `client` is an id that an envelope can carry.

    Args:
        client: an int of 0 to 2^64 - 1, or text of at most 65535 bytes in UTF-8.

    Returns:
        The id, as Python's int or str.

    Raises:
        TypeError: neither an int nor text.
        ValueError: out of range.
    """
    client = _checks.number(client)
    if isinstance(client, bool) or not isinstance(client, int | str):
        raise TypeError(f"client: expected an int or text, got {type(client).__name__}")
    if isinstance(client, int) and not 0 <= client < 1 << 64:
        raise ValueError(f"client: expected 0 to 2^64 - 1, got {client}")
    if isinstance(client, str) and len(client.encode()) > 65535:
        raise ValueError(f"client: expected at most 65535 bytes, got {len(client.encode())}")
    return client


def seal(
    message: Buffer, key: bytes, client: int | str, at_round: int, direction: Direction
) -> bytes:
    """The message in an envelope.

    Args:
        message: any message of this package.
        key: at least 32 random bytes, which client and server alone know
            (`secrets.token_bytes(32)`).
        client: the id of the client that sends or gets it: an int of 0 to 2^64 - 1, or text.
        at_round: the round of the message.
        direction: "update" from a client, "broadcast" to one.

    Returns:
        The envelope, for `unseal`.

    Raises:
        TypeError, ValueError: a key that is no bytes or too short, an id or round out of range.

    >>> key = bytes(range(32))
    >>> data = seal(b"message", key, "clinic-3", 7, "update")
    >>> bytes(unseal(data, key, "clinic-3", 7, "update"))
    b'message'
    """
    head = _head(message, client, at_round, direction)
    tag = hmac.new(check_key(key), digestmod=hashlib.sha256)
    for part in (head, message):
        tag.update(part)
    return b"".join([head, message, tag.digest()])


def unseal(
    data: Buffer, key: bytes, client: int | str, at_round: int, direction: Direction
) -> memoryview:
    """The message in an envelope, a view of `data`.

    Args:
        data: what `seal` gave.
        key, client, at_round, direction: what the receiver expects; the sender's must be the same.

    Returns:
        The message.

    Raises:
        AuthenticationError: anything else. It does not say which part differs.
    """
    view = as_bytes(data)
    if len(view) < HEAD_BYTES + TAG_BYTES or bytes(view[:8]) != MAGIC:
        raise AuthenticationError("envelope: expected one around the message, got none")
    _, version, _, _, id_size, _, _, size = _HEAD.unpack_from(view)
    start = HEAD_BYTES + id_size
    if version != VERSION or start + size + TAG_BYTES != len(view):
        raise AuthenticationError(_REFUSED)
    message = view[start : start + size]
    tag = hmac.new(check_key(key), digestmod=hashlib.sha256)
    tag.update(view[: start + size])
    # One comparison in constant time for all that must agree.
    wanted = _head(message, client, at_round, direction) + tag.digest()
    came = bytes(view[:start]) + bytes(view[start + size :])
    if not hmac.compare_digest(wanted, came):
        raise AuthenticationError(_REFUSED)
    return message


def round_of(data: Buffer) -> int:
    """The round that an envelope claims, before it was verified. Raises AuthenticationError."""
    view = as_bytes(data)
    if len(view) < HEAD_BYTES + TAG_BYTES or bytes(view[:8]) != MAGIC:
        raise AuthenticationError("envelope: expected one around the message, got none")
    return int(_HEAD.unpack_from(view)[6])


def _head(message: Buffer, client: int | str, at_round: int, direction: Direction) -> bytes:
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction: expected 'update' or 'broadcast', got {direction!r}")
    if isinstance(at_round, bool) or not isinstance(at_round, int):
        raise TypeError(f"at_round: expected an int, got {type(at_round).__name__}")
    if not 0 <= at_round <= MAX_INTEGER:
        raise ValueError(f"at_round: expected 0 to 2^53, got {at_round}")
    client = check_client(client)
    name = client.to_bytes(8, "little") if isinstance(client, int) else client.encode()
    kind = int(isinstance(client, str))
    size = memoryview(message).nbytes
    head = _HEAD.pack(MAGIC, VERSION, _DIRECTIONS[direction], kind, len(name), 0, at_round, size)
    return head + name
