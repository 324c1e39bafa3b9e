"""VALUES and TAIL: typed arrays. docs/format.md, 3 and 5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fedmap_sparse import _autocast, _backends, ops
from fedmap_sparse._transfer import to_host
from fedmap_sparse.codec.container import (
    RANS,
    RAW,
    TORCH_OF_WIRE,
    WIRE_OF_TORCH,
    Id,
    Section,
    Wire,
    tensor_view,
)
from fedmap_sparse.errors import FormatError, PayloadError
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops import entropy
from fedmap_sparse.ops.accumulate import add_int8_
from fedmap_sparse.ops.quantize import num_blocks

CPU = torch.device("cpu")
FLOATS = (Wire.FLOAT32, Wire.FLOAT16, Wire.BFLOAT16)

#: How masks and values travel: entropy-coded where that is smaller, or as they are.
Coding = Literal["entropy", "raw"]


def check_coding(coding: str) -> None:
    """Raise unless masks and values can travel so.

    Args:
        coding: "entropy" or "raw".

    Raises:
        ValueError: another word.
    """
    if coding not in get_args(Coding):
        raise ValueError(f"coding: expected 'entropy' or 'raw', got {coding!r}")


@dataclass(frozen=True)
class Quantized:
    """Values as int8 codes with one float32 scale per block, as `ops.quantize_int8` gives them."""

    codes: Tensor
    scales: Tensor
    block: int

    @staticmethod
    def of(values: Tensor, block: int, residual: Tensor | None = None) -> Quantized:
        """Quantize float32 values; arguments and errors as in `ops.quantize_int8`."""
        codes, scales = ops.quantize_int8(values, block=block, residual=residual)
        return Quantized(codes, scales, block)

    def float(self) -> Tensor:
        """What a receiver decodes: float32."""
        return ops.dequantize_int8(self.codes, self.scales, block=self.block)

    def to(self, device: torch.device) -> Quantized:
        """The same values on another device."""
        return Quantized(self.codes.to(device), self.scales.to(device), self.block)

    def payload(self) -> Tensor:
        """The bytes that travel: the scales, then the codes."""
        return torch.cat([t.view(torch.uint8) for t in (self.scales, self.codes)])


def write(kind: Id, values: Tensor, coding: Coding = "raw") -> Section:
    """A section of the elements of a CPU tensor, whose memory it views unless it is coded."""
    wire = WIRE_OF_TORCH[values.dtype]
    if coding == "entropy" and values.numel():
        coded = entropy.encode_values(values, values.nbytes - 1)
        if coded is not None:
            return Section.make(kind, wire, values.numel(), coded, encoding=RANS)
    return Section.make(kind, wire, values.numel(), values)


def write_model(
    packed: Tensor | Quantized,
    tail: Tensor,
    coding: Coding,
    lead: tuple[Mask, entropy.Coding] | None = None,
) -> list[Section]:
    """VALUES and TAIL, and MASK of a `lead` that a device is coding. On a device all are coded
    before their sizes are asked for, and fetched at once."""
    if _backends.pick(None, tail.device) != "triton":
        rest = write(Id.TAIL, tail.cpu(), coding)
        if isinstance(packed, Quantized):
            return [_int8(packed, packed.payload().cpu()), rest]
        return [write(Id.VALUES, packed.cpu(), coding), rest]
    parts: list[Tensor | Quantized] = [packed, tail]
    entropic = coding == "entropy"
    begun = [_begin(t) if entropic and isinstance(t, Tensor) else None for t in parts]
    if lead is not None:
        parts.append(lead[0].words)
        begun.append(lead[1])
    payloads = [
        (_bytes(t), RAW)
        if coded is None or size >= _bytes(t).numel()
        else (coded.room[:size], RANS)
        for t, coded, size in zip(parts, begun, entropy.Coding.sizes(begun), strict=True)
    ]
    first, rest_payload, *bits = to_host([payload for payload, _ in payloads])
    written = [_floats(Id.TAIL, tail, rest_payload, payloads[1][1])]
    if isinstance(packed, Quantized):
        written.append(_int8(packed, first))
    else:
        written.append(_floats(Id.VALUES, packed, first, payloads[0][1]))
    if lead is not None:
        numel, encoding = lead[0].numel, payloads[2][1]
        written.append(Section.make(Id.MASK, Wire.BIT, numel, bits[0], encoding=encoding))
    return sorted(written, key=lambda section: section.id)


def _begin(t: Tensor) -> entropy.Coding | None:
    return entropy.begin_values(t, t.nbytes - 1) if t.numel() else None


def _bytes(t: Tensor | Quantized) -> Tensor:
    return t.payload() if isinstance(t, Quantized) else t.detach().reshape(-1).view(torch.uint8)


def _floats(kind: Id, values: Tensor, payload: Tensor, encoding: int) -> Section:
    wire = WIRE_OF_TORCH[values.dtype]
    return Section.make(kind, wire, values.numel(), payload, encoding=encoding)


def _int8(values: Quantized, payload: Tensor) -> Section:
    return Section.make(Id.VALUES, Wire.INT8, values.codes.numel(), payload, block=values.block)


def check(section: Section, count: int, dtypes: Sequence[Wire], encodings: Sequence[int]) -> None:
    """Raise FormatError for another dtype, encoding or count, or a raw size that differs."""
    name, at = Id(section.id).name, section.offset
    if section.dtype not in dtypes:
        wanted = ", ".join(w.name.lower() for w in dtypes)
        got = Wire(section.dtype).name.lower()
        raise FormatError(f"{name}: expected {wanted}, got {got}", at)
    if section.encoding not in encodings or (section.encoding == RANS and not count):
        wanted = " or ".join(map(str, encodings if count else (RAW,)))
        raise FormatError(f"{name}: expected encoding {wanted}, got {section.encoding}", at)
    if section.count != count:
        raise FormatError(f"{name}: expected {count} elements, got {section.count}", at)
    size = count * TORCH_OF_WIRE[Wire(section.dtype)].itemsize
    if section.dtype == Wire.INT8:
        if section.encoding != RAW:
            raise FormatError(f"{name}: expected int8 in encoding 0, got another", at)
        if not 64 <= section.block <= 1024 or section.block % 64:
            wanted = "a block that is a multiple of 64 from 64 to 1024"
            raise FormatError(f"{name}: expected {wanted}, got {section.block}", at - 24)
        size += 4 * num_blocks(count, section.block)
    if section.encoding == RAW and len(section.payload) != size:
        raise FormatError(f"{name}: expected {size} bytes, got {len(section.payload)}", at)


def read(section: Section, device: torch.device = CPU) -> Tensor:
    """The elements of a checked section, 1-D, on `device`, where they are decoded: a view of the
    message where they are raw and stay on the CPU."""
    if section.dtype == Wire.INT8:
        return quantized(section).to(device).float()
    if section.encoding == RAW:
        return section.tensor().to(device)
    dtype = TORCH_OF_WIRE[Wire(section.dtype)]
    try:
        return entropy.decode_values(section.coded(), section.count, dtype, device=device)
    except PayloadError as error:
        raise _refusal(section, error) from None


def begin(section: Section | None, most: int, device: torch.device) -> entropy.Decoding | None:
    """Launch what `read` does with coded values on a device, and do not wait for it.

    Returns:
        None where nothing is gained or something is wrong, which `check` and `read` then say: the
        section was not checked, and its elements may be more than `most`.
    """
    if section is None or section.dtype not in FLOATS or section.encoding != RANS:
        return None
    if not 0 < section.count <= most or _backends.pick(None, device) != "triton":
        return None
    dtype = TORCH_OF_WIRE[Wire(section.dtype)]
    try:
        return entropy.begin_values_back(section.coded(), section.count, dtype, device)
    except PayloadError:
        return None


def finish(section: Section, begun: entropy.Decoding) -> Tensor:
    """What `read` gives or raises, of values that `begin` began with."""
    try:
        return begun.finished()
    except PayloadError as error:
        raise _refusal(section, error) from None


def peak(values: Tensor) -> float:
    """The largest magnitude; infinity if an element is NaN or infinite, 0.0 for none. One read."""
    if not values.numel():
        return 0.0
    ends = values.detach().aminmax()  # NaN goes through
    # A device is asked once; on the CPU a stack takes longer than two small values.
    low, high = map(float, ends) if values.device == CPU else _autocast.stack(ends).tolist()
    largest = max(-low, high)
    return largest if largest < math.inf else math.inf


def bound(section: Section) -> float:
    """At least the largest magnitude in a checked section; infinity if a value is not finite.

    Exact for raw values, at most twice as much for coded ones. Coded values are decoded tile by
    tile to check them, and not stored.

    Raises:
        FormatError: coded values that do not decode.
    """
    if section.dtype == Wire.INT8:
        scales = quantized(section).scales
        return 127.001 * float(scales.max()) if scales.numel() else 0.0
    if section.encoding == RAW:
        return peak(section.tensor())
    dtype = TORCH_OF_WIRE[Wire(section.dtype)]
    try:
        finite = entropy.check_values(section.coded(), section.count, dtype)
    except PayloadError as error:
        raise _refusal(section, error) from None
    if not finite:
        return math.inf
    exponent = entropy.largest_exponent(section.coded(), section.count, dtype)
    return 2.0 ** (exponent + 1 - (15 if dtype == torch.float16 else 127))


def add_to(sums: Tensor, section: Section, weight: float) -> None:
    """`sums += weight * values` in float64 from the message's bytes, after `bound`."""
    dtype = TORCH_OF_WIRE[Wire(section.dtype)]
    if section.encoding == RANS:
        entropy.add_values_(sums, section.coded(), dtype, weight)
    else:
        q = quantized(section)
        add_int8_(sums, q.codes, q.scales, q.block, weight)


