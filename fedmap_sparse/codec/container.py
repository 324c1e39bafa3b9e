"""The container: a header, and sections that each carry their own checksums. docs/format.md, 2.

Nothing here knows a layout: this module splits a message into checked sections and joins sections
into a message. What sections mean is the business of `masks`, `values` and `message`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse import _transfer
from fedmap_sparse.codec._crc32c import crc32c
from fedmap_sparse.errors import FormatError

MAGIC = b"\x89FEDMAP\n"
VERSION = 1
HEADER_BYTES = 128
SECTION_BYTES = 64
ALIGN = 64
NO_DIGEST = bytes(16)
#: `round`, `epoch` and `samples` are exact as float64 and as JSON.
MAX_INTEGER = 1 << 53

DENSE = 1
_CRITICAL_HEADER_FLAGS = 0xFFFF
_CRITICAL_SECTION_FLAGS = 0xFF
_IGNORABLE_ID = 0x8000
#: Sections of one message, at most. Each costs a reader some 10 us, whatever its size.
MAX_SECTIONS = 32

_HEADER = struct.Struct("<8sHHI16s16s16s16s5QI")
_SECTION = struct.Struct("<HHBBHQQ16sI12sI")
_CRC = struct.Struct("<I")

Buffer = bytes | bytearray | memoryview


class Id(IntEnum):
    """Section ids."""

    MASK = 1
    DELTA = 2
    VALUES = 16
    TAIL = 17
    FLOATS = 18
    INTS = 19
    BOOLS = 20
    META = 21


_KINDS: dict[int, str] = {
    Id.MASK: "mask",
    Id.DELTA: "mask",
    Id.VALUES: "values",
    Id.TAIL: "tail",
    Id.FLOATS: "buffers",
    Id.INTS: "buffers",
    Id.BOOLS: "buffers",
}


class Wire(IntEnum):
    """Types of elements."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    INT8 = 3
    FLOAT64 = 4
    INT64 = 5
    BOOL = 6
    BIT = 7
    RECORD = 8


TORCH_OF_WIRE = {
    Wire.FLOAT32: torch.float32,
    Wire.FLOAT16: torch.float16,
    Wire.BFLOAT16: torch.bfloat16,
    Wire.INT8: torch.int8,
    Wire.FLOAT64: torch.float64,
    Wire.INT64: torch.int64,
    Wire.BOOL: torch.bool,
}
WIRE_OF_TORCH = {dtype: wire for wire, dtype in TORCH_OF_WIRE.items()}

#: Encodings: elements as they are, or entropy-coded.
RAW, RANS = 0, 1


@dataclass(frozen=True)
class Header:
    """The fixed part of a message. Digests are 16 bytes; `answers` and `base` may be zero."""

    layout: bytes
    mask: bytes
    eligible: int
    flags: int = 0
    answers: bytes = NO_DIGEST
    base: bytes = NO_DIGEST
    round: int = 0
    epoch: int = 0
    samples: int = 0

    def body(self) -> bytes:
        """Bytes 12-111: what the broadcast digest covers."""
        return self._pack(0, 0)[12:112]

    def pack(self, length: int, sections: int) -> bytes:
        """The 128 bytes of the header of a message of `length` bytes."""
        head = self._pack(length, sections)
        return head + _CRC.pack(crc32c(head))

    def _pack(self, length: int, sections: int) -> bytes:
        return _HEADER.pack(
            MAGIC, VERSION, HEADER_BYTES, self.flags, self.layout, self.mask, self.answers,
            self.base, self.round, self.epoch, self.samples, self.eligible, length, sections,
        )  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One section. `payload` may view a tensor or the message that was read; `offset` is where the
    payload lies in that message, 0 in a section that is being written."""

    id: int
    dtype: int
    count: int
    payload: memoryview = field(repr=False)
    encoding: int = RAW
    flags: int = 0
    parent: bytes = NO_DIGEST
    block: int = 0
    crc: int = 0
    offset: int = 0

    @staticmethod
    def make(
        number: int, dtype: int, count: int, payload: Buffer | Tensor, **fields: Any
    ) -> Section:
        """A section to write; a tensor's memory is viewed, not copied."""
        view = tensor_bytes(payload) if isinstance(payload, Tensor) else memoryview(payload)
        return Section(number, dtype, count, view, crc=crc32c(view), **fields)

    def __deepcopy__(self, memo: object) -> Section:
        return self  # nobody writes to it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "payload": bytes(self.payload)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, payload=memoryview(state["payload"]))

    @property
    def ignorable(self) -> bool:
        """Whether a reader that does not know the id skips the section."""
        return self.id >= _IGNORABLE_ID

    def pack(self) -> bytes:
        """The section header."""
        head = _SECTION.pack(
            self.id, self.flags, self.dtype, self.encoding, 0, self.count, len(self.payload),
            self.parent, self.block, bytes(12), self.crc,
        )  # fmt: skip
        return head + _CRC.pack(crc32c(head))

    def tensor(self) -> Tensor:
        """The payload as a 1-D tensor of its raw dtype: a view where memory allows, else a copy."""
        return tensor_view(self.payload, TORCH_OF_WIRE[Wire(self.dtype)])

    def coded(self) -> Tensor:
        """The payload as bytes, aligned for the entropy coder."""
        return tensor_view(self.payload, torch.uint8, align=4)


