"""From a model, or from what is packed already, to a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks, ops
from fedmap_sparse.codec import container, masks, message, meta
from fedmap_sparse.codec.container import DENSE, NO_DIGEST, Header
from fedmap_sparse.codec.message import MaskSection, Message
from fedmap_sparse.codec.values import Coding, Quantized, check_coding
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask, check_mask
from fedmap_sparse.ops import entropy

DTYPES = {_checks.short(dtype): dtype for dtype in _checks.FLOAT_DTYPES}


class Stamp(TypedDict, total=False):
    """What the header and the record of a message say.

    round, epoch, num_samples: integers of 0 to 2^53; 0 unless given.
    answers: digest of the broadcast that an update answers (`Message.broadcast_digest`).
    meta: a small record of bool, int, float and str.
    """

    round: int
    epoch: int
    num_samples: int
    answers: bytes
    meta: Mapping[str, meta.Value] | None


class Source(Protocol):
    """What `encode` reads: a FlatParameters is one."""

    @property
    def layout(self) -> FlatLayout:
        """Names, shapes and offsets."""

    @property
    def prunable(self) -> Tensor:
        """Values that the mask covers: Tensor[layout.prunable_numel]."""

    @property
    def tail(self) -> Tensor:
        """The rest: Tensor[layout.tail_numel]."""

    @property
    def buffers(self) -> Mapping[str, Any]:
        """Name to tensor or array of each persistent buffer."""


def encode(
    params: Source,
    mask: Mask,
    *,
    dtype: str = "float32",
    mask_section: MaskSection = "none",
    parent: Mask | None = None,
    base: Message | None = None,
    coding: Coding = "entropy",
    block: int = 256,
    residual: Tensor | None = None,
    **stamp: Unpack[Stamp],
) -> bytes:
    """A message with the survivors of `params` under `mask`, its tail and its buffers.

    Args:
        params: a flattened model; its values are not changed.
        mask: which of `params.prunable` survive.
        dtype: of the values on the wire: "float32", "float16", "bfloat16" or "int8" (the tail then
            travels as float32).
        mask_section: what the receiver needs: "none" (it has the mask, and the digest proves it),
            "full" (it has nothing) or "delta" (it has `parent`). The dense mask costs no bits.
        parent: with "delta", a superset of `mask` that the receiver has.
        base: a broadcast of the same mask; values travel as float32 differences from it.
        coding: "entropy" codes mask and values where that is smaller, bit for bit the same values;
            "raw" leaves them as they are.
        block: values per scale, for int8: a multiple of 64 from 64 to 1024.
        residual: for int8, Tensor[mask.nnz] of float32, updated in place: the error of the last
            message, made good in this one (error feedback). The sender keeps it.
        stamp: `round`, `epoch`, `num_samples`, `answers` and `meta`; see `Stamp`.

    Returns:
        The message: `len(result)` is what travels.

    Raises:
        TypeError: another dtype, or a value that META cannot hold.
        ValueError: sizes that differ from the layout's or the mask's, a value that `dtype` cannot
            hold, integers out of range, a parent that is missing or no superset.

    O(bytes + n / 32).

    >>> import torch, fedmap_sparse as fs
    >>> params = fs.flatten(torch.nn.Linear(64, 64))
    >>> half = fs.ops.magnitude_mask(params.prunable, 2048, within=params.mask)
    >>> data = fs.encode(params, half, mask_section="full", round=3)
    >>> fs.decode(data, params.layout).mask == half
    True
    """
    check_mask("mask", mask, params.layout.prunable_numel)
    if isinstance(params, FlatParameters):
        params.check_bound()
    source = params.prunable.detach()
    wide = base is not None or dtype == "int8"
    out = source.new_empty(mask.nnz, dtype=torch.float32) if wide else None
    dense = not mask.numel or mask.nnz == params.layout.eligible
    plain = coding == "entropy" and mask_section == "full" and parent is None and not dense
    # On a device the mask is coded beside the values, and both are waited for at once.
    here = mask.device == params.tail.device
    ahead = plain and here and _backends.pick(None, mask.device) == "triton"
    lead = masks.begin_full(mask, params.layout) if ahead else None
    packed = ops.pack(source, mask, out=out)
    made = _composed(
        params.layout,
        mask,
        packed,
        params.tail,
        params.buffers,
        dtype,
        base,
        coding,
        block,
        residual,
        stamp,
        lead,
    )
    return made.encode() if lead is not None else made.encode(mask_section, parent)


def compose(
    layout: FlatLayout,
    mask: Mask,
    packed: Tensor | Quantized,
    tail: Tensor,
    buffers: Mapping[str, Any],
    *,
    dtype: str | None = None,
    base: Message | None = None,
    coding: Coding = "entropy",
    block: int = 256,
    residual: Tensor | None = None,
    **stamp: Unpack[Stamp],
) -> Message:
    """A message of what is packed already.

    A server composes one per round and calls its `encode` once for each mask that its clients
    have. Tensors that have the wire's dtype are viewed, not copied: they must not change while the
    message is in use.

    Args:
        layout: of the model.
        mask: over `layout.prunable_numel` elements, none of them padding.
        packed: Tensor[mask.nnz] of float32, float16 or bfloat16 (float32 with a base or for
            "int8"); or `Quantized`.
        tail: Tensor[layout.tail_numel] of one of these dtypes, as `FlatParameters.tail`.
        buffers: name to tensor or array, exactly the layout's.
        dtype: on the wire; None: values and tail keep theirs.
        base, coding, block, residual, stamp: as in `encode`.

    Returns:
        The message; `made.encode(mask_section)` gives its bytes.

    Raises:
        TypeError, ValueError: as `encode`.

    O(bytes): checksums are computed here, once.
    """
    return _composed(
        layout, mask, packed, tail, buffers, dtype, base, coding, block, residual, stamp, None
    )


def _composed(
    layout: FlatLayout,
    mask: Mask,
    packed: Tensor | Quantized,
    tail: Tensor,
    buffers: Mapping[str, Any],
    dtype: str | None,
    base: Message | None,
    coding: Coding,
    block: int,
    residual: Tensor | None,
    stamp: Stamp,
    lead: entropy.Coding | None,
) -> Message:
    """`compose`, with a mask section that a device is coding."""
    check_coding(coding)
    check_mask("mask", mask, layout.prunable_numel)
    _checks.check_tensor("tail", tail)
    _checks.check_numel("tail", tail, layout.tail_numel, "the layout's tail")
    if isinstance(packed, Quantized):
        _checks.check_numel("packed", packed.codes, mask.nnz, "the mask's nnz")
        wire: Tensor | Quantized = packed
    else:
        _checks.check_tensor("packed", packed)
        _checks.check_numel("packed", packed, mask.nnz, "the mask's nnz")
        wire = packed.detach()
        if base is not None:
            if base.mask.digest() != mask.digest():
                raise ValueError("base: expected a message of the same mask, got another")
            wire = wire.float() - base.packed.to(wire.device).float()
        wire = _narrow("values", wire, dtype, block, residual)
    rest = _narrow_tail(layout.clean_tail(tail.detach()), dtype)
    header = _header(layout, mask, NO_DIGEST if base is None else base.broadcast_digest, stamp)
    return message.assemble(
        layout, mask, wire, rest, buffers, header, stamp.get("meta"), coding, base, lead
    )


def _header(layout: FlatLayout, mask: Mask, base: bytes, stamp: Stamp) -> Header:
    answers = stamp.get("answers", NO_DIGEST)
    if not isinstance(answers, bytes) or len(answers) != 16:
        raise ValueError(f"answers: expected a digest of 16 bytes, got {answers!r}")
    numbers = {
        "round": _checks.number(stamp.get("round", 0)),
        "epoch": _checks.number(stamp.get("epoch", 0)),
        "num_samples": _checks.number(stamp.get("num_samples", 0)),
    }
    if odd := stamp.keys() - numbers - {"answers", "meta"}:
        raise TypeError(f"expected {', '.join(Stamp.__annotations__)}, got {', '.join(odd)}")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if not 0 <= value <= container.MAX_INTEGER:
            raise ValueError(f"{name}: expected 0 to 2^53, got {value}")
    return Header(
        layout=layout.digest(),
        mask=mask.digest(),
        eligible=layout.eligible,
        flags=DENSE if mask.nnz == layout.eligible else 0,
        answers=answers,
        base=base,
        round=numbers["round"],
        epoch=numbers["epoch"],
        samples=numbers["num_samples"],
    )


def check_dtype(dtype: str) -> None:
    """Raise unless values can travel as `dtype`.

    Args:
        dtype: "float32", "float16", "bfloat16" or "int8".

    Raises:
        ValueError: another word.
    """
    if dtype not in (*DTYPES, "int8"):
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, int8, got {dtype!r}")


def _narrow(
    name: str, t: Tensor, dtype: str | None, block: int, residual: Tensor | None
) -> Tensor | Quantized:
    """Packed values as they travel; no copy if they have the dtype."""
    if dtype is None:
        return t
    check_dtype(dtype)
    if dtype == "int8":
        return Quantized.of(t, block, residual)
    return _cast(name, t, DTYPES[dtype])


def _narrow_tail(tail: Tensor, dtype: str | None) -> Tensor:
    return tail if dtype is None else _cast("tail", tail, DTYPES.get(dtype, torch.float32))


def _cast(name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    if t.dtype == dtype:
        return t
    cast, overflowed = ops.cast(t, dtype)
    if overflowed:
        short = _checks.short(dtype)
        raise ValueError(f"{name}: expected the range of {short}, got {overflowed} beyond it")
    return cast
