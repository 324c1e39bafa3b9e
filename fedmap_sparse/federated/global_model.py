"""The server's global model as one value, and how a model gets into a user's module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse._backends import native
from fedmap_sparse.codec.buffers import FlatBuffers, split
from fedmap_sparse.codec.values import peak
from fedmap_sparse.errors import StateError
from fedmap_sparse.federated import state as saved
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask

# torch finds no largest element of these.
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)

#: `(survivors, mask, layout) -> scores`: float32[mask.nnz] in, as many scores out; the largest
#: stay. `layout.prunable_entries` says which tensor each of the mask's elements belongs to.
Criterion = Callable[[Tensor, Mask, FlatLayout], Tensor]


def limit_of(*dtypes: str | torch.dtype) -> float:
    """The largest magnitude that is finite in each of `dtypes`; "int8" is a wire's.

    An int8 block decodes to its largest value give or take a rounding, which must be finite too.
    """
    limits = [
        torch.finfo(torch.float32).max * (1 - 2.0**-20)
        if dtype == "int8"
        else torch.finfo(getattr(torch, dtype) if isinstance(dtype, str) else dtype).max
        for dtype in dtypes
    ]
    return min(limits)


@dataclass(frozen=True)
class GlobalModel:
    """The global model. A step makes a new one and commits it at its end, so none is left half."""

    mask: Mask
    values: Tensor  # float32[mask.nnz], the survivors
    tail: Tensor  # float32
    pruned_at: Tensor  # the epoch that pruned each weight, one byte each; 0: alive, or padding
    digests: tuple[bytes, ...]  # of the mask of each epoch
    state: dict[str, Tensor]  # of the server's optimizer, packed like values and tail

    @property
    def epoch(self) -> int:
        return len(self.digests) - 1

    @property
    def vector(self) -> Tensor:
        """Survivors and tail side by side."""
        return torch.cat([self.values, self.tail])

    def pruned(self, keep: int, criterion: Criterion | None, layout: FlatLayout) -> GlobalModel:
        """With only the `keep` best survivors; selection and packing cost O(survivors)."""
        if criterion is None:
            return self._kept(ops.magnitude_mask(self.values, keep))
        # Copies: what a criterion writes is its own affair.
        scores = criterion(self.values.clone(), copy.deepcopy(self.mask), layout)
        return self._kept(_best(scores, keep, self.values))

    def restricted(self, mask: Mask) -> GlobalModel:
        """With only the survivors of a mask that is a subset of this one."""
        return self._kept(ops.extract(mask, self.mask))

    def _kept(self, kept: Mask) -> GlobalModel:
        mask = ops.deposit(kept, self.mask)
        nnz = self.mask.nnz
        state = {
            name: torch.cat([ops.pack(t[:nnz], kept), t[nnz:]]) for name, t in self.state.items()
        }
        epoch = self.epoch + 1
        if epoch > torch.iinfo(self.pruned_at.dtype).max:
            pruned_at = self.pruned_at.to(torch.int16)
        else:
            pruned_at = self.pruned_at.clone()
        pruned_at[(self.mask & ~mask).to_bool()] = epoch
        digests = (*self.digests, mask.digest())
        values = ops.pack(self.values, kept)
        return GlobalModel(mask, values, self.tail, pruned_at, digests, state)

    def mask_at(self, epoch: int) -> Mask:
        """The mask of an earlier epoch."""
        return self.mask | Mask.from_bool(self.pruned_at > epoch)

    def state_dict(self) -> dict[str, Any]:
        """Copies, as tensors and plain values."""
        return {
            "digests": [d.hex() for d in self.digests],
            "mask": self.mask.words.clone(),
            "pruned_at": self.pruned_at.clone(),
            "values": self.values.clone(),
            "tail": self.tail.clone(),
            "optimizer": {name: t.clone() for name, t in self.state.items()},
        }

    @staticmethod
    def from_state_dict(
        state: Any, layout: FlatLayout, names: Sequence[str], device: torch.device, limit: float
    ) -> GlobalModel:
        """What `state_dict` gave, on `device`.

        Args:
            names: of the server optimizer's state.
            limit: the largest magnitude of a weight.

        Raises:
            StateError: a part that is missing, of another type or size, not finite, or that
                contradicts another; the message names it.
        """
        mask = read_mask(state, layout, device)
        digests = _digests(saved.field(state, "digests", list))
        if digests[-1] != mask.digest():
            raise StateError("mask: expected the one of the last digest, got another")
        epochs = torch.iinfo(torch.uint8 if len(digests) <= 256 else torch.int16).max
        if len(digests) > epochs + 1:
            raise StateError(f"digests: expected at most {epochs + 1}, got {len(digests)}")
        values = saved.field(state, "values", Tensor)
        tail = saved.field(state, "tail", Tensor)
        pruned_at = saved.field(state, "pruned_at", Tensor)
        optimizer = saved.field(state, "optimizer", dict)
        floats = (torch.float32,)
        saved.tensor("values", values, floats, mask.nnz, limit)
        saved.tensor("tail", tail, floats, layout.tail_numel, limit)
        saved.tensor("pruned_at", pruned_at, (torch.uint8, torch.int16), mask.numel)
        if set(optimizer) != set(names):
            got = sorted(map(str, optimizer))
            raise StateError(f"optimizer: expected {sorted(names)}, got {got}")
        largest = torch.finfo(torch.float32).max
        for name, t in optimizer.items():
            saved.tensor(f"optimizer.{name}", t, floats, values.numel() + tail.numel(), largest)
        model = GlobalModel(
            mask,
            values.to(device, copy=True),
            tail.to(device, copy=True),
            pruned_at.to(device, copy=True),
            digests,
            {name: t.to(device, copy=True) for name, t in optimizer.items()},
        )
        model._check_epochs(layout)
        return model

    def _check_epochs(self, layout: FlatLayout) -> None:
        gone = self.pruned_at != 0
        if self.pruned_at.numel() and not int(self.pruned_at.min()) >= 0:
            raise StateError("pruned_at: expected epochs of at least 0, got one below")
        if self.pruned_at.numel() and int(self.pruned_at.max()) > self.epoch:
            raise StateError(f"pruned_at: expected epochs up to {self.epoch}, got one beyond")
        if bool((gone & (self.mask | ~layout.initial_mask(self.mask.device)).to_bool()).any()):
            raise StateError("pruned_at: expected 0 for survivors and padding, got an epoch")
        for epoch, digest in enumerate(self.digests):
            if self.mask_at(epoch).digest() != digest:
                raise StateError(f"digests: expected that of the mask of epoch {epoch}")


def read_mask(state: Any, layout: FlatLayout, device: torch.device) -> Mask:
    """The mask whose words a state holds. Raises StateError."""
    words = saved.field(state, "mask", Tensor)
    saved.tensor("mask", words, (torch.int32,), -(-layout.prunable_numel // 32))
    try:
        mask = Mask.from_words(words.to(device, copy=True).contiguous(), layout.prunable_numel)
        layout.check_mask(mask)
    except ValueError as error:
        raise StateError(f"mask: {error}") from error
    return mask


def _digests(texts: list[Any]) -> tuple[bytes, ...]:
    try:
        digests = tuple(bytes.fromhex(text) for text in texts)
    except (TypeError, ValueError) as error:
        raise StateError(f"digests: expected hexadecimal text, got {error}") from error
    if not digests or any(len(d) != 16 for d in digests):
        raise StateError("digests: expected at least one, of 16 bytes each")
    return digests


def _best(scores: Tensor, keep: int, values: Tensor) -> Mask:
    """The `keep` largest of a criterion's scores; ties keep the lowest index."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"criterion: expected a tensor of scores, got {type(scores).__name__}")
    if scores.layout is not torch.strided or scores.is_complex() or scores.is_quantized:
        raise TypeError(
            f"criterion: expected a dense tensor of real scores, got {scores.dtype} "
            f"({scores.layout})"
        )
    if scores.shape != values.shape or scores.device != values.device:
        raise ValueError(
            f"criterion: expected {values.numel()} scores on {values.device}, got shape "
            f"{tuple(scores.shape)} on {scores.device}"
        )
    scores = scores.detach()
    if scores.dtype not in (torch.float64, torch.int32, torch.int64):  # float32 holds the others
        scores = scores.to(torch.float64 if scores.dtype in _WIDE_UNSIGNED else torch.float32)
    if bool(scores.isnan().any()):
        raise ValueError("criterion: expected scores that are numbers, got NaN")
    if scores.dtype == torch.float32 and bool((scores >= 0).all()):
        return ops.magnitude_mask(scores.contiguous(), keep)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.sort(descending=True, stable=True).indices[:keep]] = True
    return Mask.from_bool(chosen)