def broadcast_digest(header: Header, sections: Sequence[Section]) -> bytes:
    """16 bytes that name a broadcast, whatever mask section a receiver got. docs/format.md, 6."""
    h = hashlib.blake2b(header.body(), digest_size=16)
    for section in sections:
        if section.id not in (Id.MASK, Id.DELTA) and not section.ignorable:
            h.update(section.pack())
    return h.digest()


def join(header: Header, sections: Sequence[Section]) -> bytes:
    """The message. One copy of each payload."""
    length = HEADER_BYTES + sum(SECTION_BYTES + padded(len(s.payload)) for s in sections)
    parts: list[Buffer] = [header.pack(length, len(sections))]
    for section in sections:
        parts += [section.pack(), section.payload, bytes(-len(section.payload) % ALIGN)]
    return b"".join(parts) if length < 2 * _transfer.MANY else _joined(length, parts)


def _joined(length: int, parts: Sequence[Buffer]) -> bytes:
    """`b"".join(parts)` by many threads."""
    out: bytes = _transfer.unwritten(None, length)
    room, at = tensor_view(memoryview(out), torch.uint8), 0
    for part in parts:
        _transfer.copy(tensor_view(memoryview(part), torch.uint8), room[at : at + len(part)])
        at += len(part)
    return out


