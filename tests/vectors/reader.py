"""A second reader of the message format, written from docs/format.md alone.

Plain Python and `struct`, no import of the package: what it and the package agree on is what the
document says. Slow on purpose; the golden files are small. `python reader.py LAYOUT.json MESSAGE`
prints what a message holds.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path

from reader_coding import (  # lies beside this file
    BFLOAT16,
    BIT,
    BOOL,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT64,
    RECORD,
    SIZES,
    Refused,
    coded_bits,
    coded_values,
    int8_values,
    refuse_unless,
    single,
    to_bits,
)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_entry(i):
    for _ in range(8):
        i = (i >> 1) ^ (0x82F63B78 if i & 1 else 0)
    return i


CRC_TABLE = [_crc_entry(i) for i in range(256)]
WRAP = (1 << 64) - 1


class Layout:
    """From the JSON object whose digest is the layout's."""

    def __init__(self, text):
        d = json.loads(text)
        keys = ("entries", "prunable_numel", "numel", "aliases", "buffers")
        canonical = json.dumps({k: d[k] for k in keys}, separators=(",", ":"))
        self.digest = hashlib.blake2b(canonical.encode(), digest_size=16).digest()
        self.P, self.T = d["prunable_numel"], d["numel"] - d["prunable_numel"]
        self.tensors, self.tail_gaps = [], set(range(self.T))
        self.eligible = [False] * self.P
        for _, shape, offset in d["entries"]:
            n = product(shape)
            if offset < self.P:
                self.tensors.append((offset, n))
                self.eligible[offset : offset + n] = [True] * n
            else:
                self.tail_gaps -= set(range(offset - self.P, offset - self.P + n))
        self.E = sum(self.eligible)
        kinds = [(kind, product(shape)) for _, shape, kind in d["buffers"]]
        self.buffers = {k: sum(n for kk, n in kinds if kk == k) for k in ("float", "int", "bool")}


def product(shape):
    n = 1
    for size in shape:
        n *= size
    return n


def mask_digest(bits):
    data = to_bytes(bits)
    data += bytes(-len(data) % 8)
    h1 = h2 = 0
    for j, (w,) in enumerate(struct.iter_unpack("<Q", data)):
        t = (w + (j + 1) * 0x9E3779B97F4A7C15) & WRAP
        t = ((t ^ (t >> 30)) * 0xBF58476D1CE4E5B9) & WRAP
        t ^= t >> 27
        u = (t * 0x94D049BB133111EB) & WRAP
        u ^= u >> 31
        h1, h2 = h1 + t, h2 + u
    n = len(bits)
    return struct.pack("<QQ", (h1 + n) & WRAP, (h2 + n * 0x9E3779B97F4A7C15) & WRAP)


