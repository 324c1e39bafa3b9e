"""Where the state of an optimizer's own parameters lies: survivors side by side, then the tail."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.layout import TAIL_ALIGN, FlatLayout
from fedmap_sparse.mask import Mask


@dataclass(frozen=True)
class Packing:
    """The order of packed state: one element per survivor of `own`, then one per tail element.

    Attributes:
        layout: of the model.
        mask: of the model.
        indices: into `layout.entries`, of the optimizer's parameters, in order.
        own: the survivors of these; `mask` itself where they are all parameters.
        tail: [start, stop) of the flat buffer, from the first to the last of these in the tail.
    """

    layout: FlatLayout
    mask: Mask
    indices: tuple[int, ...]
    own: Mask
    tail: tuple[int, int]

    @staticmethod
    def of(layout: FlatLayout, mask: Mask, indices: Iterable[int]) -> Packing:
        """The packing of these parameters under `mask`; its state is no larger than theirs."""
        chosen = tuple(sorted(indices))
        if len(chosen) == len(layout.entries):
            return Packing(layout, mask, chosen, mask, (layout.prunable_numel, layout.numel))
        with torch.inference_mode(False):
            words = torch.zeros_like(mask.words)
            for i in chosen:
                e = layout.entries[i]
                if e.offset < layout.prunable_numel:
                    inside = slice(e.offset // 32, (e.offset + e.numel + 31) // 32)
                    words[inside] = mask.words[inside]
            own = Mask.from_words(words, mask.numel)
        dense = [e for i in chosen if (e := layout.entries[i]).offset >= layout.prunable_numel]
        if not dense:
            return Packing(layout, mask, chosen, own, (layout.numel, layout.numel))
        stop = dense[-1].offset + -(-dense[-1].numel // TAIL_ALIGN) * TAIL_ALIGN
        return Packing(layout, mask, chosen, own, (dense[0].offset, stop))

    @property
    def is_whole(self) -> bool:
        """Whether all parameters are the optimizer's."""
        return len(self.indices) == len(self.layout.entries)

    @property
    def size(self) -> int:
        """Elements of each packed tensor."""
        return self.own.nnz + self.tail[1] - self.tail[0]

    def mask_of(self, index: int) -> Mask | None:
        """The survivors of one parameter; None for those of the tail, which have no mask."""
        e = self.layout.entries[index]
        if e.offset >= self.layout.prunable_numel:
            return None
        words = self.own.words[e.offset // 32 : (e.offset + e.numel + 31) // 32]
        return Mask.from_words(words, e.numel)

    @cached_property
    def spans(self) -> dict[int, tuple[int, int]]:
        """[start, stop) in packed state, of each of the parameters."""
        found, at = {}, 0
        for i in self.indices:
            e, mask = self.layout.entries[i], self.mask_of(i)
            if mask is None:
                start = self.own.nnz + e.offset - self.tail[0]
                found[i] = start, start + e.numel
            else:
                found[i] = at, at + mask.nnz
                at += mask.nnz
        return found

    def zeros(self, device: torch.device) -> Tensor:
        """A packed tensor of zeros: float32, whatever torch's default dtype and device are."""
        with torch.inference_mode(False):
            return torch.zeros(self.size, dtype=torch.float32, device=device)

    def view(self, packed: Tensor, index: int) -> Tensor:
        """One parameter's part of a packed tensor: 1-D, or of its shape if all of it survives."""
        start, stop = self.spans[index]
        shape = self.layout.entries[index].shape
        part = packed[start:stop]
        return part.view(shape) if part.numel() == torch.Size(shape).numel() else part

    def masters(self, flat: FlatParameters) -> Tensor:
        """The values in float32, packed."""
        packed = self.zeros(flat.values.device)
        with torch.inference_mode(False), torch.no_grad():
            ops.pack(flat.prunable, self.own, out=packed[: self.own.nnz])
            packed[self.own.nnz :] = flat.values[self.tail[0] : self.tail[1]]
        return packed

    def put(self, packed: Tensor, index: int, value: Tensor, held: Mask | None) -> None:
        """Write one parameter's state: `value` has its shape, or one element per survivor of
        `held`. Survivors that `held` lacks become 0."""
        mine = self.mask_of(index)
        start, stop = self.spans[index]
        value = value.detach().to(packed.device, torch.float32)
        if held is not None and value.numel() == held.nnz:
            if mine is not None and held != mine:
                value = ops.pack(ops.unpack(value.reshape(-1).contiguous(), held), mine)
        elif mine is not None:
            value = ops.pack(value.reshape(-1).contiguous(), mine)
        with torch.inference_mode(False), torch.no_grad():
            packed[start:stop] = value.reshape(-1)

    def moved(self, packed: Mapping[str, Tensor], new: Packing) -> dict[str, Tensor]:
        """`packed` in the order of another packing: what it does not have goes, the rest is 0.

        Raises:
            ValueError: of the same parameters, `new` keeps some that this one does not.
        """
        if new.indices == self.indices:
            kept = ops.extract(new.own.to(self.own.device), self.own)
            with torch.inference_mode(False), torch.no_grad():
                result = {}
                for name, old in packed.items():
                    fresh = new.zeros(old.device)
                    ops.pack(old[: kept.numel], kept, out=fresh[: new.own.nnz])
                    fresh[new.own.nnz :] = old[kept.numel :]
                    result[name] = fresh
            return result
        result = {name: new.zeros(old.device) for name, old in packed.items()}
        for i in set(self.indices) & set(new.indices):
            for name, old in packed.items():
                new.put(result[name], i, self.view(old, i), self.mask_of(i))
        return result
