"""The malformed messages: golden ones, each damaged in one way, with good checksums."""

from __future__ import annotations

import struct
from typing import Any

from fedmap_sparse.codec import container


class Edit:
    """A message to damage, whose checksums can be made good again."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        #: Section id to where its header begins.
        self.starts = {s.id: s.offset - 64 for s in container.parse(data)[1]}

    def put(self, offset: int, value: bytes) -> Edit:
        self.data[offset : offset + len(value)] = value
        return self

    def seal(self) -> bytes:
        """All CRCs computed anew, following the sizes in the section headers where they lead."""
        data, at = self.data, 128
        data[124:128] = struct.pack("<I", container.crc32c(bytes(data[:124])))
        for _ in range(struct.unpack_from("<I", data, 120)[0]):
            if at + 64 > len(data):
                break
            size = struct.unpack_from("<Q", data, at + 16)[0]
            if size <= len(data) - at - 64:
                crc = container.crc32c(bytes(data[at + 64 : at + 64 + size]))
                data[at + 56 : at + 60] = struct.pack("<I", crc)
            data[at + 60 : at + 64] = struct.pack("<I", container.crc32c(bytes(data[at : at + 60])))
            at += 64 + -(-size // 64) * 64
        return bytes(data)


def malformed(good: dict[str, Any]) -> dict[str, tuple[str, bytes, str, int]]:
    """Name to (golden message it comes from, bytes, words of the reason, offset)."""
    out: dict[str, tuple[str, bytes, str, int]] = {}
    ids = container.Id

    def add(name: str, source: str, reason: str, at: int, data: bytes) -> None:
        out[name] = (source, data, reason, at)

    def edit(source: str) -> Edit:
        return Edit(good[source][1])

    def change(name: str, source: str, reason: str, at: int, *puts: tuple[int, bytes]) -> None:
        e = edit(source)
        for offset, value in puts:
            e.put(offset, value)
        add(name, source, reason, at, e.seal())

    def u(fmt: str, value: int) -> bytes:
        return struct.pack("<" + fmt, value)

    src = "float32-full"
    data = good[src][1]
    start = edit(src).starts
    mask, values, tail = start[ids.MASK], start[ids.VALUES], start[ids.TAIL]
    floats, bools, meta = (start[i] for i in (ids.FLOATS, ids.BOOLS, ids.META))
    end = len(data)
    add("empty", src, "expected a header of 128 bytes", 0, b"")
    add("half-a-header", src, "expected a header of 128 bytes", 64, data[:64])
    add("header-only", src, "expected a message of", 112, data[:128])
    add("last-byte-missing", src, "expected a message of", 112, data[:-1])
    add("trailing-byte", src, "expected a message of", 112, data + b"\0")
    add("header-crc", src, "header: expected CRC", 124, bytes(edit(src).put(124, b"\0\0\0\0").data))
    add("section-crc", src, "section header: expected CRC", mask + 60,
        bytes(edit(src).put(mask + 60, b"\0\0\0\0").data))  # fmt: skip
    add("payload-crc", src, "payload: expected CRC", values + 64,
        bytes(edit(src).put(values + 70, b"\xAA").data))  # fmt: skip
    change("magic", src, "expected the magic", 0, (0, b"\x89fedmap\n"))
    change("version", src, "expected version 1, got 2", 8, (8, u("H", 2)))
    change("header-length", src, "expected a header length", 10, (10, u("H", 192)))
    change("header-flag", src, "unknown critical flags 0x8000", 12, (12, u("I", 0x8000)))
    change("round", src, "expected round", 80, (80, u("Q", (1 << 53) + 1)))
    change("epoch", src, "expected epoch", 88, (88, u("Q", 1 << 63)))
    change("samples", src, "expected samples", 96, (96, u("Q", (1 << 64) - 1)))
    change("layout", src, "expected a message of layout", 16, (16, bytes(16)))
    change("eligible", src, "eligible", 104, (104, u("Q", 307)))
    change("length-beyond", src, "expected a message of", 112, (112, u("Q", (1 << 64) - 64)))
    longer = Edit(data).put(112, u("Q", end + 64))
    longer.data += bytes(64)
    add("trailing-block", src, "sections to fill", end, longer.seal())
    change("a-section-less", src, "sections to fill", meta, (120, u("I", 6)))
    change("a-section-more", src, "expected a section header", end, (120, u("I", 8)))
    change("2^32-sections", src, "expected a section header", end, (120, u("I", (1 << 32) - 1)))
    change("mask-digest", src, "expected a mask of digest", 32, (32, bytes(16)))
    change("padding", src, "expected padding to be zero", bools + 67, (bools + 100, b"\1"))
    change("reserved-6", src, "reserved bytes", values + 6, (values + 6, u("H", 1)))
    change("reserved-44", src, "reserved bytes", values + 44, (values + 55, b"\1"))
    change("section-flag", src, "unknown critical section flags 0x80", values + 2,
           (values + 2, u("H", 0x80)))  # fmt: skip
    change("section-id", src, "unknown critical section id 15", values, (values, u("H", 15)))
    change("section-id-0", src, "unknown critical section id 0", mask, (mask, u("H", 0)))
    change("dtype-9", src, "unknown dtype 9", values + 4, (values + 4, b"\x09"))
    change("values-dtype", src, "VALUES: expected float32", values + 64, (values + 4, b"\x05"))
    change("tail-dtype", src, "TAIL: expected float32", tail + 64, (tail + 4, b"\x03"))
    change("values-encoding", src, "VALUES: ", values + 64, (values + 5, b"\xff"))
    change("tail-encoding", src, "TAIL: expected encoding 0", tail + 64, (tail + 5, b"\xff"))
    change("mask-encoding", src, "MASK: ", mask + 64, (mask + 5, b"\xff"))
    change("mask-dtype", src, "MASK: ", mask + 64, (mask + 4, b"\x06"))
    change("meta-encoding", src, "META: expected a record", meta + 64, (meta + 5, b"\x01"))
    change(
        "size-2^64", src, "expected a payload of", values + 16, (values + 16, u("Q", (1 << 64) - 1))
    )
    change("size-beyond", src, "expected a payload of", meta + 16, (meta + 16, u("Q", 65)))
    change(
        "size-shrunk",
        src,
        "VALUES: expected 244 bytes",
        values + 64,
        (values + 16, u("Q", 240)),
        (values + 64 + 240, bytes(4)),
    )
    change(
        "values-count", src, "VALUES: expected 61 elements", values + 64, (values + 8, u("Q", 62))
    )
    change(
        "values-2^60",
        src,
        "VALUES: expected 61 elements",
        values + 64,
        (values + 8, u("Q", 1 << 60)),
    )
    change("tail-count", src, "TAIL: expected 32 elements", tail + 64, (tail + 8, u("Q", 31)))
    change("floats-count", src, "FLOATS: expected 8 elements", floats + 64, (floats + 8, u("Q", 9)))
    change("mask-count", src, "MASK: expected 384 bits", mask + 64, (mask + 8, u("Q", 1 << 62)))
    change("mask-size", src, "MASK: expected 48 bytes", mask + 64, (mask + 16, u("Q", 44)))
    change(
        "block", src, "VALUES: expected block to be zero", values + 40, (values + 40, u("I", 64))
    )
    change("parent-of-values", src, "expected parent to be zero", values + 24, (values + 24, b"\1"))
    change("parent-of-mask", src, "expected parent to be zero", mask + 24, (mask + 24, b"\1"))
    change("dense-with-mask", src, "beside DENSE", mask + 64, (12, u("I", 1)))
    change("bit-in-padding", src, "element of padding", mask + 64, (mask + 64 + 14, b"\x80"))
    change(
        "mask-bit-flipped",
        src,
        "expected a mask of digest",
        32,
        (mask + 64, bytes([data[mask + 64] ^ 1])),
    )
    change("boolean-2", src, "BOOLS: expected bytes", bools + 64, (bools + 64, b"\2"))
    change(
        "tail-gap",
        src,
        "TAIL: expected zeros after conv.bias",
        tail + 64 + 16,
        (tail + 64 + 19, b"\1"),
    )
    for name, id_ in (("values", ids.VALUES), ("tail", ids.TAIL), ("floats", ids.FLOATS)):
        h, sections = container.parse(data)
        rest = [s for s in sections if s.id != id_]
        reason = "FLOATS" if name == "floats" else f"expected a section {name.upper()}"
        joined = container.join(h, rest)
        add(f"no-{name}", src, reason, 0 if name == "floats" else len(joined), joined)
    h, sections = container.parse(data)
    add("values-twice", src, "expected a section id above 16", values + 64 + 256,
        container.join(h, [*sections[:2], *sections[1:]]))  # fmt: skip
    add("out-of-order", src, "expected a section id above 17", 448,
        container.join(h, [sections[0], sections[2], sections[1], *sections[3:]]))  # fmt: skip
    both = container.Section.make(ids.DELTA, 7, 0, b"")
    joined = container.join(h, [sections[0], both, *sections[1:]])
    add("mask-and-delta", src, "expected MASK or DELTA", mask + 64 + 64 + 64, joined)
    empty = container.Section.make(ids.FLOATS, 0, 0, b"")
    one = good["one-tensor"][1]
    h1, sections1 = container.parse(one)
    add("present-though-empty", "one-tensor", "0 elements of float buffers", len(one) + 64,
        container.join(h1, [*sections1, empty]))  # fmt: skip
    record = {
        "meta-key-empty": (b"\0\0\1", 1),
        "meta-keys-twice": (b"\1a\0\1\1a\0\1", 2, 4),
        "meta-out-of-order": (b"\1b\0\1\1a\0\1", 2, 4),
        "meta-type": (b"\1a\4\1", 1),
        "meta-boolean": (b"\1a\0\2", 1),
        "meta-cut": (b"\1a\1\0\0", 1),
        "meta-utf8": (b"\1\xff\0\1", 1),
        "meta-text-utf8": (b"\1a\3\1\0\xff", 1),
        "meta-text-cut": (b"\1a\3\5\0abc", 1),
        "meta-count": (b"\1a\0\1", 2),
        "meta-empty": (b"", 0),
        "meta-long": (
            b"".join(bytes([3]) + b"%03d" % i + b"\3\xf0\x00" + b"x" * 240 for i in range(17)),
            17,
        ),
    }
    for name, (payload, count, *at) in record.items():
        section = container.Section.make(ids.META, 8, count, payload)
        joined = container.join(h, [*sections[:-1], section])
        add(name, src, "META: ", meta + 64 + sum(at), joined)
    dense = good["dense"][1]
    add("dense-unset", "dense", "to have the mask", 32, Edit(dense).put(12, u("I", 0)).seal())
    src = "float32-delta"
    delta = edit(src).starts[ids.DELTA]
    change("delta-parent", src, "expected the receiver to have the mask", delta + 24,
           (delta + 24, bytes(16)))  # fmt: skip
    change("delta-count", src, "DELTA: expected 200 bits", delta + 64, (delta + 8, u("Q", 201)))
    change("delta-bit-past-the-end", src, "DELTA: ", delta + 64, (delta + 64 + 27, b"\x80"))
    change("delta-bit-flipped", src, "expected a mask of digest", 32,
           (delta + 64, bytes([good[src][1][delta + 64] ^ 2])))  # fmt: skip
    change("no-mask-at-hand", "float32-none", "expected the receiver to have the mask", 32,
           (32, bytes(16)))  # fmt: skip
    coded(good, change)
    change("base", "difference-float32", "expected the base", 64, (64, b"\1" * 16))
    return out


def coded(good: dict[str, Any], change: Any) -> None:
    """Entropy-coded and int8 payloads, each wrong in one way."""

    def u(fmt: str, value: int) -> bytes:
        return struct.pack("<" + fmt, value)

    src = "rans-mask-full"
    at = Edit(good[src][1]).starts[container.Id.MASK] + 64
    runs, chunks = 5, 1
    directory = at + 16
    states = directory + 4 * chunks
    change("rans-steps", src, "MASK: expected steps a chunk", at, (at, u("I", 1000)))
    change("rans-chunks", src, "MASK: the number of chunks", at + 4, (at + 4, u("I", 2)))
    change("rans-2^32-chunks", src, "MASK: the number of chunks", at + 4, (at + 4, b"\xff" * 4))
    change("rans-density", src, "MASK: unknown density", at + 9, (at + 9, b"\xf8"))
    change("rans-codes-padding", src, "MASK: expected padding", at + 13, (at + 8 + runs, b"\1"))
    change("rans-words", src, "MASK: the directory's words", directory, (directory, u("I", 3)))
    change("rans-state-low", src, "MASK: a state", states + 8, (states + 8, u("I", 0x7FFF)))
    change("rans-state-high", src, "MASK: a state", states, (states, u("I", 1 << 31)))
    word = good[src][1][states + 128 : states + 130]
    change("rans-word", src, "MASK: words that do not decode", directory,
           (states + 128, bytes([word[0] ^ 1, word[1]])))  # fmt: skip
    for dtype in ("float32", "float16"):
        src = f"rans-{dtype}"
        data = good[src][1]
        at = Edit(data).starts[container.Id.VALUES] + 64
        name = f"rans-{dtype}-"
        (first,) = struct.unpack_from("<H", data, at + 8)
        change(name + "frequencies", src, "VALUES: expected frequencies", at + 8,
               (at + 8, u("H", first ^ 1)))  # fmt: skip
        change(name + "reserved", src, "VALUES: expected reserved bytes", at + 5, (at + 6, b"\1"))
        change(name + "escapes", src, "VALUES: the directory disagrees", at, (at + 2, u("H", 900)))
        change(name + "state", src, "VALUES: a state", at + 40, (at + 40, bytes(4)))
        change(name + "top-0", src, "VALUES: words or escapes", at, (at + 4, b"\0"))
        states = struct.unpack_from("<I", data, at + 40)[0]
        change(name + "wrong-state", src, "VALUES: words or escapes", at,
               (at + 40, u("I", states ^ 1)))  # fmt: skip
    change("rans-float16-top", src, "VALUES: an exponent beyond", at + 4, (at + 4, b"\x20"))
    src = "int8-64"
    at = Edit(good[src][1]).starts[container.Id.VALUES] + 64
    (count,) = struct.unpack_from("<Q", good[src][1], at - 56)
    scales = 4 * -(-count // 64)
    for name, block in (("0", 0), ("65", 65), ("2048", 2048)):
        change(
            f"int8-block-{name}", src, "VALUES: expected a block", at - 24, (at - 24, u("I", block))
        )
    change("int8-encoding", src, "VALUES: expected int8 in encoding 0", at, (at - 59, b"\1"))
    change(
        "int8-code", src, "VALUES: expected codes from -127", at + scales, (at + scales, b"\x80")
    )
    for name, bits in (("negative", 0xBF800000), ("infinite", 0x7F800000), ("nan", 0x7FC00000)):
        change(
            f"int8-scale-{name}", src, "VALUES: expected finite scales", at, (at + 4, u("I", bits))
        )
    change("int8-scale-0", src, "VALUES: expected codes of 0", at + 4, (at + 4, bytes(4)))
