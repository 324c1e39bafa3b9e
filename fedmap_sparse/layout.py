"""Where each tensor of a model lies in one flat buffer: names, shapes, offsets and a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _checks
from fedmap_sparse.mask import Mask

#: Prunable tensors start on multiples of this many elements: no warp spans two tensors.
ALIGN = 128
#: Tail tensors start on multiples of this: 16 bytes in every dtype, as inductor and cuBLAS assume.
TAIL_ALIGN = 8

Prunable = Callable[[str, Any], bool]

# Buffers of torch's own normalisation layers, told from parameters by name where a state dict is
# all there is.
_BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked")


def matrices(name: str, tensor: Any) -> bool:
    """The default rule for `prunable`: two or more dimensions. Biases and normalisation stay."""
    return len(tensor.shape) >= 2


@dataclass(frozen=True)
class Entry:
    """One parameter: `values[offset : offset + numel]`, row-major, is tensor `name`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int


@dataclass(frozen=True)
class BufferEntry:
    """One persistent buffer; `kind` is "float", "int" or "bool"."""

    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class FlatLayout:
    """Where each tensor of a model lies in one flat buffer. Immutable, comparable, hashable.

    Attributes:
        entries: parameters by offset: the prunable ones, in the model's order, then the tail.
        aliases: (other name, name) of tied parameters, which are stored once.
        buffers: persistent buffers, which do not lie in the flat buffer but travel with it.
        names: every key of the model's state dict, in its order.
        prunable_numel: size of the prunable part, padding included: what a `Mask` covers.
        numel: size of the whole buffer, padding included.
    """

    entries: tuple[Entry, ...]
    aliases: tuple[tuple[str, str], ...]
    buffers: tuple[BufferEntry, ...]
    names: tuple[str, ...]
    prunable_numel: int
    numel: int

    @staticmethod
    def from_state_dict(
        state: Mapping[str, Any],
        *,
        prunable: Prunable = matrices,
        buffers: Sequence[str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> FlatLayout:
        """The layout that `flatten` gives the model of this state dict, digest included.

        Args:
            state: names to tensors or arrays (anything with `.shape` and `.dtype`).
            prunable: which parameters a mask covers, as in `flatten`.
            buffers: names of the buffers. A state dict does not tell them from parameters; by
                default they are the tensors that are not floating-point and those called
                `running_mean` or `running_var`, as torch's own layers name them.
            aliases: other name to name, for tied parameters. By default tensors that share their
                memory and shape are tied; what crossed a wire shares nothing: pass them then.

        Raises:
            ValueError: a name in `buffers` or `aliases` that the state dict does not hold.
        """
        tied = _shared(state) if aliases is None else dict(aliases)
        for name in [*(buffers or ()), *tied, *tied.values()]:
            if name not in state:
                raise ValueError(f"state: expected a tensor named {name!r}, got none")
        chosen = set(buffers) if buffers is not None else {n for n in state if _is_buffer(n, state)}
        parameters = {n: t for n, t in state.items() if n not in chosen and n not in tied}
        return build(
            parameters,
            [(name, tied[name]) for name in state if name in tied and name not in chosen],
            {n: t for n, t in state.items() if n in chosen},
            tuple(state),
            prunable,
        )

    @cached_property
    def prunable_entries(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.offset < self.prunable_numel)

    @cached_property
    def tail_entries(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.offset >= self.prunable_numel)

    @property
    def tail_numel(self) -> int:
        return self.numel - self.prunable_numel

    @cached_property
    def eligible(self) -> int:
        """Prunable elements without padding: what density and schedules count."""
        return sum(e.numel for e in self.prunable_entries)

    @cached_property
    def _initial_mask(self) -> Mask:
        keep = torch.zeros(self.prunable_numel, dtype=torch.bool)
        for e in self.prunable_entries:
            keep[e.offset : e.offset + e.numel] = True
        return Mask.from_bool(keep)

    @cached_property
    def _initial_masks(self) -> dict[torch.device, Mask]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what lies on devices, which may not be there when it is read."""
        return {name: value for name, value in self.__dict__.items() if name != "_initial_masks"}

    def initial_mask(self, device: torch.device | str = "cpu") -> Mask:
        """The dense mask: every eligible element, no padding. Each device keeps its own."""
        where = torch.device(device)
        if where.type == "cpu" or where.index is None:  # "cuda" alone is the current one
            return self._initial_mask.to(where)
        if where not in self._initial_masks:
            self._initial_masks[where] = self._initial_mask.to(where)
        return self._initial_masks[where]

    def mask_dict(self, mask: Mask) -> dict[str, Tensor]:
        """The mask as one bool tensor a prunable parameter, for other tools."""
        _checks.check_mask("mask", mask, self.prunable_numel)
        keep = mask.to_bool()
        return {
            e.name: keep[e.offset : e.offset + e.numel].view(e.shape) for e in self.prunable_entries
        }

    def check_mask(self, mask: Mask) -> None:
        """Raise unless `mask` covers this layout and no bit of padding is set."""
        _checks.check_mask("mask", mask, self.prunable_numel)
        if not mask <= self.initial_mask(mask.device):
            raise ValueError("mask: expected no survivor in the layout's padding, got some")

    @cached_property
    def _digest(self) -> bytes:
        text = json.dumps(
            {
                "entries": [[e.name, list(e.shape), e.offset] for e in self.entries],
                "prunable_numel": self.prunable_numel,
                "numel": self.numel,
                "aliases": sorted(list(pair) for pair in self.aliases),
                "buffers": [[b.name, list(b.shape), b.kind] for b in self.buffers],
            },
            separators=(",", ":"),
            ensure_ascii=True,
        )
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def digest(self) -> bytes:
        """16 bytes over names, shapes, order and buffers, not dtype; both ends compare them."""
        return self._digest


def build(
    parameters: Mapping[str, Any],
    aliases: Sequence[tuple[str, str]],
    buffers: Mapping[str, Any],
    names: tuple[str, ...],
    prunable: Prunable,
) -> FlatLayout:
    covered = {name for name, t in parameters.items() if prunable(name, t)}
    entries = []
    offset = 0
    for wanted, align in ((True, ALIGN), (False, TAIL_ALIGN)):
        for name, t in parameters.items():
            if (name in covered) is not wanted:
                continue
            shape = tuple(int(s) for s in t.shape)
            numel = 1
            for size in shape:
                numel *= size
            entries.append(Entry(name, shape, offset, numel))
            offset += -(-numel // align) * align
        if wanted:
            prunable_numel = offset
    return FlatLayout(
        tuple(entries),
        tuple(aliases),
        tuple(
            BufferEntry(n, tuple(int(s) for s in b.shape), _kind(n, b)) for n, b in buffers.items()
        ),
        names,
        prunable_numel,
        offset,
    )


def _kind(name: str, t: Any) -> str:
    # A NumPy dtype has a name without its byte order.
    dtype = getattr(t.dtype, "name", str(t.dtype).removeprefix("torch."))
    if dtype == "bool":
        return "bool"
    if dtype.startswith(("float", "bfloat")):
        return "float"
    if dtype.startswith(("int", "uint")):
        return "int"
    raise TypeError(f"{name}: expected a floating-point, integer or bool tensor, got {dtype}")


def _is_buffer(name: str, state: Mapping[str, Any]) -> bool:
    return name.rsplit(".", 1)[-1] in _BUFFER_NAMES or _kind(name, state[name]) != "float"


def _shared(state: Mapping[str, Any]) -> dict[str, str]:
    first: dict[Any, str] = {}
    tied = {}
    for name, t in state.items():
        if isinstance(t, Tensor):
            where = (t.data_ptr(), tuple(t.shape), t.stride())
        else:
            where = (t.__array_interface__["data"][0], tuple(t.shape), t.strides)
        if all(t.shape) and where in first:
            tied[name] = first[where]
        elif all(t.shape):
            first[where] = name
    return tied
