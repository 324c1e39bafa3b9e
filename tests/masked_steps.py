"""Models in miniature for the tests of the masked steps: a flat buffer, its segments, a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmap_sparse import Mask
from fedmap_sparse.ops._segments import Segments

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Around every edge of the layout and of the kernels: word, segment, vector, chunk, block.
EDGES = [0, 1, 15, 31, 32, 33, 127, 128, 129, 511, 513, 2047, 2048, 2049]


def bits(t: Tensor) -> Tensor:
    """As integers, so that -0.0 differs from 0.0; a NaN is a NaN, whatever its payload."""
    t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
    return t.view(torch.int32 if t.element_size() == 4 else torch.int16)


@dataclass
class Problem:
    """`values` and `states` are stepped in place: take `.copy()` for each contestant."""

    values: Tensor
    mask: Mask
    grads: list[Tensor | None]
    segments: Segments
    states: list[Tensor]
    master: Tensor | None

    def copy(self) -> Problem:
        master = None if self.master is None else self.master.clone()
        states = [s.clone() for s in self.states]
        return Problem(self.values.clone(), self.mask, self.grads, self.segments, states, master)

    def held(self) -> list[Tensor]:
        """Everything that a step may change."""
        return [self.values, *self.states, *([] if self.master is None else [self.master])]

    def values_of(self, s: int) -> Tensor:
        offset, size = self.segments.rows[s, :2].tolist()
        return self.values[offset : offset + size]

    def state_of(self, s: int, state: int) -> Tensor:
        """What is held for segment `s`: its survivors', or all of a tail segment's."""
        offset, size = self.segments.rows[s, :2].tolist()
        tail = offset - self.mask.numel
        if tail >= 0:
            return self.states[state][self.mask.nnz + tail :][:size]
        kept = self.mask.to_bool()
        return self.states[state][int(kept[:offset].sum()) :][: int(kept[offset:][:size].sum())]

    def assert_same(self, other: Problem) -> None:
        for mine, theirs in zip(self.held(), other.held(), strict=True):
            assert torch.equal(bits(mine), bits(theirs))


def make_problem(
    sizes: list[int],
    tails: list[int],
    density: float,
    dtype: torch.dtype = torch.float32,
    states: int = 1,
) -> Problem:
    """Prunable segments of `sizes`, then a tail of `tails`, as `flatten` lays them out."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // 128) * 128
    prunable = end
    for size in tails:
        offsets.append(end)
        end += -(-size // 8) * 8
    values, kept = torch.zeros(end), torch.zeros(prunable, dtype=torch.bool)
    for offset, size in zip(offsets, sizes + tails, strict=True):
        values[offset : offset + size] = torch.randn(size)
        if offset < prunable:
            kept[offset : offset + size] = torch.rand(size) < density
    values[:prunable][~kept] = 0
    values = values.to(dtype)
    mask = Mask.from_bool(kept)
    held = mask.nnz + end - prunable
    master = None
    if dtype != torch.float32:
        master = torch.cat([values[:prunable][kept], values[prunable:]]).to(torch.float32)
        master += 1e-4 * torch.randn(held)
    return Problem(
        values,
        mask,
        [unaligned(torch.randn(size).to(dtype)) for size in sizes + tails],
        Segments(offsets, sizes + tails),
        [torch.rand(held) for _ in range(states)],
        master,
    )


def unaligned(t: Tensor) -> Tensor:
    """A copy that starts one element after where an allocation does."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    room[1:] = t
    return room[1:]