def write_model(params: FlatParameters, mask: Mask, values: Tensor, tail: Tensor) -> None:
    params.mark_written()  # first: it is what torch refuses, for parameters made in inference mode
    params.mask = mask
    ops.unpack(values, mask, out=params.prunable)
    with torch.no_grad():
        ops.cast(tail, params.values.dtype, out=params.tail)
    params.note_clean()  # `unpack` wrote the zeros too


def check_buffers(params: FlatParameters, flat: FlatBuffers) -> None:
    """Raise ValueError, naming the buffer, unless each fits the module's own.

    Infinite elements are allowed (a causal mask has them), NaN is not. A finite element must be
    finite in the module's dtype, an integer within its range.
    """
    params.layout.check_carried()
    own = params.buffers
    if not _are_ordinary(params.layout, own, flat):
        check_each(own, split(params.layout, flat))


def check_each(own: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """`check_buffers`, one after another, of buffers whose names and shapes may be any."""
    for name, held in own.items():
        b = buffers.get(name)
        if not isinstance(b, Tensor) or b.shape != held.shape:
            got = tuple(b.shape) if isinstance(b, Tensor) else "none"
            raise ValueError(f"{name}: expected a buffer of shape {tuple(held.shape)}, got {got}")
        if b.is_floating_point() is not held.is_floating_point() or (
            (b.dtype == torch.bool) is not (held.dtype == torch.bool)
        ):
            raise ValueError(f"{name}: expected a buffer like {held.dtype}, got {b.dtype}")
        if held.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{name}: expected a buffer that may be written, got one that was made in "
                "inference mode; clone it in the module"
            )
        if _overlaps(held) and not torch.equal(held, b.view(held.shape).to(held)):
            raise ValueError(
                f"{name}: expected a buffer that can take other values, got an expanded one of "
                f"strides {held.stride()}; clone it in the module"
            )
        if b.is_floating_point():
            if bool(b.isnan().any()):
                raise ValueError(f"{name}: expected numbers, got NaN")
            if peak(b[b.isfinite()]) > torch.finfo(held.dtype).max:
                raise ValueError(f"{name}: expected the range of {held.dtype}, got more")
        elif b.dtype != torch.bool and b.numel():
            info, wide = torch.iinfo(held.dtype), b.to(torch.int64)  # torch has no uint16.min()
            if int(wide.min()) < info.min or int(wide.max()) > info.max:
                raise ValueError(f"{name}: expected the range of {held.dtype}, got more")


