"""The packed state of an optimizer, and how it looks from outside: as torch's `state[p]`."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask, num_words
from fedmap_sparse.optim.packed import Packing

#: The count of steps of a parameter with this state, by the optimizer's rule.
CountOf = Callable[[Mapping[str, Any]], float]


# What the optimizers call their state: no entry of a user's.
_NAMES = {
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    *("exp_inf", "mu_product", "square_avg", "grad_avg", "acc_delta", "row_var", "col_var"),
}  # the second line: of Adamax, NAdam, RMSprop, Adadelta and Adafactor
_MOST_STEPS = 2.0**53


def _check_tensor(where: str, value: Any, *, integers: bool) -> None:
    """Raise ValueError unless `value` is None or a dense tensor of floats, or of integers."""
    if value is None:
        return
    wanted = "integers" if integers else "floats"
    if not isinstance(value, Tensor):
        raise ValueError(f"{where}: expected a tensor of {wanted}, got {type(value).__name__}")
    fits = value.dtype in (torch.int32, torch.int64) if integers else value.is_floating_point()
    if not fits or value.layout is not torch.strided or value.is_meta:
        raise ValueError(
            f"{where}: expected a dense tensor of {wanted}, got {value.dtype} ({value.layout}) on "
            f"{value.device}"
        )


class PackedState:
    """Packed tensors by name, and how many steps each parameter's state has behind it.

    Attributes:
        tensors: float32, packed; allocated when a step first wants them.
        counts: float32, one per parameter of the model; 0 where it has no state.
        packing: the order of the tensors; None before the groups are known.
    """

    def __init__(self, names: tuple[str, ...], counted: bool, parameters: int) -> None:
        self.names = names
        self.counted = counted
        self.tensors: dict[str, Tensor] = {}
        self.packing: Packing | None = None
        with torch.inference_mode(False):
            self.counts = torch.zeros(parameters, dtype=torch.float32, device="cpu")
        self.array = self.counts.numpy()

    def use(self, packing: Packing) -> None:
        """Bring the tensors into another order.

        Raises:
            ValueError: of the same parameters, `packing` keeps some that are pruned now.
        """
        if self.packing is not None:
            self.tensors = self.packing.moved(self.tensors, packing)
        self.packing = packing

    def operands(self, slot: slice | None) -> list[Tensor | None]:
        """What a kernel wants, in its order: each name's tensor, or a slice of it, and masters."""
        found = map(self.tensors.get, (*self.names, "master"))
        return [t if t is None or slot is None else t[slot] for t in found]

    def allocate(self, names: tuple[str, ...], flat: FlatParameters) -> None:
        """Make the state that a step needs and that is missing; master copies for 16-bit values."""
        assert self.packing is not None
        for name in names:
            if name not in self.tensors:
                self.tensors[name] = self.packing.zeros(flat.values.device)
        if flat.values.dtype != torch.float32 and "master" not in self.tensors:
            self.tensors["master"] = self.packing.masters(flat)

    def of(self, index: int) -> dict[str, Tensor]:
        """What one parameter has, as views: a write to them is a write to the state."""
        if self.packing is None or not self.array[index]:
            return {}
        found = {name: self.packing.view(t, index) for name, t in self.tensors.items()}
        return {"step": self.counts[index], **found} if self.counted else found

    def saved(self, index: int) -> dict[str, Tensor]:
        """Copies of what one parameter has, with the mask that they follow."""
        assert self.packing is not None
        found = {name: t.detach().clone() for name, t in self.of(index).items()}
        mask = self.packing.mask_of(index)
        return found if mask is None else {**found, "mask": mask.words.clone()}

    def reset(self, index: int, name: str | None = None) -> None:
        """Forget what one parameter has, or one tensor of it: it begins as at the first step."""
        assert self.packing is not None
        start, stop = self.packing.spans[index]
        for key, t in self.tensors.items():
            if key != "master" and name in (None, key):
                t[start:stop] = 0
        if name in (None, "step", "momentum_buffer"):
            self.array[index] = 0

    def restart(self, flat: FlatParameters) -> None:
        """Forget what every parameter has, in place; master copies become the values."""
        assert self.packing is not None
        for name, t in self.tensors.items():
            if name == "master":
                t.copy_(self.packing.masters(flat))
            else:
                t.zero_()
        self.array[:] = 0

    def check(
        self, where: str, saved: Mapping[str, Any], index: int, flat: FlatParameters
    ) -> Mask | None:
        """The mask in one parameter's saved state, if it has one.

        Raises:
            ValueError: the state is of another optimizer, or of another parameter.
        """
        e = flat.layout.entries[index]
        unknown = own_entries(saved, self.names)
        complete = "mask" in saved or self.names[0] in saved
        if unknown and (not complete or set(unknown) & _NAMES):
            got = sorted(map(str, unknown))
            raise ValueError(f"{where}: expected the state {list(self.names)}, got {got}")
        held = None
        steps = float(saved.get("step", 0))
        if not 0 <= steps < _MOST_STEPS:
            raise ValueError(f"{where}['step']: expected 0 to 2^53, got {steps}")
        for name in (*self.names, "master", "mask"):
            _check_tensor(f"{where}[{name!r}]", saved.get(name), integers=name == "mask")
        if saved.get("mask") is not None:
            words = saved["mask"]
            if e.offset >= flat.layout.prunable_numel or words.numel() != num_words(e.numel):
                raise ValueError(
                    f"{where}: expected the mask of {e.name}, of {e.numel} elements, got "
                    f"{words.numel()} words"
                )
            with torch.inference_mode(False):
                own = words.detach().to(flat.values.device, torch.int32, copy=True)
                held = Mask.from_words(own.reshape(-1), e.numel)
        values = {name: saved.get(name) for name in (*self.names, "master")}
        found = {name: value for name, value in values.items() if value is not None}
        dense = all(tuple(v.shape) == e.shape for v in found.values())
        if held is None and not dense and e.offset < flat.layout.prunable_numel:
            # Packed and without its mask, as a flattened state of DCP: by the current one.
            held = flat.layout.slice_mask(flat.mask, e.name)
        for name, value in found.items():
            wanted = e.numel if held is None else held.nnz
            if tuple(value.shape) != e.shape and value.numel() != wanted:
                raise ValueError(
                    f"{where}[{name!r}]: expected {wanted} elements for {e.name}, got "
                    f"{tuple(value.shape)}; if it is packed, set the mask that it was saved under "
                    "first"
                )
        return held

    def put(self, index: int, saved: Mapping[str, Any], held: Mask | None, count: float) -> None:
        """Take up one parameter's state; `held` is the mask of what is packed in `saved`."""
        assert self.packing is not None
        for name, t in self.tensors.items():
            if saved.get(name) is not None:
                self.packing.put(t, index, saved[name], held)
        self.array[index] = count