def parse_header(data: Buffer) -> tuple[Header, int, int]:
    """The header of a message.

    Args:
        data: at least the first 128 bytes of the message.

    Returns:
        The header, the length of the message in bytes, and its number of sections.

    Raises:
        FormatError: they are not a sound header of version 1. The length is not compared.
    """
    view = as_bytes(data)
    if len(view) < HEADER_BYTES:
        raise FormatError(f"expected a header of {HEADER_BYTES} bytes, got {len(view)}", len(view))
    magic, version, header_bytes, flags, layout, mask, answers, base, *numbers = (
        _HEADER.unpack_from(view)
    )
    round_, epoch, samples, eligible, length, count = numbers
    if magic != MAGIC:
        raise FormatError(f"expected the magic {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise FormatError(f"expected version {VERSION}, got {version}", 8)
    if header_bytes != HEADER_BYTES:
        raise FormatError(f"expected a header length of {HEADER_BYTES}, got {header_bytes}", 10)
    _check_crc("header", view[: HEADER_BYTES - 4], _CRC.unpack_from(view, 124)[0], 124)
    if unknown := flags & _CRITICAL_HEADER_FLAGS & ~DENSE:
        raise FormatError(f"unknown critical flags {unknown:#x}", 12)
    for name, value, offset in (
        ("round", round_, 80),
        ("epoch", epoch, 88),
        ("samples", samples, 96),
    ):
        if value > MAX_INTEGER:
            raise FormatError(f"expected {name} of at most 2^53, got {value}", offset)
    header = Header(layout, mask, eligible, flags, answers, base, round_, epoch, samples)
    return header, length, count


def parse(data: Buffer, payloads: bool = True) -> tuple[Header, list[Section]]:
    """Header and sections of a whole message, every length and checksum verified. O(bytes).

    Args:
        payloads: False leaves the payloads' checksums to `check_payloads`.

    Raises:
        FormatError: docs/format.md, 7, points 1, 2, 4, 5, and the order of sections.
    """
    view = as_bytes(data)
    header, length, count = parse_header(view)
    if length != len(view):
        raise FormatError(f"expected a message of {length} bytes, got {len(view)}", 112)
    sections: list[Section] = []
    try:
        _parse_sections(view, count, payloads, sections)
    except FormatError:
        check_payloads([] if payloads else sections)  # which come before what is wrong
        raise
    return header, sections


def _parse_sections(view: memoryview, count: int, payloads: bool, sections: list[Section]) -> None:
    offset, last = HEADER_BYTES, 0
    for index in range(count):
        if index == MAX_SECTIONS:
            raise FormatError(f"expected at most {MAX_SECTIONS} sections, got {count}", 120)
        section = _parse_section(view, offset, payloads)
        if section.id <= last:
            raise FormatError(f"expected a section id above {last}, got {section.id}", offset)
        sections.append(section)
        last = section.id
        offset = section.offset + padded(len(section.payload))
    if offset != (length := len(view)):
        raise FormatError(f"expected {count} sections to fill {length} bytes, got {offset}", offset)


def check_payloads(sections: Sequence[Section]) -> None:
    """Raise FormatError for the first whose payload has another checksum."""
    for section in sections:
        _check_crc("payload", section.payload, section.crc, section.offset)


def _parse_section(view: memoryview, offset: int, payloads: bool) -> Section:
    start = offset + SECTION_BYTES
    if start > len(view):
        raise FormatError("expected a section header, got the end of the message", offset)
    id_, flags, dtype, encoding, reserved, count, size, parent, block, zeros, crc = (
        _SECTION.unpack_from(view, offset)
    )
    head = view[offset : start - 4]
    _check_crc("section header", head, _CRC.unpack_from(view, start - 4)[0], start - 4)
    if reserved or any(zeros):
        raise FormatError("expected reserved bytes to be zero", offset + (6 if reserved else 44))
    if unknown := flags & _CRITICAL_SECTION_FLAGS:
        raise FormatError(f"unknown critical section flags {unknown:#x}", offset + 2)
    if id_ < _IGNORABLE_ID:
        if id_ not in Id.__members__.values():
            raise FormatError(f"unknown critical section id {id_}", offset)
        if dtype not in Wire.__members__.values():
            raise FormatError(f"unknown dtype {dtype}", offset + 4)
    # Compared without adding: a size near 2^64 must not wrap in a reader that has no big integers.
    if size > len(view) - start or padded(size) > len(view) - start:
        left = len(view) - start
        raise FormatError(f"expected a payload of {size} bytes, got {left} to the end", offset + 16)
    payload = view[start : start + size]
    if payloads:
        _check_crc("payload", payload, crc, start)
    if any(view[start + size : start + padded(size)]):
        raise FormatError("expected padding to be zero", start + size)
    return Section(id_, dtype, count, payload, encoding, flags, parent, block, crc, start)


def bytes_by_kind(data: Buffer) -> dict[str, int]:
    """What the bytes of a message are: "mask", "values", "tail", "buffers", and "rest".

    For accounts of messages that are known to be sound: nothing is checked. Padding counts with
    its section; headers and the record are the rest, and so is all of an envelope.
    """
    found = dict.fromkeys((*dict.fromkeys(_KINDS.values()), "rest"), 0)
    found["rest"] = len(data)
    if bytes(data[: len(MAGIC)]) == MAGIC:
        offset = HEADER_BYTES
        while offset < len(data):
            id_, *_, size, _parent, _block, _zeros, _crc = _SECTION.unpack_from(data, offset)
            if id_ in _KINDS:
                found[_KINDS[id_]] += padded(size)
                found["rest"] -= padded(size)
            offset += SECTION_BYTES + padded(size)
    return found


def _check_crc(what: str, data: memoryview, wanted: int, offset: int) -> None:
    if (got := crc32c(data)) != wanted:
        raise FormatError(f"{what}: expected CRC {wanted:#010x}, got {got:#010x}", offset)


def padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def as_bytes(data: object) -> memoryview:
    """`data` as a flat view of bytes.

    Raises:
        TypeError: it is not bytes, bytearray or a contiguous memoryview.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        kind = type(data).__name__
        raise TypeError(f"data: expected bytes, bytearray or memoryview, got {kind}")
    view = memoryview(data)
    if not view.c_contiguous:
        raise TypeError("data: expected contiguous memory")
    return view.cast("B") if view.nbytes else memoryview(b"")


def tensor_bytes(t: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, 1-D."""
    flat: Any = t.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def tensor_view(payload: memoryview, dtype: torch.dtype, align: int | None = None) -> Tensor:
    """A 1-D tensor over `payload`, which must not be written: it may be an immutable `bytes`.

    Copies only where the memory is not aligned to the element, or to `align`.
    """
    size = align or dtype.itemsize
    if not len(payload):
        return torch.empty(0, dtype=dtype, device="cpu")
    array = np.frombuffer(payload, np.uint8)
    if array.__array_interface__["data"][0] % size:
        array = array.copy()
    return torch.from_numpy(_writable(array)).view(dtype)


class _Exposed:
    """An array interface that says writable, as torch warns of memory that is not."""

    def __init__(self, array: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self.owner = array
        self.__array_interface__ = dict(
            array.__array_interface__, data=(array.__array_interface__["data"][0], False)
        )


def _writable(array: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return array if array.flags.writeable else np.asarray(_Exposed(array))
