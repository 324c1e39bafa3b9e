"""Where each tensor of a model lies in one flat buffer: names, shapes, offsets and a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _layout_text
from fedmap_sparse._tensor_kinds import CARRIED, Extra, Kind, Tie, is_buffer, kind_of, ties
from fedmap_sparse.mask import Mask, check_mask
from fedmap_sparse.prunable import Prunable, Verdict, from_name

#: Prunable tensors start on multiples of this many elements: no warp spans two tensors.
ALIGN = 128
#: Tail tensors start on multiples of this: 16 bytes in every dtype, as inductor and cuBLAS assume.
TAIL_ALIGN = 8


@dataclass(frozen=True)
class Entry:
    """One parameter: `values[offset : offset + numel]`, row-major, is tensor `name`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int


@dataclass(frozen=True)
class BufferEntry:
    """One persistent buffer; `kind` is "float", "int" or "bool", which travel with a message.

    Other kinds stay with the module, and `encode` refuses them by name: the dtype of complex
    tensors and the like, the layout of sparse ones, "extra" for a module's `get_extra_state()`.
    """

    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class FlatLayout:
    """Where each tensor of a model lies in one flat buffer. Immutable, comparable, hashable.

    Attributes:
        entries: parameters by offset: the prunable ones, in the model's order, then the tail.
        aliases: (other name, name) of tied parameters, which are stored once.
        buffers: persistent buffers, which do not lie in the flat buffer but travel with it, under
            every name that the state dict has.
        names: every key of the model's state dict, in its order.
        prunable_numel: size of the prunable part, padding included: what a `Mask` covers.
        numel: size of the whole buffer, padding included.
        permuted: (other name, dims) of those aliases that are `tensor.permute(dims)` of the tensor
            they share their memory with, as `decoder.weight.data = encoder.weight.data.t()`.
        reasons: why each entry is prunable or not, as `describe` prints it; not compared, and
            empty in a layout that was read.

    >>> import torch, fedmap_sparse as fs
    >>> print(fs.flatten(torch.nn.Linear(3, 2)).layout.describe())
    6 of 8 weights can be pruned, in 1 of 2 tensors
    pruned  weight  [2, 3]  a weight of Linear
    kept    bias    [2]     a bias of Linear
    """

    entries: tuple[Entry, ...]
    aliases: tuple[tuple[str, str], ...]
    buffers: tuple[BufferEntry, ...]
    names: tuple[str, ...]
    prunable_numel: int
    numel: int
    permuted: tuple[tuple[str, tuple[int, ...]], ...] = ()
    reasons: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @staticmethod
    def from_state_dict(
        state: Mapping[str, Any],
        *,
        prunable: Prunable | None = None,
        buffers: Sequence[str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> FlatLayout:
        """The layout that `flatten` gives the model of this state dict, digest included.

        A state dict does not say which module owns a tensor, so the default rule goes by shape and
        name. It agrees with `flatten` where normalisations have vectors or are called so; else
        pass the names that `flatten` found: `prunable=[e.name for e in layout.prunable_entries]`.

        Args:
            state: names to tensors or arrays (anything with `.shape` and `.dtype`), on any device,
                meta included.
            prunable: which parameters a mask covers, as in `flatten`.
            buffers: names of the buffers. A state dict does not tell them from parameters; by
                default they are the tensors that are not floating-point and those called
                `running_mean` or `running_var`, as torch's own layers name them.
            aliases: other name to name, for tied parameters. By default tensors that share their
                memory and shape are tied; what crossed a wire shares nothing: pass them then.

        Raises:
            TypeError: no dict, or a name that is no text.
            ValueError: a name in `buffers` or `aliases` that the state dict does not hold.
        """
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            odd = [n for n in state if not isinstance(n, str)] if state else state
            raise TypeError(f"state: expected a dict of names to tensors, got {odd!r:.60}")
        named = [*(buffers or ()), *(aliases or ()), *(aliases or {}).values()]
        for name in named:
            if name not in state:
                raise ValueError(f"state: expected a tensor named {name!r}, got none")
        chosen = set(buffers) if buffers is not None else {n for n in state if is_buffer(n, state)}
        others = {n: t for n, t in state.items() if n not in chosen}
        tied: dict[str, Tie] = (
            ties(others) if aliases is None else {n: (of, None) for n, of in aliases.items()}
        )
        parameters = {n: t for n, t in others.items() if n not in tied}
        return build(
            parameters,
            {n: tied[n] for n in others if n in tied},
            {n: t for n, t in state.items() if n in chosen},
            tuple(state),
            verdicts(parameters, prunable, from_name),
        )

    def to_json(self) -> str:
        """The layout as text, for a receiver that has no model to take it from.

        >>> layout = FlatLayout.from_state_dict({"w": torch.ones(2, 3)})
        >>> FlatLayout.from_json(layout.to_json(), max_numel=6) == layout
        True
        """
        return json.dumps(
            {
                "parameters": [
                    [e.name, list(e.shape), e.offset < self.prunable_numel] for e in self.entries
                ],
                "aliases": [list(pair) for pair in self.aliases],
                "permuted": [[name, list(dims)] for name, dims in self.permuted],
                "buffers": [[b.name, list(b.shape), b.kind] for b in self.buffers],
                "names": list(self.names),
            }
        )

    @staticmethod
    def from_json(text: str, *, max_numel: int) -> FlatLayout:
        """What `to_json` wrote. Nothing of the text is trusted.

        Args:
            text: JSON.
            max_numel: the most elements, of parameters and buffers together, that the caller is
                willing to allocate for: a few bytes of text can name a tensor of any size.

        Raises:
            ValueError: the text is no layout, or one of more than `max_numel` elements.
        """
        return _layout_text.parse(text, max_numel, build)

    @cached_property
    def prunable_entries(self) -> tuple[Entry, ...]:
        """The entries that a mask covers, by offset."""
        return tuple(e for e in self.entries if e.offset < self.prunable_numel)

    @cached_property
    def tail_entries(self) -> tuple[Entry, ...]:
        """The other entries, by offset: never pruned."""
        return tuple(e for e in self.entries if e.offset >= self.prunable_numel)

    @cached_property
    def prunable_spans(self) -> Tensor:
        """[start, size] of each of the prunable entries: int64, on the CPU."""
        spans = [[e.offset, e.numel] for e in self.prunable_entries]
        with torch.inference_mode(False):
            return torch.tensor(spans, dtype=torch.int64, device="cpu").view(-1, 2)

    @property
    def tail_numel(self) -> int:
        """Elements after the prunable part, padding included."""
        return self.numel - self.prunable_numel

    @cached_property
    def tail_padding(self) -> Tensor:
        """The places in the tail that are no parameter's: int64, on the CPU."""
        ends = [e.offset + e.numel - self.prunable_numel for e in self.tail_entries]
        places = [i for end in ends for i in range(end, -(-end // TAIL_ALIGN) * TAIL_ALIGN)]
        with torch.inference_mode(False):
            return torch.tensor(places, dtype=torch.int64, device="cpu")

    def clean_tail(self, tail: Tensor) -> Tensor:
        """`tail` with zeros in its padding: itself, or a copy if someone wrote there."""
        places = self.tail_padding.to(tail.device)
        word = torch.int32 if tail.element_size() == 4 else torch.int16  # -0.0 is none either
        if not places.numel() or not bool(tail[places].view(word).any()):
            return tail
        return tail.index_fill(0, places, 0.0)

    @cached_property
    def eligible(self) -> int:
        """Prunable elements without padding: what density and schedules count."""
        return sum(e.numel for e in self.prunable_entries)

    @cached_property
    def _initial_mask(self) -> Mask:
        keep = torch.zeros(self.prunable_numel, dtype=torch.bool, device="cpu")
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
        with torch.inference_mode(False):  # a mask outlives the mode it is first asked for in
            if where.type == "cpu" or where.index is None:  # "cuda" alone is the current one
                return self._initial_mask.to(where)
            if where not in self._initial_masks:
                self._initial_masks[where] = self._initial_mask.to(where)
            return self._initial_masks[where]

    def slice_mask(self, mask: Mask, name: str) -> Mask:
        """The part of `mask` over one prunable tensor: a Mask over its `numel` elements.

        Raises:
            ValueError: `mask` is of another size, or no prunable tensor has this name.

        O(numel / 32); the words are a view of the mask's.

        >>> layout = FlatLayout.from_state_dict({"a": torch.ones(2, 2), "b": torch.ones(3, 3)})
        >>> layout.slice_mask(layout.initial_mask(), "b")
        Mask(numel=9, nnz=9, density=1)
        """
        check_mask("mask", mask, self.prunable_numel)
        found = [e for e in self.prunable_entries if e.name == name]
        if not found:
            raise ValueError(f"name: expected one of the prunable tensors, got {name!r}")
        start, numel = found[0].offset, found[0].numel
        return Mask.from_words(mask.words[start // 32 : (start + numel + 31) // 32], numel)

    def mask_dict(self, mask: Mask) -> dict[str, Tensor]:
        """The mask as one bool tensor per prunable parameter, for other tools."""
        check_mask("mask", mask, self.prunable_numel)
        keep = mask.to_bool()
        return {
            e.name: keep[e.offset : e.offset + e.numel].view(e.shape) for e in self.prunable_entries
        }

    def check_mask(self, mask: Mask) -> None:
        """Raise ValueError unless `mask` covers this layout and no bit of padding is set."""
        check_mask("mask", mask, self.prunable_numel)
        if not mask <= self.initial_mask(mask.device):
            raise ValueError("mask: expected no survivor in the layout's padding, got some")

    def check_carried(self) -> None:
        """Raise TypeError, naming the buffer, unless a message can carry every one of them."""
        for b in self.buffers:
            if b.kind == "extra":
                raise TypeError(
                    f"{b.name}: expected a parameter or a buffer, got the extra state of a module, "
                    "which a message cannot carry; leave it out of the state dict"
                )
            if b.kind not in CARRIED:
                raise TypeError(
                    f"{b.name}: expected a dense float, int or bool buffer, got {b.kind}, which a "
                    "message cannot carry; register it with persistent=False, or as a real tensor"
                )

    @cached_property
    def buffer_kinds(self) -> dict[str, Kind]:
        """The buffers of each kind that messages carry, in order."""
        found = {}
        for kind in CARRIED:
            own = [b for b in self.buffers if b.kind == kind]
            sizes = (torch.Size(b.shape).numel() for b in own)
            found[kind] = Kind(
                tuple(b.name for b in own), tuple(b.shape for b in own), tuple(sizes)
            )
        return found

    def spread(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """`mapping`, from the name of each entry and buffer, under every name of the state dict."""
        found = dict(mapping)
        dims = dict(self.permuted)
        for alias, name in self.aliases:
            found[alias] = mapping[name].permute(dims[alias]) if alias in dims else mapping[name]
        return {name: found[name] for name in self.names if name in found}

    @cached_property
    def _digest(self) -> bytes:
        plain = _layout_text.names_of(self)
        described: dict[str, Any] = {
            "entries": [[plain[e.name], list(e.shape), e.offset] for e in self.entries],
            "prunable_numel": self.prunable_numel,
            "numel": self.numel,
            "aliases": sorted([plain[other], plain[name]] for other, name in self.aliases),
            "buffers": [[plain[b.name], list(b.shape), b.kind] for b in self.buffers],
        }
        if self.permuted:
            described["permuted"] = sorted([plain[n], list(dims)] for n, dims in self.permuted)
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=True)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def digest(self) -> bytes:
        """16 bytes over names, shapes, order and buffers, not dtype; both ends compare them.

        The prefixes that wrappers put before names are left out, so that a compiled or distributed
        model has the digest of the plain one: "_orig_mod." (torch.compile), "module." before every
        name (DataParallel, DistributedDataParallel), "_checkpoint_wrapped_module.".
        """
        return self._digest

    def explain(self, digest: bytes, eligible: int) -> str:
        """How a model with this digest and so many prunable weights may differ from this one.

        A guess, as "; ..." for the end of an error, or "".
        """
        guess = _layout_text.guess(self, digest, eligible)
        return f"; {guess}" if guess else ""

    def describe(self) -> str:
        """What is pruned and why: one line per tensor, for people to read."""
        return _layout_text.describe(self)

    def difference(self, other: FlatLayout) -> str:
        """The first thing in which `other` differs, in words; "" if the digests are equal."""
        return _layout_text.difference(self, other)


def build(
    parameters: Mapping[str, Any],
    tied: Mapping[str, Tie],
    buffers: Mapping[str, Any],
    names: tuple[str, ...],
    verdict: Mapping[str, Verdict],
) -> FlatLayout:
    """The layout of these tensors; only their `.shape` and, for buffers, their kind is read."""
    entries, reasons = [], []
    offset = 0
    for wanted, align in ((True, ALIGN), (False, TAIL_ALIGN)):
        for name, t in parameters.items():
            pruned, reason = verdict[name]
            if pruned is not wanted:
                continue
            shape = tuple(int(s) for s in t.shape)
            numel = torch.Size(shape).numel()
            entries.append(Entry(name, shape, offset, numel))
            reasons.append(reason)
            offset += -(-numel // align) * align
        if wanted:
            prunable_numel = offset
    return FlatLayout(
        tuple(entries),
        tuple((other, name) for other, (name, _) in tied.items()),
        tuple(_buffer(name, b) for name, b in buffers.items()),
        names,
        prunable_numel,
        offset,
        tuple((other, dims) for other, (_, dims) in tied.items() if dims is not None),
        tuple(reasons),
    )


def verdicts(
    parameters: Mapping[str, Any],
    prunable: Prunable | None,
    default: Callable[[str, Any], Verdict],
) -> dict[str, Verdict]:
    """Which of `parameters` a mask covers; `default` is the rule where none was given.

    Raises:
        ValueError: names that are not those of parameters.
    """
    if prunable is None:
        return {name: default(name, t) for name, t in parameters.items()}
    if not callable(prunable):
        names = {prunable} if isinstance(prunable, str) else set(prunable)
        if unknown := sorted(names - set(parameters)):
            raise ValueError(f"prunable: expected names of parameters, got {unknown}")
        return {name: (name in names, "by the names given") for name in parameters}
    return {name: (bool(prunable(name, t)), "by the rule given") for name, t in parameters.items()}


def _buffer(name: str, b: Any) -> BufferEntry:
    if isinstance(b, BufferEntry):  # read from text
        return b
    if isinstance(b, Extra) or not hasattr(b, "shape"):
        return BufferEntry(name, (), "extra")
    return BufferEntry(name, tuple(int(s) for s in b.shape), kind_of(b))
