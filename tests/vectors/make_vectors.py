"""Writes the golden and malformed messages that are missing; never changes one that is there.

`make vectors`. Each golden message is in golden.json with the layout and the mask (in masks/)
that a receiver needs, and a SHA-256 of its contents; each malformed one in malformed.json with what
is wrong.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch

import fedmap_sparse as fs
from fedmap_sparse import codec
from fedmap_sparse.codec import container

HERE = Path(__file__).parent


def layouts() -> dict[str, fs.FlatLayout]:
    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    net = {
        "conv.weight": tensor(4, 3, 3, 3),
        "conv.bias": tensor(4),
        "bn.running_mean": tensor(4),
        "bn.running_var": tensor(4),
        "bn.num_batches_tracked": tensor(dtype=torch.int64),
        "seen": tensor(3, dtype=torch.bool),
        "fc.weight": tensor(10, 20),
        "fc.bias": tensor(10),
        "tied.weight": tensor(10, 20),
        "größe": tensor(2),
    }
    return {
        "net": fs.FlatLayout.from_state_dict(net, aliases={"tied.weight": "fc.weight"}),
        "one": fs.FlatLayout.from_state_dict({"w": tensor(20, 50)}),
        "tail": fs.FlatLayout.from_state_dict({"b": tensor(5)}),
        "example": fs.FlatLayout.from_state_dict({"w": tensor(2, 3), "b": tensor(3)}),
        # Enough bits for several chunks; runs that end within a nibble, a step, and not at all.
        "wide": fs.FlatLayout.from_state_dict(
            {
                "a": tensor(1, 515),
                "b": tensor(150, 1003),
                "c": tensor(3, 1),
                "d": tensor(64, 2),
                "e": tensor(300, 2),
                "bias": tensor(700),
            }
        ),
    }


def noise(count: int, seed: int) -> torch.Tensor:
    """Deterministic float32 of 16 magnitudes, from integers alone."""
    x = [(seed + i) * 0x9E3779B97F4A7C15 & (1 << 64) - 1 for i in range(1, count + 1)]
    x = [(v ^ v >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1 for v in x]
    bits = [(v >> 63) << 31 | (110 + (v >> 50) % 16) << 23 | (v >> 20) & 0x7FFFFF for v in x]
    return torch.tensor([struct.unpack("<f", struct.pack("<I", b))[0] for b in bits])


class Model:
    """The parts of a model of one layout, filled with noise."""

    def __init__(self, layout: fs.FlatLayout, seed: int = 1) -> None:
        self.layout = layout
        prunable = torch.zeros(layout.prunable_numel)
        self.tail = torch.zeros(layout.tail_numel)
        for e in layout.entries:
            part = noise(e.numel, seed * 1_000_000 + e.offset)
            if e.offset < layout.prunable_numel:
                prunable[e.offset : e.offset + e.numel] = part
            else:
                start = e.offset - layout.prunable_numel
                self.tail[start : start + e.numel] = part
        self.prunable = prunable
        self.buffers = {}
        for b in layout.buffers:
            n = torch.Size(b.shape).numel()
            value = {"float": noise(n, seed), "int": torch.tensor([-seed << 40] * n)}.get(
                b.kind, torch.arange(n) % 2 == 0
            )
            self.buffers[b.name] = value.view(b.shape)

    def mask(self, keep: int, within: fs.Mask | None = None) -> fs.Mask:
        within = within or self.layout.initial_mask()
        return fs.ops.magnitude_mask(self.prunable, keep, within=within)

    def drop(self, name: str, mask: fs.Mask) -> fs.Mask:
        """`mask` without one tensor's survivors."""
        keep = mask.to_bool()
        e = next(e for e in self.layout.entries if e.name == name)
        keep[e.offset : e.offset + e.numel] = False
        return fs.Mask.from_bool(keep)

    def encode(self, mask: fs.Mask, **options: Any) -> bytes:
        options = {"dtype": "float32", "mask_section": "none", **options}
        return codec.encode(self, mask, **options)