def to_bytes(bits):
    out = bytearray((len(bits) + 7) // 8)
    for i, bit in enumerate(bits):
        out[i // 8] |= bit << (i % 8)
    return bytes(out)


HEADER = struct.Struct("<8sHHI16s16s16s16sQQQQQII")
SECTION = struct.Struct("<HHBBHQQ16sI12sII")
NAMES = {
    1: "MASK",
    2: "DELTA",
    16: "VALUES",
    17: "TAIL",
    18: "FLOATS",
    19: "INTS",
    20: "BOOLS",
    21: "META",
}
ZERO = bytes(16)


def sections_of(data):
    """(header fields, {name: section}) of a sound container."""
    refuse_unless(len(data) >= 128, "shorter than a header")
    (magic, version, header_length, flags, layout, mask, answers, base, round_, epoch, samples,
     eligible, length, count, crc) = HEADER.unpack_from(data)  # fmt: skip
    refuse_unless(magic == b"\x89FEDMAP\n", "magic")
    refuse_unless(version == 1, "version")
    refuse_unless(header_length == 128, "header length")
    refuse_unless(crc == crc32c(data[:124]), "header CRC")
    refuse_unless(flags & 0xFFFE == 0, "critical flags")
    refuse_unless(max(round_, epoch, samples) <= 1 << 53, "an integer above 2^53")
    refuse_unless(length == len(data), "length")
    refuse_unless(count <= 32, "number of sections")
    header = {
        "dense": bool(flags & 1), "layout": layout, "mask": mask, "answers": answers, "base": base,
        "round": round_, "epoch": epoch, "samples": samples, "eligible": eligible,
    }  # fmt: skip
    digest = hashlib.blake2b(data[12:112], digest_size=16)
    sections, at, last = {}, 128, 0
    for _ in range(count):
        head = data[at : at + 64]
        refuse_unless(len(head) == 64, "no room for a section header")
        (id_, flags, dtype, encoding, zero, elements, size, parent, block, zeros, payload_crc,
         head_crc) = SECTION.unpack(head)  # fmt: skip
        refuse_unless(head_crc == crc32c(head[:60]), "section header CRC")
        refuse_unless(zero == 0 and zeros == bytes(12), "reserved bytes")
        refuse_unless(flags & 0xFF == 0, "critical section flags")
        refuse_unless(id_ > last, "order of sections")
        end = at + 64 + size
        at, last = -(-end // 64) * 64, id_
        refuse_unless(at <= len(data), "payload beyond the end")
        payload = data[end - size : end]
        refuse_unless(payload_crc == crc32c(payload), "payload CRC")
        refuse_unless(not any(data[end:at]), "padding")
        if id_ >= 0x8000:
            continue
        refuse_unless(id_ in NAMES, "unknown section")
        refuse_unless(parent == ZERO or id_ == 2, "parent")
        if id_ > 2:
            digest.update(head)
        sections[NAMES[id_]] = (dtype, encoding, elements, block, parent, payload)
    refuse_unless(at == len(data), "trailing bytes")
    header["digest"] = digest.digest()
    return header, sections


def elements_of(sections, name, count, dtypes):
    """(dtype, payload bytes) of a section, as in encoding 0; int8 as float32."""
    refuse_unless(
        (name in sections) == (count > 0 or name in ("VALUES", "TAIL")), f"{name}: presence"
    )
    if name not in sections:
        return None, b""
    dtype, encoding, elements, block, _, payload = sections[name]
    refuse_unless(dtype in dtypes, f"{name}: dtype")
    refuse_unless(elements == count, f"{name}: count")
    if dtype == INT8:
        refuse_unless(encoding == 0, f"{name}: encoding")
        return FLOAT32, int8_values(payload, count, block)
    refuse_unless(block == 0, f"{name}: block")
    if encoding == 1 and count and name in ("VALUES", "TAIL"):
        return dtype, coded_values(dtype, payload, count)
    refuse_unless(encoding == 0, f"{name}: encoding")
    refuse_unless(len(payload) == count * SIZES[dtype], f"{name}: size")
    return dtype, payload


def mask_of(header, sections, layout, have):
    refuse_unless(not ("MASK" in sections and "DELTA" in sections), "MASK and DELTA")
    carried = sections.get("MASK") or sections.get("DELTA")
    if header["dense"]:
        refuse_unless(carried is None, "a mask section beside DENSE")
        bits = layout.eligible
    elif carried is None:
        refuse_unless(have is not None, "the receiver has no mask")
        bits = have
    else:
        dtype, encoding, count, block, parent, payload = carried
        refuse_unless(dtype == BIT and block == 0, "dtype of a mask")
        refuse_unless(encoding <= 1, "encoding of a mask")
        if "DELTA" in sections:
            refuse_unless(have is not None and mask_digest(have) == parent, "parent")
        places = (
            [i for i, bit in enumerate(have) if bit] if "DELTA" in sections else range(layout.P)
        )
        refuse_unless(count == len(places), "count of a mask")
        if encoding == 1:
            runs = layout.tensors
            if "DELTA" in sections:
                inside = [sum(have[start : start + n]) for start, n in runs]
                runs = [(sum(inside[:r]), n) for r, n in enumerate(inside)]
            carried_bits = coded_bits(payload, runs, count)
        else:
            refuse_unless(len(payload) == -(-count // 32) * 4, "size of a mask")
            carried_bits = to_bits(payload, count)
        bits = [False] * layout.P
        for place, bit in zip(places, carried_bits, strict=True):
            bits[place] = bit
    refuse_unless(
        not any(b and not e for b, e in zip(bits, layout.eligible, strict=True)), "padding survives"
    )
    refuse_unless(mask_digest(bits) == header["mask"], "mask digest")
    refuse_unless(header["dense"] == (sum(bits) == layout.E), "DENSE")
    return bits


def record_of(section):
    dtype, encoding, count, block, _, payload = section
    refuse_unless(dtype == RECORD and encoding == 0 and block == 0, "META: type")
    refuse_unless(0 < len(payload) <= 4096, "META: size")
    refuse_unless(count <= 256, "META: count")
    record, last, at = {}, b"", 0

    def take(n):
        nonlocal at
        refuse_unless(at + n <= len(payload), "META: cut short")
        at += n
        return payload[at - n : at]

    def text(n):
        try:
            return take(n).decode()
        except UnicodeDecodeError:
            raise Refused("META: UTF-8") from None

    while at < len(payload):
        key = text(take(1)[0])
        refuse_unless(key.encode() > last, "META: order of keys")
        last = key.encode()
        kind = take(1)[0]
        refuse_unless(kind <= 3, "META: type of a value")
        if kind == 0:
            flag = take(1)[0]
            refuse_unless(flag <= 1, "META: Boolean")
            record[key] = bool(flag)
        elif kind == 1:
            record[key] = struct.unpack("<q", take(8))[0]
        elif kind == 2:
            record[key] = struct.unpack("<d", take(8))[0]
        else:
            record[key] = text(struct.unpack("<H", take(2))[0])
    refuse_unless(len(record) == count, "META: count")
    return record


def read(data, layout, have=None, base=None):
    """Everything in a message, or Refused.

    `have` is the receiver's mask as a list of P bools; `base` the result of reading the broadcast
    that values may be differences from. Values come as the bytes of their elements.
    """
    header, sections = sections_of(data)
    refuse_unless(header["layout"] == layout.digest, "another layout")
    refuse_unless(header["eligible"] == layout.E, "eligible")
    bits = mask_of(header, sections, layout, have)
    floats = (FLOAT32, FLOAT16, BFLOAT16)
    dtype, values = elements_of(sections, "VALUES", sum(bits), (*floats, INT8))
    tail_dtype, tail = elements_of(sections, "TAIL", layout.T, floats)
    size = SIZES[tail_dtype]
    for i in layout.tail_gaps:
        refuse_unless(not any(tail[i * size : (i + 1) * size]), "TAIL: a gap is not zero")
    _, float_buffers = elements_of(sections, "FLOATS", layout.buffers["float"], (FLOAT32, FLOAT64))
    _, int_buffers = elements_of(sections, "INTS", layout.buffers["int"], (INT64,))
    _, bool_buffers = elements_of(sections, "BOOLS", layout.buffers["bool"], (BOOL,))
    refuse_unless(max(bool_buffers, default=0) <= 1, "BOOLS: a byte above 1")
    if header["base"] != ZERO:
        refuse_unless(base is not None and base["header"]["digest"] == header["base"], "base")
        refuse_unless(base["header"]["mask"] == header["mask"], "mask of the base")
        a, b = as_floats(base["dtype"], base["values"]), as_floats(dtype, values)
        # A double holds the sum of two float32 closely enough that rounding it once more is right.
        values = b"".join(single(x + y) for x, y in zip(a, b, strict=True))
        dtype = FLOAT32
    return {
        "header": header,
        "mask": bits,
        "dtype": dtype,
        "values": values,
        "tail": tail,
        "floats": float_buffers,
        "ints": int_buffers,
        "bools": bool_buffers,
        "meta": record_of(sections["META"]) if "META" in sections else {},
    }


def as_floats(dtype, payload):
    if dtype == FLOAT32:
        return [x for (x,) in struct.iter_unpack("<f", payload)]
    if dtype == FLOAT16:
        return [x for (x,) in struct.iter_unpack("<e", payload)]
    return [struct.unpack("<f", b"\0\0" + payload[i : i + 2])[0] for i in range(0, len(payload), 2)]


if __name__ == "__main__":
    message = read(Path(sys.argv[2]).read_bytes(), Layout(Path(sys.argv[1]).read_text()))
    for name, value in {**message.pop("header"), **message}.items():
        shown = value.hex() if isinstance(value, bytes) else value
        print(f"{name:8} {str(shown)[:100]}")