class Shown:
    """What a user sees as `optimizer.state`: a dict of dicts of views, and what changed in it."""

    def __init__(self, state: defaultdict[Tensor, Any]) -> None:
        self.state = state
        self._views: dict[int, dict[str, Tensor]] = {}
        self._counts = np.empty(0)

    def refresh(self, packed: PackedState, flat: FlatParameters) -> None:
        """Show the state as it is now."""
        assert packed.packing is not None
        self._views, self._counts = {}, packed.array.copy()
        for i in packed.packing.indices:
            views = packed.of(i)
            if views:
                self._views[i] = views
                self.state.setdefault(flat.parameters[i], {}).update(views)

    def take_edits(self, packed: PackedState, flat: FlatParameters, count_of: CountOf) -> bool:
        """Take up what the user deleted or replaced since; whether there was any."""
        assert packed.packing is not None
        edited = packed.array.tobytes() != self._counts.tobytes()  # state[p]["step"].fill_(0)
        for i in packed.packing.indices:
            views, p = self._views.get(i, {}), flat.parameters[i]
            now = self.state.get(p)
            if now is None or not now:
                if views:
                    packed.reset(i)
                    edited = True
                continue
            if all(now.get(name) is view for name, view in views.items()) and (
                views or not set(now) & set(packed.names)
            ):
                continue
            edited = True
            known = {k: v for k, v in now.items() if k in {*packed.names, "step", "master"}}
            mask = packed.packing.mask_of(i)
            for name in set(views) - set(known):
                packed.reset(i, name)
            changed = {k: v for k, v in known.items() if v is not views.get(k)}
            e = flat.layout.entries[i]
            for name, value in changed.items():
                if name != "step" and tuple(value.shape) != e.shape:
                    wanted = e.numel if mask is None else mask.nnz
                    if value.numel() != wanted:
                        raise ValueError(
                            f"state[{e.name}][{name!r}]: expected {wanted} elements, got "
                            f"{tuple(value.shape)}"
                        )
            packed.allocate(tuple(n for n in known if n in packed.names), flat)
            packed.put(i, changed, mask, count_of(known))
        return edited