def golden() -> dict[str, tuple[str, bytes, fs.Mask | None, str | None]]:
    """Name to (layout, message, mask the receiver needs, golden message that is the base)."""
    lay = layouts()
    net, one, tail = (Model(lay[name]) for name in ("net", "one", "tail"))
    parent = net.mask(200)
    mask = net.mask(61, parent)
    dense = lay["net"].initial_mask()
    out: dict[str, tuple[str, bytes, fs.Mask | None, str | None]] = {}
    for dtype in ("float32", "float16", "bfloat16"):
        common = {"dtype": dtype, "coding": "raw", "round": 7, "epoch": 2}
        meta = {"lr": 0.1}
        for kind, have in (("none", mask), ("full", None), ("delta", parent)):
            data = net.encode(
                mask,
                mask_section=kind,
                parent=have if kind == "delta" else None,
                meta=meta,
                **common,
            )
            out[f"{dtype}-{kind}"] = ("net", data, have, None)
    raw = {"coding": "raw"}
    out["dense"] = ("net", net.encode(dense, **raw), None, None)
    out["nothing-kept"] = ("net", net.encode(net.mask(0), mask_section="full", **raw), None, None)
    out["one-tensor"] = ("one", one.encode(one.mask(100), mask_section="full", **raw), None, None)
    out["no-prunable"] = ("tail", tail.encode(lay["tail"].initial_mask(), **raw), None, None)
    base = codec.decode(out["float32-none"][1], lay["net"], mask=mask)
    record = {"loss": float("nan"), "ok": True, "n": -(1 << 63), "übung": "ünïcödé"}
    out["update"] = (
        "net",
        Model(lay["net"], 2).encode(
            mask, num_samples=1 << 53, round=7, answers=base.broadcast_digest, meta=record, **raw
        ),
        mask,
        None,
    )
    for dtype in ("float32", "bfloat16"):
        data = Model(lay["net"], 2).encode(
            mask, dtype=dtype, base=base, answers=base.broadcast_digest, **raw
        )
        out[f"difference-{dtype}"] = ("net", data, mask, "float32-none")
    strange = Model(lay["net"])
    odd = [float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1e-45, -1e-40, 3.4e38]
    strange.prunable[: len(odd)] = torch.tensor(odd)
    strange.buffers["bn.running_var"] = strange.buffers["bn.running_var"].double() / 3
    data = strange.encode(dense, **raw)
    out["specials-float64-buffers"] = ("net", data, None, None)
    out["example"] = ("example", example(lay["example"]), None, None)
    wide = Model(lay["wide"])
    parent = wide.drop("e", wide.mask(30_000))
    child = wide.mask(4_000, parent)
    for kind, have in (("full", None), ("delta", parent)):
        data = wide.encode(
            child, mask_section=kind, parent=have if kind == "delta" else None, dtype="bfloat16"
        )
        out[f"rans-mask-{kind}"] = ("wide", data, have, None)
    common = wide.encode(
        parent, mask_section="delta", parent=lay["wide"].initial_mask(), dtype="int8", block=1024
    )
    out["rans-two-chunks"] = ("wide", common, lay["wide"].initial_mask(), None)
    place = torch.arange(lay["wide"].prunable_numel)
    spread = fs.Mask.from_bool((place * 7919 % 40 == 0) & lay["wide"].initial_mask().to_bool())
    for dtype in ("float32", "float16", "bfloat16"):
        data = wide.encode(spread, dtype=dtype)
        out[f"rans-{dtype}"] = ("wide", data, spread, None)
    wide.prunable[spread.to_bool().nonzero().view(-1)[::5]] = 0.0
    wide.prunable[spread.to_bool().nonzero().view(-1)[3::500]] = float("nan")
    out["rans-escapes"] = ("wide", wide.encode(spread), spread, None)
    clean = Model(lay["wide"])
    for block in (64, 256):
        data = clean.encode(spread, dtype="int8", block=block)
        out[f"int8-{block}"] = ("wide", data, spread, None)
    base = codec.decode(out["rans-bfloat16"][1], lay["wide"], mask=spread)
    data = Model(lay["wide"], 2).encode(spread, dtype="int8", base=base)
    out["int8-difference"] = ("wide", data, spread, "rans-bfloat16")
    out["ignorable"] = ("net", ignorable(out["float16-none"][1]), mask, None)
    return out


