"""Cases of the message: its parts by themselves, and whole ones beside what people send otherwise.

The bytes of masks are counted in bits: a mask of n elements moves n / 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fedmap_sparse as fs
from fedmap_sparse import _checks, ops
from fedmap_sparse.bench import floors, formats, inputs
from fedmap_sparse.bench.case import CheckFailed, Peer, Setting, Trial, case, same, same_mask
from fedmap_sparse.codec import Message
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops import entropy

#: The mask before this one, where there is none on record, held so many times its survivors.
PARENT = 1.25


def _parent(s: Setting, params: fs.FlatParameters, mask: Mask) -> Mask:
    """The mask of the pruning round before."""
    if not s.inputs.startswith(inputs.RUN):
        return ops.magnitude_mask(params.prunable, min(s.n, round(PARENT * mask.nnz)))
    kept = inputs.run(s.inputs.removeprefix(inputs.RUN))[1][: s.n]
    return Mask.from_bool(nn.functional.pad(kept, (0, mask.numel - s.n))).to(s.device)


def _runs(n: int) -> entropy.Runs:
    return entropy.Runs(torch.zeros(1, dtype=torch.int64), torch.tensor([n]))


@case("mask_encode", densities=(0.5, 0.1, 0.01), dtypes=(torch.float32,), group="message")
def mask_encode(s: Setting) -> Trial:
    mask = s.mask(s.values())
    runs, nnz = _runs(s.n), torch.tensor([mask.nnz])

    def ours() -> Tensor | None:
        return entropy.encode_mask(mask.words, runs, nnz, 2 * mask.words.nbytes)

    def check() -> None:
        payload = ours()
        if payload is None:
            raise CheckFailed("encode_mask: expected fewer bytes than two bitmaps have")
        words = entropy.decode_mask(payload, runs, s.n)
        same("decode_mask(encode_mask)", words, mask.words)

    return Trial(ours, check, s.n // 8, floors.read(mask.words), sizes=_sizes(ours()))


@case("mask_decode", densities=(0.5, 0.1, 0.01), dtypes=(torch.float32,), group="message")
def mask_decode(s: Setting) -> Trial:
    mask = s.mask(s.values())
    runs = _runs(s.n)
    payload = entropy.encode_mask(mask.words, runs, torch.tensor([mask.nnz]), 2 * mask.words.nbytes)
    assert payload is not None

    def ours() -> Tensor:
        return entropy.decode_mask(payload, runs, s.n)

    return Trial(
        ours,
        lambda: same("decode_mask", ours(), mask.words),
        s.n // 8,
        floors.read(mask.words),
        sizes=_sizes(payload),
    )


@case("values_encode", densities=(0.1,), group="message")
def values_encode(s: Setting) -> Trial:
    values = s.values()
    packed = ops.pack(values, s.mask(values))

    def ours() -> Tensor | None:
        return entropy.encode_values(packed, 2 * packed.nbytes)

    def check() -> None:
        payload = ours()
        assert payload is not None
        decoded = entropy.decode_values(payload, packed.numel(), packed.dtype)
        same("decode_values(encode_values)", decoded, packed)

    return Trial(ours, check, packed.nbytes, floors.read(packed), sizes=_sizes(ours()))


@case("values_decode", densities=(0.1,), group="message")
def values_decode(s: Setting) -> Trial:
    values = s.values()
    packed = ops.pack(values, s.mask(values))
    payload = entropy.encode_values(packed, 2 * packed.nbytes)
    assert payload is not None

    def ours() -> Tensor:
        return entropy.decode_values(payload, packed.numel(), packed.dtype)

    return Trial(
        ours,
        lambda: same("decode_values", ours(), packed),
        packed.nbytes,
        floors.read(packed),
        sizes=_sizes(payload),
    )


@case("encode", densities=(0.1,), dtypes=(torch.float32, torch.bfloat16), group="message")
def encode(s: Setting) -> Trial:
    """The mask is known to the receiver: survivors alone travel."""
    return _encode(s, "none")


@case("encode_delta", densities=(0.1,), dtypes=(torch.float32,), group="message")
def encode_delta(s: Setting) -> Trial:
    """The receiver has the mask of the pruning round before."""
    return _encode(s, "delta")


@case(
    "encode_full",
    densities=(0.1,),
    dtypes=(torch.float32,),
    group="message",
    peers_from=tuple(formats.OPTIONAL),
)
def encode_full(s: Setting) -> Trial:
    """The receiver has nothing, as the peers assume."""
    return _encode(s, "full")


@case("decode_full", densities=(0.1,), dtypes=(torch.float32,), group="message")
def decode_full(s: Setting) -> Trial:
    params, mask = _model(s)
    data = fs.encode(params, mask, mask_section="full", dtype=_checks.short(s.dtype))

    def ours() -> Message:
        message = fs.decode(data, params.layout)
        message.packed  # noqa: B018  # decoded when asked for
        return message

    def check() -> None:
        same("decode().packed", ours().packed, ops.pack(params.prunable, mask))
        same_mask("decode().mask", ours().mask, mask.to("cpu"))

    moved = len(data) + mask.words.nbytes + s.dtype.itemsize * mask.nnz
    stream = torch.empty(moved // 4 + 16)
    return Trial(ours, check, moved, floors.read(stream), sizes={"ours": len(data)})


def _model(s: Setting) -> tuple[fs.FlatParameters, Mask]:
    """One weight of `n` elements, and its mask."""
    model = nn.Linear(s.n, 1, bias=False, device="meta")
    model.weight = nn.Parameter(s.values().view(1, -1))
    params = fs.flatten(model)
    return params, s.mask(params.prunable.detach())


def _encode(s: Setting, section: Any) -> Trial:
    params, mask = _model(s)
    parent = _parent(s, params, mask) if section == "delta" else None
    given = {"mask_section": section, "parent": parent, "dtype": _checks.short(s.dtype)}

    def ours() -> bytes:
        return fs.encode(params, mask, **given)

    def check() -> None:
        known = {"none": mask, "delta": parent, "full": None}[section]
        message = fs.decode(ours(), params.layout, mask=known)
        same("decode(encode).packed", message.packed, ops.pack(params.prunable, mask))
        same_mask("decode(encode).mask", message.mask, mask)

    moved = mask.words.nbytes + params.prunable.nbytes + s.dtype.itemsize * mask.nnz
    writers = (
        formats.of(params.prunable.detach().cpu()[: s.n], mask.to("cpu"))
        if section == "full"
        else {}
    )
    peers = {"pack alone": Peer(lambda: ops.pack(params.prunable, mask))}
    peers |= {name: Peer(write) for name, write in writers.items()}
    sizes = {"ours": len(ours()), "pack alone": s.dtype.itemsize * mask.nnz}
    sizes |= {name: len(write()) for name, write in writers.items()}
    return Trial(ours, check, moved, floors.read(params.prunable), peers, sizes=sizes)


def _sizes(payload: Tensor | None) -> dict[str, int]:
    return {} if payload is None else {"ours": payload.numel()}
