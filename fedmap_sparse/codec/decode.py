"""From bytes of an untrusted sender to a message."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedmap_sparse import _backends
from fedmap_sparse.codec import buffers, container, masks, meta, values
from fedmap_sparse.codec.container import (
    DENSE,
    NO_DIGEST,
    RANS,
    RAW,
    Buffer,
    Header,
    Id,
    Section,
    Wire,
)
from fedmap_sparse.codec.message import Message
from fedmap_sparse.errors import FormatError
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask, check_mask
from fedmap_sparse.ops import entropy

#: Values of a message that are decoded once: 1 MB of float32.
_SMALL = 1 << 18


def decode(
    data: Buffer,
    layout: FlatLayout,
    *,
    mask: Mask | None = None,
    base: Message | None = None,
    materialize: bool = True,
    device: torch.device | str | None = None,
) -> Message:
    """Read a message from an untrusted sender; nothing of the receiver is changed.

    Args:
        data: the whole message. The result's tensors may view it.
        layout: what the receiver expects: every size in the message is checked against it before
            anything is allocated.
        mask: the receiver's current mask: the parent of a delta, or the mask of a message that
            carries none.
        base: the broadcast that the values may be differences from.
        materialize: False checks values that are coded tile by tile and keeps only their bytes,
            for `Message.add_to`; `packed` decodes them when it is asked for. Those of small
            messages are decoded all the same.
        device: where mask, values and tail are wanted: coded payloads are copied there once and
            decoded there. None: where `mask` is, or the CPU.

    Returns:
        The message: `packed` holds the survivors' values, `mask`, `tail` and `buffers` the rest.

    Raises:
        NeedsMask: the message needs a mask other than `mask`; see its `wanted`.
        FormatError: anything that docs/format.md, 7, says to refuse.
        TypeError: `data` is not bytes, bytearray or a contiguous memoryview.

    O(bytes + layout.prunable_numel / 32).

    >>> import torch, fedmap_sparse as fs
    >>> params = fs.flatten(torch.nn.Linear(3, 2))
    >>> message = fs.decode(fs.encode(params, params.mask, mask_section="full"), params.layout)
    >>> message.mask == params.mask, message.packed.shape
    (True, torch.Size([6]))
    """
    if mask is not None:
        check_mask("mask", mask, layout.prunable_numel)
    if device is None:
        device = values.CPU if mask is None else mask.device
    place = torch.empty(0, device=device).device  # "cuda" is one of several: the current one
    # While a device decodes, the host checks what it decodes: 10 MB take 16 cores some 0.2 ms.
    late = _backends.pick(None, place) == "triton"
    header, found = container.parse(data, payloads=not late)
    unchecked = found.copy() if late else []

    def verify() -> None:
        container.check_payloads(unchecked)
        unchecked.clear()

    try:
        return _read(header, found, len(data), layout, mask, base, materialize, place, verify)
    except Exception:
        verify()  # bytes that are not the sender's are what is wrong
        raise


def _read(
    header: Header,
    found: list[Section],
    size: int,
    layout: FlatLayout,
    mask: Mask | None,
    base: Message | None,
    materialize: bool,
    place: torch.device,
    verify: Callable[[], None],
) -> Message:
    """`decode`, of sections whose payloads `verify` checks."""
    if header.layout != layout.digest():
        wanted, got = layout.digest().hex(), header.layout.hex()
        why = layout.explain(header.layout, header.eligible)
        raise FormatError(f"expected a message of layout {wanted}, got {got}{why}", 16)
    if header.eligible != layout.eligible:
        raise FormatError(f"expected {layout.eligible} eligible, got {header.eligible}", 104)
    sections = {s.id: s for s in found if not s.ignorable}
    for s in sections.values():
        _check_fields(s)
    for needed in (Id.VALUES, Id.TAIL):
        if needed not in sections:
            raise FormatError(f"expected a section {needed.name}, got none", size)
    if Id.MASK in sections and Id.DELTA in sections:
        raise FormatError("expected MASK or DELTA, got both", sections[Id.DELTA].offset)
    dense = bool(header.flags & DENSE)
    carried = sections.pop(Id.MASK, None) or sections.pop(Id.DELTA, None)
    begun: list[entropy.Decoding | None] = []

    def meanwhile() -> None:
        begun.append(values.begin(sections.get(Id.VALUES), layout.eligible, place))
        verify()

    own = masks.read(header, carried, dense, layout, mask, place, meanwhile)
    if not begun:
        meanwhile()
    if dense is not (own.nnz == layout.eligible):
        raise FormatError(f"expected DENSE to say {not dense} of {own.nnz} survivors", 12)
    coded, rest = sections[Id.VALUES], sections[Id.TAIL]
    values.check(coded, own.nnz, (*values.FLOATS, Wire.INT8), (RAW, RANS))
    values.check(rest, layout.tail_numel, values.FLOATS, (RAW, RANS))
    tail = values.read(rest, place)
    values.check_tail(tail, rest, layout)
    message = Message(
        layout=layout,
        header=header,
        mask=own,
        sections=sections,
        tail=tail,
        flat_buffers=buffers.read(layout, sections),
        meta=meta.read(sections[Id.META]) if Id.META in sections else {},
        mask_section=carried,
        base=_check_base(header, base),
    )
    if begun[0] is not None:
        message.__dict__["packed"] = message._of_wire(values.finish(coded, begun[0]))
    # Decoding twice, to check and to add, costs more than keeping a small message's values.
    if materialize or (coded.encoding == RANS and coded.count <= _SMALL):
        message.packed  # noqa: B018  # decoded now, so that what does not decode is refused
    else:
        message._bound  # noqa: B018  # likewise
    return message


def _check_fields(section: Section) -> None:
    start = section.offset - container.SECTION_BYTES
    if section.block and section.dtype != Wire.INT8:
        raise FormatError(f"{Id(section.id).name}: expected block to be zero", start + 40)
    if section.id != Id.DELTA and section.parent != NO_DIGEST:
        raise FormatError(f"{Id(section.id).name}: expected parent to be zero", start + 24)


def _check_base(header: Header, base: Message | None) -> Message | None:
    if header.base == NO_DIGEST:
        return None
    if base is None or base.broadcast_digest != header.base:
        got = "none" if base is None else base.broadcast_digest.hex()
        raise FormatError(f"expected the base {header.base.hex()}, got {got}", 64)
    if base.header.mask != header.mask:
        raise FormatError("expected a base of the message's mask, got one of another", 64)
    return base
