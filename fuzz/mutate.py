"""Messages taken apart, damaged, and joined again under good checksums; used by wire.py."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fedmap_sparse as fs
from fedmap_sparse import codec
from fedmap_sparse.codec import container

HEADER = struct.Struct("<8sHHI16s16s16s16s5QII")
SECTION = struct.Struct("<HHBBHQQ16sI12sII")
HEADER_FIELDS = (
    "magic", "version", "length_of_header", "flags", "layout", "mask", "answers", "base", "round",
    "epoch", "samples", "eligible", "length", "count", "crc",
)  # fmt: skip
SECTION_FIELDS = (
    "id", "flags", "dtype", "encoding", "zero", "count", "size", "parent", "block", "zeros",
    "payload_crc", "crc",
)  # fmt: skip
IDS = (0, 1, 2, 3, 15, 16, 17, 18, 19, 20, 21, 22, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


@dataclass
class Parts:
    """A message taken apart. A number in `lies` goes into the bytes in place of the right one."""

    header: dict[str, Any]
    sections: list[dict[str, Any]]
    lies: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(data: bytes) -> Parts:
        header = dict(zip(HEADER_FIELDS, HEADER.unpack_from(data), strict=True))
        sections, at = [], HEADER.size
        for _ in range(header["count"]):
            s = dict(zip(SECTION_FIELDS, SECTION.unpack_from(data, at), strict=True))
            s["payload"] = data[at + 64 : at + 64 + s["size"]]
            s["padding"] = b""
            sections.append(s)
            at += 64 + container.padded(s["size"])
        return Parts(header, sections)

    def join(self) -> bytes:
        """The bytes, every checksum mended."""
        out = bytearray(HEADER.size)
        for s in self.sections:
            size = len(s["payload"])
            numbers = {**s, "size": s.get("lie", size), "payload_crc": crc(s["payload"])}
            head = SECTION.pack(*[numbers[name] for name in SECTION_FIELDS])[:-4]
            gap = -size % 64
            out += head + struct.pack("<I", crc(head)) + s["payload"]
            out += (s["padding"] + bytes(gap))[:gap]
        numbers = {**self.header, "length": len(out), "count": len(self.sections), **self.lies}
        head = HEADER.pack(*[numbers[name] for name in HEADER_FIELDS])[:-4]
        out[: HEADER.size] = head + struct.pack("<I", crc(head))
        return bytes(out)


def crc(data: bytes) -> int:
    return container.crc32c(data)


@dataclass(frozen=True)
class Seed:
    """A sound message and what its receiver has."""

    name: str
    data: bytes
    layout: fs.FlatLayout
    plain_layout: Any
    have: fs.Mask | None
    base: codec.Message | None
    plain_base: Any


class Mutator:
    """Damages messages; the same seed gives the same ones."""

    def __init__(self, seeds: list[Seed], seed: int) -> None:
        self.seeds = seeds
        self.random = random.Random(seed)
        self.donors = [s for seed_ in seeds for s in Parts.of(seed_.data).sections]
        self.ways: list[tuple[int, Callable[[Parts], None]]] = [
            (16, self.header),
            (18, self.section),
            (34, self.payload),
            (20, self.coded),
            (12, self.arrangement),
        ]

    def number(self, now: int, bits: int) -> int:
        r = self.random
        edge = r.choice([0, 1, 2, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1])
        near = now + r.choice([-64, -32, -2, -1, 1, 2, 32, 64, 1 << 16])
        return r.choice([edge, near, r.getrandbits(bits), r.getrandbits(r.randint(1, bits))]) % (
            1 << bits
        )

    def digest(self, now: bytes) -> bytes:
        r = self.random
        return r.choice([bytes(16), b"\xff" * 16, r.randbytes(16), self.bits(now)])

    def bits(self, data: bytes) -> bytes:
        """With some bits, bytes or words changed, more often near the beginning."""
        r, out = self.random, bytearray(data)
        for _ in range(r.choice([1, 1, 1, 2, 4, 16]) if out else 0):
            end = len(out) if r.random() < 0.6 else min(len(out), 420)
            at, way = r.randrange(end), r.random()
            if way < 0.5:
                out[at] ^= 1 << r.randrange(8)
            elif way < 0.75 or len(out) < 4:
                out[at] = r.choice([0, 1, 127, 128, 255])
            else:
                at = min(at // 4 * 4, len(out) - 4)
                words = [0, 0x7F800000, 0x7FC00000, 0xFF7FFFFF, 0x8000, 0x80000000, 0xFFFFFFFF]
                struct.pack_into("<I", out, at, r.choice([*words, r.getrandbits(32)]))
        return bytes(out)

    def header(self, parts: Parts) -> None:
        name = self.random.choice(HEADER_FIELDS[1:-1])
        now = parts.header[name]
        if isinstance(now, bytes):
            parts.header[name] = self.digest(now)
        elif name in ("length", "count"):
            parts.lies[name] = self.number(now, 64 if name == "length" else 32)
        elif name == "flags":
            parts.header[name] = now ^ 1 << self.random.randrange(32)
        else:
            bits = 16 if name in ("version", "length_of_header") else 64
            fresh = [self.number(now, bits), (1 << min(bits, 53)) - 1]
            parts.header[name] = self.random.choice(fresh)

    def section(self, parts: Parts) -> None:
        r, s = self.random, self.random.choice(parts.sections)
        name = r.choice([*SECTION_FIELDS[:-2], "padding"])
        if name == "id":
            s[name] = r.choice(IDS)
        elif name in ("parent", "zeros"):
            s[name] = self.digest(s[name] + bytes(4))[: len(s[name])]
        elif name == "padding":
            s[name] = bytes(r.randrange(3)) + b"\x01"
        elif name == "size":
            s["lie"] = self.number(len(s["payload"]), 64)
        elif name in ("dtype", "encoding"):
            s[name] = r.choice([*range(10), 255])
        elif name == "block":
            s[name] = r.choice([0, 63, 64, 65, 128, 256, 1024, 1088, r.getrandbits(32)])
        else:
            s[name] = self.number(s[name], 64 if name == "count" else 16)

    def payload(self, parts: Parts) -> None:
        r, s = self.random, self.random.choice(parts.sections)
        data, way = s["payload"], self.random.random()
        if way < 0.7:
            s["payload"] = self.bits(data)
        elif way < 0.8:
            s["payload"] = data[: r.randrange(len(data) + 1)]
        elif way < 0.9:
            s["payload"] = data + r.choice([bytes(4), r.randbytes(r.choice([1, 2, 4, 64]))])
        else:
            s["payload"] = r.randbytes(len(data))
        if r.random() < 0.2:
            s["count"] = len(s["payload"]) // r.choice([1, 2, 4])

    def coded(self, parts: Parts) -> None:
        """One field of an entropy-coded payload: chunks, densities, directories, states."""
        r = self.random
        coded = [s for s in parts.sections if s["encoding"] == 1 and len(s["payload"]) > 168]
        if not coded:
            return self.payload(parts)
        s = r.choice(coded)
        data = bytearray(s["payload"])
        if s["id"] < 3:
            at, bits = r.choice([(0, 32), (4, 32), (8, 8), (9, 8), (12, 32), (16, 32), (140, 32)])
        else:
            at, bits = r.choice([(0, 16), (2, 16), (4, 8), (5, 8), (8, 16), (10, 16), (40, 32)])
        size = bits // 8
        now = int.from_bytes(data[at : at + size], "little")
        states = [0x7FFF, 0x8000, 0x7FFFFFFF, 0x80000000]
        fresh = r.choice([self.number(now, bits), *(states if bits == 32 else [])])
        data[at : at + size] = fresh.to_bytes(size, "little")
        if at in (8, 10) and s["id"] > 3:  # frequencies keep their sum
            other = 8 + 2 * r.randrange(16)
            held = int.from_bytes(data[other : other + 2], "little")
            data[other : other + 2] = ((held + now - fresh) % 65536).to_bytes(2, "little")
        s["payload"] = bytes(data)
        return None

    def arrangement(self, parts: Parts) -> None:
        r, way = self.random, self.random.randrange(5)
        if way == 0:
            parts.sections.pop(r.randrange(len(parts.sections)))
        elif way == 1:
            parts.sections.insert(r.randrange(len(parts.sections) + 1), dict(r.choice(self.donors)))
        elif way == 2:
            r.shuffle(parts.sections)
        elif way == 3:
            copy = dict(r.choice(parts.sections))
            copy["id"] = r.choice([0x8000, 0x8001, 0xFFFF])
            parts.sections.append(copy)
        else:
            parts.sections[r.randrange(len(parts.sections))] = dict(r.choice(self.donors))
        if r.random() < 0.5:
            parts.sections.sort(key=lambda s: int(s["id"]))

    def next(self) -> tuple[Seed, bytes]:
        """A seed, and its message damaged."""
        r = self.random
        seed = r.choice(self.seeds)
        parts = Parts.of(seed.data)
        for _ in range(r.choice([1, 1, 1, 2, 3])):
            if parts.sections:
                weights = [w for w, _ in self.ways]
                r.choices([way for _, way in self.ways], weights)[0](parts)
        data = parts.join()
        way = r.random()
        if way < 0.02:
            data = data[: r.randrange(len(data))]
        elif way < 0.03:
            data += bytes(64)
        elif way < 0.04:
            data = self.bits(data)
        return seed, data
