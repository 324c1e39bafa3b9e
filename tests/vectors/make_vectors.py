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
from malformed_vectors import malformed  # lies beside this file

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
        print("wrote", path.relative_to(HERE))
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