def _are_ordinary(layout: FlatLayout, own: Mapping[str, Tensor], flat: FlatBuffers) -> bool:
    """Whether all fit and are finite, seen by one pass over all of a kind; False: look at each."""
    held = own.values()
    if not all(map(Tensor.is_contiguous, held)) or any(map(Tensor.is_inference, held)):
        return False
    for kind, of in layout.buffer_kinds.items():
        dtypes = {own[name].dtype for name in of.names}
        if kind == "float" and dtypes and peak(flat[kind]) > limit_of(*dtypes):
            return False
        if kind == "int" and dtypes - {torch.int64} and flat[kind].numel():
            low, high = (int(t) for t in flat[kind].aminmax())
            info = [torch.iinfo(d) for d in dtypes]
            if low < max(i.min for i in info) or high > min(i.max for i in info):
                return False
    return True


def infinite_elements(layout: FlatLayout, flat: FlatBuffers) -> dict[str, int]:
    """How many elements of each float buffer are no numbers; only buffers that have some."""
    if math.isfinite(peak(flat["float"])):
        return {}
    of = layout.buffer_kinds["float"]
    parts = (~flat["float"].isfinite()).split(of.sizes)
    counts = {name: int(part.sum()) for name, part in zip(of.names, parts, strict=True)}
    return {name: count for name, count in counts.items() if count}


@torch.no_grad()
def write_buffers(params: FlatParameters, flat: FlatBuffers) -> None:
    """Write what `check_buffers` let pass."""
    own = params.buffers
    for kind, of in params.layout.buffer_kinds.items():
        held = [own[name] for name in of.names]
        if not held:
            continue
        written = native is not None and not any(map(Tensor.is_inference, held))
        if written and native.scatter(flat[kind], of.shapes, held):
            torch.autograd.graph.increment_version(held)
            continue
        parts = zip(held, of.shapes, flat[kind].split(of.sizes), strict=True)
        # An expanded one has these values already.
        for b, shape, part in parts:
            if not _overlaps(b):
                b.copy_(part.view(shape))


def _overlaps(t: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor do."""
    return any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))
