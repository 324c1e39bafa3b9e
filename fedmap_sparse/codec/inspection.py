"""What a message holds, told without its layout: `fedmap-sparse inspect FILE`."""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fedmap_sparse import _files
from fedmap_sparse.codec import container, meta
from fedmap_sparse.codec.container import DENSE, NO_DIGEST, Buffer, Header, Id, Section, Wire
from fedmap_sparse.errors import FormatError

_ENCODINGS = {container.RAW: "raw", container.RANS: "rans"}


@dataclass(frozen=True)
class SectionInfo:
    """One section. `offset` is of its payload, `size` in bytes; `raw_size` is what the elements
    take unencoded, None where that is not defined."""

    name: str
    dtype: str
    encoding: str
    count: int
    offset: int
    size: int
    raw_size: int | None
    parent: bytes | None


@dataclass(frozen=True)
class Inspection:
    """A message's header and sections; every checksum was verified.

    Attributes:
        survivors: values in the message.
        density: survivors over the layout's eligible weights; 1.0 when there are none.
        broadcast_digest: what an update to this message would name.
    """

    size: int
    header: Header
    sections: tuple[SectionInfo, ...]
    survivors: int
    density: float
    broadcast_digest: bytes
    meta: dict[str, meta.Value]

    def __str__(self) -> str:
        h = self.header
        kind = "broadcast" if h.answers == NO_DIGEST else "update"
        mask = {"MASK": "full", "DELTA": "delta"}.get(
            self.sections[0].name if self.sections else ""
        )
        mask = mask or ("dense, no bits" if h.flags & DENSE else "none (the receiver has it)")
        lines = [
            f"{kind}, version {container.VERSION}, {self.size:,} bytes, checksums good",
            f"round {h.round}, mask epoch {h.epoch}, samples {h.samples}",
            f"survivors {self.survivors:,} of {h.eligible:,} eligible: density {self.density:.4%}",
            f"mask section  {mask}",
            f"layout digest {h.layout.hex()}",
            f"mask digest   {h.mask.hex()}",
            f"broadcast     {self.broadcast_digest.hex()}",
        ]
        if h.answers != NO_DIGEST:
            lines.append(f"answers       {h.answers.hex()}")
        if h.base != NO_DIGEST:
            lines.append(f"differences from {h.base.hex()}")
        if self.meta:
            pairs = (f"{_key(k)}={v!r}" for k, v in self.meta.items())
            lines.append("meta          " + ", ".join(pairs))
        lines.append(
            f"{'section':<8} {'dtype':<9} {'encoding':<9} {'count':>13} {'bytes':>13} offset"
        )
        for s in self.sections:
            share = "" if not s.raw_size or s.size == s.raw_size else f" {s.size / s.raw_size:.1%}"
            lines.append(
                f"{s.name:<8} {s.dtype:<9} {s.encoding:<9} {s.count:>13,} {s.size:>13,} {s.offset}"
                + (f"{share} of raw" if share else "")
            )
        return "\n".join(lines)


def _key(key: str) -> str:
    """A key of the record, which the sender chose: quoted where it could be taken for more."""
    return key if re.fullmatch(r"[\w.-]+", key, re.ASCII) else repr(key)


def inspect_file(path: Path) -> Inspection:
    """`inspect` for a file of any size, in constant memory.

    The header is checked before the rest is read, so that what is no message is refused at once.
    The rest is mapped, not read into memory.

    Args:
        path: of a regular file that holds one message.

    Returns:
        As `inspect`.

    Raises:
        FormatError: as `inspect`.
        OSError: the file cannot be read, or is none: a folder, a pipe, a device.
    """
    descriptor, size = _files.open_regular(path)
    with os.fdopen(descriptor, "rb") as stream:
        _, length, _ = container.parse_header(stream.read(container.HEADER_BYTES))
        if length != size:
            raise FormatError(f"expected a message of {length} bytes, got {size}", 112)
        # Unmapped when the last view of it is gone, which may be one that an error holds.
        return inspect(memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)))


def inspect(data: Buffer) -> Inspection:
    """Header, sections and digests of a message, with no layout: `print(inspect(data))`.

    Args:
        data: the whole message.

    Returns:
        What it holds; `print` shows a table.

    Raises:
        FormatError: the container is not sound; what only a layout can tell is not checked.

    O(bytes): every checksum is verified.
    """
    header, sections = container.parse(data)
    by_id = {s.id: s for s in sections}
    survivors = by_id[Id.VALUES].count if Id.VALUES in by_id else 0
    return Inspection(
        size=len(container.as_bytes(data)),
        header=header,
        sections=tuple(_info(s) for s in sections),
        survivors=survivors,
        density=survivors / header.eligible if header.eligible else 1.0,
        broadcast_digest=container.broadcast_digest(header, sections),
        meta=meta.read(by_id[Id.META]) if Id.META in by_id else {},
    )


def _info(s: Section) -> SectionInfo:
    return SectionInfo(
        name=f"id {s.id}" if s.ignorable else Id(s.id).name,
        dtype=f"type {s.dtype}" if s.ignorable else Wire(s.dtype).name.lower(),
        encoding=_ENCODINGS.get(s.encoding, f"id {s.encoding}"),
        count=s.count,
        offset=s.offset,
        size=len(s.payload),
        raw_size=None if s.ignorable else _raw_size(s),
        parent=None if s.parent == NO_DIGEST else s.parent,
    )


def _raw_size(s: Section) -> int | None:
    if s.dtype == Wire.BIT:
        return 4 * -(-s.count // 32)
    dtype = container.TORCH_OF_WIRE.get(Wire(s.dtype))
    return None if dtype is None else s.count * dtype.itemsize