def own_entries(saved: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What a user put into one parameter's state."""
    return {k: v for k, v in saved.items() if k not in {*names, "master", "mask", "step"}}


def numbered(groups: list[dict[str, Any]]) -> list[Tensor]:
    """Parameters in the order of the groups: their places are the numbers of a state dict."""
    return [p for group in groups for p in group["params"]]


def indices_of(flat: FlatParameters, group: dict[str, Any]) -> list[int]:
    """Of a group's parameters, into `flat.parameters`.

    Raises:
        ValueError: a tensor that is none of them.
    """
    known = flat.index_of()
    indices = [known.get(id(p), -1) for p in group["params"]]
    if -1 in indices:
        odd = group["params"][indices.index(-1)]
        raise ValueError(
            f"params: expected parameters of the flattened module, got a tensor of shape "
            f"{tuple(odd.shape)} that is none of them"
        )
    return indices


def same_parameters(groups: list[dict[str, Any]], seen: list[list[Tensor]]) -> bool:
    """Whether the groups hold the very parameters that were seen, in that order; 1 us for 60."""
    now = [group["params"] for group in groups]
    return [*map(len, now)] == [*map(len, seen)] and all(
        all(map(operator.is_, a, b)) for a, b in zip(now, seen, strict=True)
    )


def check_groups(
    groups: list[dict[str, Any]],
    saved: list[dict[str, Any]],
    defaults: Mapping[str, Any],
    check: Callable[[dict[str, Any]], None],
) -> None:
    """Raise ValueError unless as many parameters were saved, in as many groups that `check` lets
    pass. What is not in `defaults` is another optimizer's option."""
    ours, theirs = ([len(g["params"]) for g in each] for each in (groups, saved))
    if ours != theirs:
        raise ValueError(
            f"param_groups: expected the groups of this optimizer, of {ours} parameters, got "
            f"{theirs}"
        )
    for own, new in zip(groups, saved, strict=True):
        for name, value in new.items():
            if name in defaults and isinstance(own[name], bool) is not isinstance(value, bool):
                wanted = type(own[name]).__name__
                raise ValueError(f"{name}: expected {wanted}, got {type(value).__name__}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")
        check({**own, **new})


def saved_mask(flat: FlatParameters, held: Mapping[int, Mask | None]) -> Mask:
    """The model's mask, with that of each saved parameter in its place."""
    if not any(mask is not None for mask in held.values()):
        return flat.mask
    with torch.inference_mode(False):
        words = flat.mask.words.clone()
        for i, mask in held.items():
            if mask is not None:
                start = flat.layout.entries[i].offset // 32
                words[start : start + mask.words.numel()] = mask.words
        found = Mask.from_words(words, flat.mask.numel)
    return flat.mask if found == flat.mask else found
