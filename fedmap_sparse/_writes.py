"""Writes to the weights: how a flat model notices them, and how pruned weights stay +0.0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmap_sparse import _backends
from fedmap_sparse._backends import native
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask


class Writes:
    """The part of FlatParameters that is about writes."""

    layout: FlatLayout
    values: Tensor
    parameters: list[Tensor]
    _mask: Mask
    _segments: Tensor  # the parameters as C++ takes them: offset, size, a gradient's address, flags
    # Parameters of their own on the memory of another one: (it, its place, how it is permuted).
    _tied: list[tuple[Tensor, int, tuple[int, ...] | None]]
    # When pruned weights were last known to be zero: the mask, the Parameters' versions, values'.
    _clean: tuple[Mask | None, list[int], int]

    @property
    def prunable(self) -> Tensor:
        """The 1-D view that a `Mask` covers, padding included."""
        return self.values[: self.layout.prunable_numel]

    @property
    def tail(self) -> Tensor:
        """The rest: biases, normalisation, whatever `prunable` refused. Never pruned."""
        return self.values[self.layout.prunable_numel :]

    def _mask_here(self) -> Mask:
        """The mask where the values are; of a model that had no memory, the dense one."""
        device = self.values.device
        if self._mask.device.type == "meta" != device.type:
            return self.layout.initial_mask(device)
        return self._mask.to(device)

    def zero_pruned(self) -> None:
        """Write +0.0 to what the current mask does not keep, e.g. after `load_state_dict`."""
        self._zero(range(len(self.layout.prunable_entries)))
        self.note_clean()

    def zero_written(self) -> None:
        """`zero_pruned`, of those parameters alone that were written since they were last clean.

        torch counts writes to a tensor, so nothing is read to find out. It does not count writes
        through `.data`, NumPy or a state dict: `written_unseen` looks for these.
        """
        mask, versions, whole = self._clean
        now = [p._version for p in self.parameters]
        same = mask is self._mask and whole == self.values._version
        if same and versions == now:
            return
        prunable = range(len(self.layout.prunable_entries))
        self._zero([i for i in prunable if not same or now[i] != versions[i]])
        self.note_clean()

    def _zero(self, indices: Sequence[int]) -> None:
        """Zero the pruned weights of these parameters; autograd hears of those that had any."""
        from fedmap_sparse import ops

        if native is not None and self.values.device.type == "cpu":
            rows = self._segments[: len(self.layout.prunable_entries)]
            whole = self._looked_at(rows[list(indices)], -1)
            indices = [i for i in indices if whole and self._looked_at(rows[i : i + 1], -1)]
        for i in indices:
            e = self.layout.prunable_entries[i]
            part = self.values[e.offset : e.offset + e.numel]
            ops.zero_pruned_(part.detach(), self.layout.slice_mask(self._mask, e.name))
        self.mark_written(indices)

    def _looked_at(self, rows: Tensor, turn: int) -> bool:
        mask, values = self._mask, self.values
        place = (values, mask.words, mask.rank, mask.numel)
        return bool(native.written_unseen(*place, rows, turn, _backends.threads()))

    def written_unseen(self, rows: Sequence[Tensor], turn: int) -> bool:
        """Whether a pruned weight is not +0.0, of those that are looked at this turn.

        Below 3.6% density a step touches only lines that hold a survivor, so what someone wrote
        past torch's counters would stay. All pruned weights of a model of up to 65,536 are looked
        at in every turn; of larger ones, 256 elements in each 16,384, others each time: what was
        written all over a tensor is found at once, a single weight within 64 turns. One read in 64
        costs 3% of a step at density .01 of one large tensor, where reading all would triple it; of
        mobilenetv2, 158 parameters out of the cache, 38 us of 300. At higher densities
        nothing is looked at: a step writes the zeros.

        Args:
            rows: tables of segments, whose prunable ones are looked at.
        """
        return any(self._looked_at(table, turn) for table in rows)

    def note_clean(self) -> None:
        """Pruned weights are +0.0 now, all of them."""
        versions = [p._version for p in self.parameters]
        self._clean = self._mask, versions, self.values._version

    def note_stepped(self, indices: Sequence[int] | None) -> None:
        """After a step by kernels, which leave pruned weights +0.0: `mark_written`, still clean."""
        mask, versions, _ = self._clean
        self.mark_written(indices)
        if indices is None:
            # Clean just before the step, so each is one on: to ask 59 of them takes 3 us more. A
            # write by another thread meanwhile is one more, and seen.
            versions = [version + 1 for version in versions]
        else:
            for i in indices:
                versions[i] = self.parameters[i]._version
        self._clean = mask, versions, self.values._version

    def mark_written(self, indices: Sequence[int] | None = None) -> None:
        """Tell autograd that parameters changed (None: all), after a write through raw pointers.

        Bumping the version of `values` alone leaves a backward over an old graph silently wrong
        where torch raises: the Parameters carry their own versions.
        """
        chosen = self.parameters if indices is None else [self.parameters[i] for i in indices]
        if self._tied:
            chosen = [*chosen, *(p for p, i, _ in self._tied if indices is None or i in indices)]
        torch.autograd.graph.increment_version(chosen)