def example(layout: fs.FlatLayout) -> bytes:
    """The message that docs/format.md walks through."""
    model = Model(layout)
    model.prunable[:6] = torch.tensor([0.5, -0.25, 1.0, -2.0, 0.125, 0.0625])
    model.tail[:3] = torch.tensor([1.0, 2.0, 3.0])
    options = {"mask_section": "full", "dtype": "bfloat16", "round": 7, "epoch": 2}
    return model.encode(model.mask(3), meta={"lr": 0.1}, **options)


def ignorable(data: bytes) -> bytes:
    """The message with every ignorable flag of the header and of one section set, and a section
    more that a reader of this version skips."""
    header, sections = container.parse(data)
    extra = container.Section.make(0x8001, 99, 12345, b"from the future", encoding=77)
    first = container.Section.make(
        sections[0].id, sections[0].dtype, sections[0].count, sections[0].payload, flags=0xFF00
    )
    fields = {**header.__dict__, "flags": header.flags | 0xFFFF0000}
    return container.join(container.Header(**fields), [first, *sections[1:], extra])


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


def content_hash(m: codec.Message) -> str:
    """SHA-256 over what a message holds, decoded."""
    h = hashlib.sha256(m.mask.words.numpy().tobytes())
    for t in (m.packed, m.tail, *m.buffers.values()):
        h.update(bytes(container.tensor_bytes(t.reshape(-1))))
    h.update(repr(sorted(m.meta.items())).encode())
    return h.hexdigest()


def layout_json(layout: fs.FlatLayout) -> str:
    return json.dumps(
        {
            "entries": [[e.name, list(e.shape), e.offset] for e in layout.entries],
            "prunable_numel": layout.prunable_numel,
            "numel": layout.numel,
            "aliases": sorted(list(pair) for pair in layout.aliases),
            "buffers": [[b.name, list(b.shape), b.kind] for b in layout.buffers],
        },
        indent=1,
    )


def write_missing(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_bytes(data)
        print("wrote", path.extract_to(HERE))
    elif path.read_bytes() != data:
        raise SystemExit(f"{path} exists and would change: golden messages never do")


def main() -> None:
    lay = layouts()
    for name, layout in lay.items():
        write_missing(HERE / "layouts" / f"{name}.json", (layout_json(layout) + "\n").encode())
    good = golden()
    index: dict[str, Any] = {}
    messages: dict[str, codec.Message] = {}
    for name, (layout, data, have, base) in good.items():
        write_missing(HERE / "golden" / f"{name}.fsm", data)
        if have is not None:
            bits = have.words.numpy().tobytes()
            write_missing(HERE / "masks" / f"{have.digest().hex()[:8]}.bits", bits)
        message = codec.decode(data, lay[layout], mask=have, base=messages[base] if base else None)
        messages[name] = message
        index[name] = {
            "layout": layout,
            "have": None if have is None else have.digest().hex()[:8],
            "base": base,
            "sha256": content_hash(message),
        }
    bad: dict[str, Any] = {}
    for name, (source, data, reason, at) in malformed(good).items():
        write_missing(HERE / "malformed" / f"{name}.fsm", data)
        bad[name] = {"from": source, "reason": reason, "offset": at}
    for file, table in (("golden.json", index), ("malformed.json", bad)):
        path = HERE / file
        old = json.loads(path.read_text()) if path.exists() else {}
        for name in old:
            if old[name] != table.get(name):
                raise SystemExit(f"{file}: the entry {name} would change")
        path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
