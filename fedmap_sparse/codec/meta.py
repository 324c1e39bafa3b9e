"""META: a small record of named values. docs/format.md, 3.1.

Typed binary rather than JSON: one form for each record, floats exact, nothing to nest.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from fedmap_sparse import _checks
from fedmap_sparse.codec.container import RAW, Id, Section, Wire
from fedmap_sparse.errors import FormatError

MAX_BYTES = 4096
#: A reader's cost is per entry, 0.4 us: without a limit a record could hold 800 of them.
MAX_ENTRIES = 256

Value = bool | int | float | str
_BOOLEANS = {0: False, 1: True}
_INT, _FLOAT, _LENGTH = struct.Struct("<q"), struct.Struct("<d"), struct.Struct("<H")


def write(meta: Mapping[str, Value]) -> Section:
    """The section of a record that is not empty.

    Raises:
        TypeError: a key is not str, or a value not bool, int, float or str.
        ValueError: an empty or overlong key, an integer beyond 64 bits, more than 4096 bytes or 256
            entries.
    """
    if len(meta) > MAX_ENTRIES:
        raise ValueError(f"meta: expected at most {MAX_ENTRIES} entries, got {len(meta)}")
    out = bytearray()
    for key in meta:
        if not isinstance(key, str):
            raise TypeError(f"meta: expected str keys, got {key!r}")
    for key in sorted(meta, key=str.encode):
        name = key.encode()
        if not 1 <= len(name) <= 255:
            raise ValueError(f"meta: expected a key of 1 to 255 bytes, got {len(name)}")
        out += bytes([len(name)]) + name + _write_value(key, meta[key])
    if len(out) > MAX_BYTES:
        raise ValueError(f"meta: expected at most {MAX_BYTES} bytes encoded, got {len(out)}")
    return Section.make(Id.META, Wire.RECORD, len(meta), bytes(out))


def _write_value(key: str, value: object) -> bytes:
    value = _checks.number(value)
    if isinstance(value, bool):
        return bytes([0, value])
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError(f"meta[{key!r}]: expected an integer of 64 bits, got {value}")
        return b"\x01" + _INT.pack(value)
    if isinstance(value, float):
        return b"\x02" + _FLOAT.pack(value)
    if isinstance(value, str):
        text = value.encode()
        if len(text) > MAX_BYTES:
            raise ValueError(f"meta[{key!r}]: expected at most {MAX_BYTES} bytes, got {len(text)}")
        return b"\x03" + _LENGTH.pack(len(text)) + text
    kind = type(value).__name__
    raise TypeError(f"meta[{key!r}]: expected bool, int, float or str, got {kind}")


def read(section: Section) -> dict[str, Value]:
    """The record. Raises FormatError for anything but its one form."""
    data, base = bytes(section.payload[: MAX_BYTES + 1]), section.offset
    if section.dtype != Wire.RECORD or section.encoding != RAW:
        got = f"dtype {section.dtype}, encoding {section.encoding}"
        raise FormatError(f"META: expected a record in encoding 0, got {got}", base)
    if len(data) > MAX_BYTES:
        size = len(section.payload)
        raise FormatError(f"META: expected at most {MAX_BYTES} bytes, got {size}", base)
    if section.count > MAX_ENTRIES:
        raise FormatError(
            f"META: expected at most {MAX_ENTRIES} entries, got {section.count}", base
        )
    meta: dict[str, Value] = {}
    last, at, end = b"", 0, len(data)
    key, value = "", False  # type: str, Value
    try:
        while at < end and len(meta) <= section.count:
            stop = at + 1 + data[at]
            name = data[at + 1 : stop]
            kind = data[stop]  # an IndexError, if the name was cut short
            if kind == 0:
                value = _BOOLEANS[data[stop + 1]]
                stop += 2
            elif kind == 1:
                value = _INT.unpack_from(data, stop + 1)[0]
                stop += 9
            elif kind == 2:
                value = _FLOAT.unpack_from(data, stop + 1)[0]
                stop += 9
            elif kind == 3:
                first = stop + 3
                stop = first + _LENGTH.unpack_from(data, stop + 1)[0]
                if stop > end:
                    raise IndexError(f"expected {stop - first} bytes, got {end - first}")
                value = data[first:stop].decode()
            else:
                raise IndexError(f"unknown type {kind}")
            key = name.decode()
            if name <= last:
                break
            meta[key] = value
            last, at = name, stop
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise FormatError(f"META: broken entry ({error})", base + at) from None
    if at < end and len(meta) <= section.count:
        raise FormatError(f"META: expected a key above {last!r}, got {key.encode()!r}", base + at)
    if len(meta) != section.count or not meta:
        raise FormatError(f"META: expected {section.count} entries, got {len(meta)}", base)
    return meta
