"""What optimizers ask of a flat model: its parameters in their order, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedmap_sparse import _module_tree
from fedmap_sparse._backends import native
from fedmap_sparse._writes import Writes


class Gradients(Writes):
    """The part of FlatParameters that is about gradients."""

    module: nn.Module
    _tree: _module_tree.Tree
    _order: tuple[_module_tree.Tree | None, list[Tensor]]  # of the parameters of a tree

    def in_module_order(self) -> list[Tensor]:
        """`parameters`, in the order of `module.parameters()`."""
        tree, order = self._order
        if tree is not self._tree or not tree.is_same():
            known = {id(p) for p in self.parameters}
            order = [p for p in self.module.parameters() if id(p) in known]
            self._order = (self._tree if self._tree.is_same() else None), order
        return [*order]

    def index_of(self) -> dict[int, int]:
        """Parameter id to index in `parameters`; tied parameters have the same index."""
        found = {id(p): i for i, p in enumerate(self.parameters)}
        return found | {id(p): i for p, i, _ in self._tied}

    def read_gradients(
        self, values: Tensor, rows: Tensor, indices: Sequence[int] | None = None
    ) -> int:
        """Write each gradient's address (0 for None) into a table of segments, `Segments.rows`.

        Args:
            values: the buffer, or the part of it that the table is about.
            rows: the table, one row per parameter.
            indices: the parameters that `rows` is about, by offset. None: all of them.

        Returns:
            How many have a gradient. -1 unless `check_bound` would pass and every gradient is as
            kernels want it: contiguous, of its parameter's size, of the buffer's dtype and device;
            and where there is no C++. Then Python says what is wrong, or mends it.

        0.24 us per parameter, where the same attributes read from Python take 0.9.
        """
        if native is None or not self._tree.is_same() or self._tied:
            return -1
        asked = self.parameters if indices is None else [self.parameters[i] for i in indices]
        return int(native.read_gradients(values, asked, rows))

    def gradient(self, index: int) -> Tensor | None:
        """Of one parameter, with those of the parameters that share its memory added."""
        total = self.parameters[index].grad
        for p, i, dims in self._tied:
            if i == index and p.grad is not None:
                part = p.grad
                if dims is not None:
                    part = part.permute([dims.index(d) for d in range(len(dims))])
                total = part if total is None else total + part
        return total