def quantized(section: Section) -> Quantized:
    """The codes and scales of a checked int8 section, as views.

    Raises:
        FormatError: a scale that is negative or not finite, a code of -128, or codes in a block of
            scale 0.
    """
    split = 4 * num_blocks(section.count, section.block)
    scales = tensor_view(section.payload[:split], torch.float32)
    codes = tensor_view(section.payload[split:], torch.int8)
    bits = scales.view(torch.int32)
    if bool(((bits < 0) | (bits >= 0x7F800000)).any()):
        raise FormatError("VALUES: expected finite scales of at least 0", section.offset)
    if codes.numel() and int(codes.min()) == -128:
        raise FormatError("VALUES: expected codes from -127 to 127", section.offset + split)
    zero = bits == 0
    if bool(zero.any()):
        _check_zero_blocks(section, codes, zero)
    return Quantized(codes, scales, section.block)


def _check_zero_blocks(section: Section, codes: Tensor, zero: Tensor) -> None:
    """Raise FormatError unless blocks of scale 0 have codes of 0.

    Whole blocks are looked at as words, and their extremes are asked for: `any` over bytes took 15
    times as long as the rest of a message.
    """
    block, split = section.block, 4 * zero.numel()
    full = codes.numel() // block
    end = split + full * block
    words = tensor_view(section.payload[split:end], torch.int32, align=4).view(full, block // 4)
    chosen = words[zero[:full]]
    low, high = chosen.aminmax() if chosen.numel() else (zero.sum() * 0, zero.sum() * 0)
    if not (int(low) or int(high) or (full < zero.numel() and bool(codes[full * block :].any()))):
        return
    used = torch.cat([(words != 0).any(1), codes[full * block :].any().view(1)])[: zero.numel()]
    for index in (used & zero).nonzero()[:1].flatten().tolist():
        at = section.offset + 4 * index
        raise FormatError("VALUES: expected codes of 0 in a block of scale 0", at)


def _refusal(section: Section, error: PayloadError) -> FormatError:
    return FormatError(f"{Id(section.id).name}: {error.reason}", section.offset + error.offset)


def check_tail(tail: Tensor, section: Section, layout: FlatLayout) -> None:
    """Raise FormatError unless the gaps between the tail's tensors are zero."""
    places = layout.tail_padding
    bits = tail.view(torch.int32 if tail.element_size() == 4 else torch.int16)
    padding = bits[places.to(tail.device)].cpu()
    if not bool(padding.any()):
        return
    for place in places[padding != 0][:1].tolist():
        before = [e for e in layout.tail_entries if e.offset - layout.prunable_numel <= place][-1]
        gap = before.offset + before.numel - layout.prunable_numel
        at = section.offset + (gap * tail.element_size() if section.encoding == RAW else 0)
        raise FormatError(f"TAIL: expected zeros after {before.name}", at)
