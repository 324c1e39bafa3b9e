"""The server's global model as one value, and how a model gets into a user's module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask


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

    def pruned(self, keep: int) -> GlobalModel:
        """With only the `keep` largest survivors; selection and packing cost O(survivors)."""
        kept = ops.magnitude_mask(self.values, keep)
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
        state: dict[str, Any], layout: FlatLayout, names: Sequence[str], device: torch.device
    ) -> GlobalModel:
        """What `state_dict` gave, on `device`; ValueError if its parts disagree.

        Args:
            names: of the server optimizer's state.
        """
        mask = Mask.from_words(state["mask"].to(device, copy=True), layout.prunable_numel)
        layout.check_mask(mask)
        digests = tuple(bytes.fromhex(d) for d in state["digests"])
        if not digests or digests[-1] != mask.digest():
            raise ValueError(f"state: expected the mask {state['digests'][-1:]}, got another")
        if set(state["optimizer"]) != set(names):
            raise ValueError(f"optimizer: expected {names}, got {sorted(state['optimizer'])}")
        sizes = {"values": mask.nnz, "tail": layout.tail_numel, "pruned_at": mask.numel}
        tensors = {name: state[name] for name in sizes} | state["optimizer"]
        for name, t in tensors.items():
            numel = sizes.get(name, mask.nnz + layout.tail_numel)
            if t.numel() != numel:
                raise ValueError(f"{name}: expected {numel} elements, got {t.numel()}")
        return GlobalModel(
            mask,
            state["values"].to(device, torch.float32, copy=True),
            state["tail"].to(device, torch.float32, copy=True),
            state["pruned_at"].to(device, copy=True),
            digests,
            {name: t.to(device, copy=True) for name, t in state["optimizer"].items()},
        )


def write_model(params: FlatParameters, mask: Mask, values: Tensor, tail: Tensor) -> None:
    params.mask = mask
    ops.unpack(values, mask, out=params.prunable)
    with torch.no_grad():
        ops.cast(tail, params.values.dtype, out=params.tail)
    params.mark_written()


def check_buffers(params: FlatParameters, buffers: dict[str, Tensor]) -> None:
    for b in params.layout.buffers:
        if b.name not in buffers or tuple(buffers[b.name].shape) != b.shape:
            got = tuple(buffers[b.name].shape) if b.name in buffers else "none"
            raise ValueError(f"{b.name}: expected a buffer of shape {b.shape}, got {got}")


@torch.no_grad()
def write_buffers(params: FlatParameters, buffers: dict[str, Tensor]) -> None:
    for name, b in params.buffers.items():
        b.copy_(buffers[name].view(b.shape))
