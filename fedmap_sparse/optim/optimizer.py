"""What the masked optimizers share: groups, packed state, and following what users do to both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _autocast, _backends, ops
from fedmap_sparse._backends import native
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.optim.captured import Captured, capturing, left_to_device, record
from fedmap_sparse.optim.hooks import hookable, overflowed
from fedmap_sparse.optim.packed import Packing
from fedmap_sparse.optim.parts import Array, Part, parts_of, read_gradients, stepped, zero_gradients
from fedmap_sparse.optim.state import (
    PackedState,
    Shown,
    check_groups,
    indices_of,
    numbered,
    own_entries,
    same_parameters,
    saved_mask,
)

Groups = Iterable[dict[str, Any]]
#: A group's scalars and flags, as a row of the table of segments holds them.
Numbers = tuple[tuple[float, ...], int]


class MaskedOptimizer(torch.optim.Optimizer, ABC):
    """What MaskedSGD and MaskedAdamW share.

    State tensors are float32 with one element per survivor and one per element of the dense tail,
    of the optimizer's own parameters; they are allocated at the first step that wants them. 16-bit
    parameters get float32 master copies, packed likewise. A value that is not its master rounded
    was written by someone: the master then starts from the value.

    `state[p]` has views of the packed state: 1-D, one element per survivor, or of the parameter's
    shape where all of it survives. They may be written to, replaced or deleted.
    """

    #: Which packed tensors a step may keep, in the order of the op's arguments.
    state_names: tuple[str, ...] = ()
    _kernel: str
    _op: Callable[..., None]
    _counted = False  # whether `state[p]` has a "step"

    def __init__(
        self,
        params: FlatParameters,
        mask: Mask | None,
        defaults: dict[str, Any],
        groups: Groups | None,
    ) -> None:
        if not isinstance(params, FlatParameters):
            raise TypeError(
                f"params: expected FlatParameters (see fedmap_sparse.flatten), got "
                f"{type(params).__name__}"
            )
        if mask is not None:
            params.mask = mask
        self.flat = params
        self._begin(len(params.layout.entries))
        self._takes_all = groups is None
        chosen = [{"params": params.in_module_order()}] if groups is None else list(groups)
        super().__init__(chosen, defaults)

    def _begin(self, parameters: int) -> None:
        self._packed = PackedState(self.state_names, self._counted, parameters)
        self._parts: list[Part] = []
        self._written: list[Numbers] = []
        self._bound: list[Tensor] = []  # flat.parameters, as the parts are about
        self._seen: list[list[Tensor]] = []  # the groups' lists, likewise
        self._turn = 0
        #: How often the kernels' calls were laid out: for a new mask, say, or other groups. A CUDA
        #: graph repeats those of before, so where this is another number, capture again.
        self.laid_out = 0
        self._pending: dict[str, Any] | None = None  # what a copy takes up at its first use
        self._shown: Shown | None = None  # once a user has looked at `state`
        self._captured: Captured | None = None  # what a graph's replays read and count

    @property
    def mask(self) -> Mask:
        """The mask that the state follows; `flat.mask` from the next step on."""
        packing = self._packed.packing
        return self.flat.mask if packing is None else packing.mask

    def set_mask(self, mask: Mask) -> None:
        """Let the state follow a nested mask; the values are not touched.

        Sets `flat.mask` too. A step does the same by itself when `flat.mask` was replaced. One
        pass over each state tensor, O(survivors): the rest of it is freed.

        Raises:
            ValueError: another size, bits in padding, or not a subset of the current mask: what
                was pruned has no state, so a mask that grows wants a new optimizer.
        """
        self.flat.layout.check_mask(mask)
        old = self._settle()
        self._packed.use(Packing.of(self.flat.layout, mask, old.indices))
        self.flat.mask = mask
        self._lay_out()

    def restart(self) -> None:
        """Begin as a new optimizer of these groups would, with the values as they are now.

        The state keeps its memory, so a CUDA graph that has its addresses goes on fitting, after
        one step outside of it. O(survivors).
        """
        self._settle()
        self._packed.restart(self.flat)
        for part in self._parts:
            part.settled, part.together = False, 0
        if self._shown is not None:
            self._shown.state.clear()
            self._shown.refresh(self._packed, self.flat)

    def is_finite(self) -> bool:
        """Whether no element of the state is infinite or NaN; one read of it."""
        self._settle()
        return all(ops.all_finite(t) for t in self._packed.tensors.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the parameters must be among the flattened ones."""
        self._check_group({**self.defaults, **param_group})
        before = len(self.param_groups)
        if self._takes_all and not before:  # torch's look at what is known takes 1.3 us for each
            return self.param_groups.append({**param_group, **self.defaults})
        super().add_param_group(param_group)
        try:
            indices_of(self.flat, self.param_groups[-1])
        except ValueError:
            del self.param_groups[before:]
            raise

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients' norm over survivors and tail; returns the norm before.

        `torch.nn.utils.clip_grad_norm_` counts the gradients of pruned weights too and so clips
        harder. Those gradients are set to +0.0 here first; nothing else reads them.
        """
        zero_gradients(self.flat)
        chosen = [p for group in self.param_groups for p in group["params"]]
        with _autocast.outside(self.flat.values.device):
            return torch.nn.utils.clip_grad_norm_(chosen, max_norm, norm_type)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by torch's GradScaler: whether `step` takes its `found_inf` and `grad_scale`."""
        return all(group["capturable"] for group in self.param_groups)

    @hookable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient, in one call into the kernels.

        Where `found_inf` and `grad_scale` are set, as torch's GradScaler does for fused
        optimizers, a step with an infinity changes nothing, and gradients are divided first.

        With `capturable`, a CUDA graph may capture it (see MaskedSGD), and a GradScaler's step
        leaves it to the device whether there is an infinity, unless something else has changed
        since the step before.

        Raises:
            RuntimeError: a parameter is no longer a view (see `rebind`), or a capture cannot be.
            ValueError: `flat.mask` was replaced by one that is no subset of the mask before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if capturing(self.flat.values.device):
            record(self)
        elif not left_to_device(self) and not overflowed(self):
            self._step()
            Captured.refresh(self)
        return loss

    def _step(self) -> None:
        flat = self.flat
        cpu = _backends.pick(None, flat.values.device) == "cpu"
        packing = self._settle()
        counts, grads = read_gradients(flat, self._parts, cpu)
        if flat.mask is not packing.mask:
            self.set_mask(flat.mask)
            # What was read stands in the tables of the parts as they were laid out before.
            counts, grads = read_gradients(flat, self._parts, cpu)
        flat.zero_written()
        for part, mine in zip(self._parts, grads, strict=True):
            if mine is not None:
                addressed = torch.tensor([g is not None for g in mine], device="cpu")
                part.segments.rows[:, 2] = addressed  # 1 for an address
        looked = [part.segments.rows for part in self._parts if part.mask.numel]
        if cpu and flat.written_unseen(looked, self._turn):
            flat.zero_pruned()
        self._write_numbers()
        for part, mine, read in zip(self._parts, grads, counts, strict=True):
            stepping = sum(g is not None for g in mine) if mine is not None else read
            self._advance(part, stepping)
            self._run(part, mine, part.segments.scalars)
        self._turn += 1
        whole = self._parts[0].ask is None and counts[0] == len(flat.parameters)
        flat.note_stepped(None if whole else stepped(self._parts))
        if self._shown is not None:
            self._shown.refresh(self._packed, flat)

    def _run(self, part: Part, grads: list[Tensor | None] | None, scalars: Tensor) -> None:
        mask, rows = part.mask, part.segments.rows
        packed = self._packed.operands(None if part.ask is None else part.slot)
        where = (part.values, mask.words, mask.rank, mask.numel, mask.nnz)
        if grads is None:
            kernel, threads = getattr(native, self._kernel), _backends.threads()
            kernel(*where, None, rows, scalars, *packed, threads, False)
        else:
            self._op(*where, grads, rows, scalars, *packed)

    def _settle(self) -> Packing:
        """Take up what users did since: a copy's state, groups, a rebind, edits of `state`."""
        flat, packed = self.flat, self._packed
        if self._captured is not None:
            self._captured.catch_up(self)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._load(pending)
        if packed.packing is not None and self._bound is not flat.parameters:
            self._follow_rebind(packed.packing)
        if packed.packing is None or not same_parameters(self.param_groups, self._seen):
            chosen = [i for group in self.param_groups for i in indices_of(flat, group)]
            packed.use(Packing.of(flat.layout, self.mask, chosen))
            self._lay_out()
        assert packed.packing is not None
        if self._shown is not None and self._shown.take_edits(packed, flat, self._count_of):
            self._lay_out()
        return packed.packing

    def _lay_out(self) -> None:
        """Lay out the kernel calls anew."""
        flat, packing = self.flat, self._packed.packing
        assert packing is not None
        self.laid_out += 1
        self._parts = parts_of(flat, packing, self._packed.array)
        self._written, self._bound = [], flat.parameters
        self._seen = [list(g["params"]) for g in self.param_groups]
        if self._shown is not None:
            self._shown.refresh(self._packed, flat)

    def _write_numbers(self) -> None:
        """Flags and scalars of every segment. Numpy is not called where nothing changed."""
        numbers = [
            (tuple(float(x) for x in self._hyper(group)), self._flags(group))
            for group in self.param_groups
        ]
        if numbers == self._written:
            return
        for group, mine in zip(self.param_groups, numbers, strict=True):
            chosen = {*indices_of(self.flat, group)} if len(numbers) > 1 else None
            for part in self._parts:
                part.write(*mine, chosen)
        self._packed.allocate(self._wanted_state(), self.flat)
        self._written = numbers

    def _follow_rebind(self, old: Packing) -> None:
        """The Parameters, the buffer and perhaps its dtype and device are others."""
        flat, packed = self.flat, self._packed
        index = {id(p): i for i, p in enumerate(self._bound)}
        for group in self.param_groups:
            group["params"] = [
                flat.parameters[index[id(p)]] if id(p) in index else p for p in group["params"]
            ]
        device = flat.values.device
        packed.tensors = {k: t.to(device) for k, t in packed.tensors.items()}
        packed.tensors.pop("master", None)  # the values are what was taken in: start from them
        packed.packing = Packing.of(flat.layout, old.mask.to(device), old.indices)
        self._lay_out()

    def _counts_of(self, part: Part) -> Array:
        counts = self._packed.array
        return counts if part.ask is None else counts[part.ask]

    def _set_counts(self, part: Part, counts: Any) -> None:
        self._packed.array[slice(None) if part.ask is None else part.ask] = counts

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """As in torch: Parameter to the state it has, here views of the packed tensors."""
        if self._shown is None:
            self._settle()
        if self._shown is None:  # a copy's own entries make one
            self._shown = Shown(defaultdict(dict))
            self._shown.refresh(self._packed, self.flat)
        return self._shown.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        if "param_groups" not in self.__dict__:  # torch's constructor
            return
        self.state  # noqa: B018  # so that what `value` lacks is seen to be gone
        assert self._shown is not None
        self._shown.state = value

    def state_dict(self) -> dict[str, Any]:
        """As torch's, hooks included: `{"state": {number: ...}, "param_groups": [...]}`.

        Per parameter: packed copies (see `state`), and for prunable ones `mask`, the words of its
        survivors, from the first step on or not. Plain tensors and numbers, safe to save and load
        with `weights_only`. torch's own optimizers load it where nothing is pruned.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        saved = self._save()
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, saved)
            saved = saved if result is None else result
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave, or torch's own SGD or AdamW; hooks included.

        A saved mask becomes `flat.mask`, so that with the module's own state dict, in either order,
        training goes on as if it had not stopped. Without one (torch's) the current mask stays and
        the state is packed under it.

        Raises:
            ValueError: other groups, names or sizes than this optimizer's, or hyper-parameters out
                of range; nothing is changed.
        """
        saved = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, saved)
            saved = saved if result is None else result
        self._load(saved)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _save(self) -> dict[str, Any]:
        self._settle()
        parameters = numbered(self.param_groups)
        number = {id(p): n for n, p in enumerate(parameters)}
        known = self.flat.index_of()
        state = {n: self._packed.saved(known[id(p)]) for n, p in enumerate(parameters)}
        if self._shown is not None:
            for n, p in enumerate(parameters):
                state[n].update(own_entries(self._shown.state.get(p, {}), self.state_names))
        groups = [{**g, "params": [number[id(p)] for p in g["params"]]} for g in self.param_groups]
        return {"state": {n: s for n, s in state.items() if s}, "param_groups": groups}

    def _load(self, saved: Mapping[str, Any]) -> None:
        flat, groups = self.flat, saved["param_groups"]
        check_groups(self.param_groups, groups, self.defaults, self._check_group)
        known = flat.index_of()
        places = (known[id(p)] for p in numbered(self.param_groups))
        index = dict(zip(numbered(groups), places, strict=True))
        held, state = {}, {}
        for number, of_one in saved["state"].items():
            if number not in index:
                raise ValueError(f"state: expected numbers of parameters, got {number!r}")
            i = index[number]
            held[i] = self._packed.check(f"state[{number}]", of_one, i, flat)
            state[i] = of_one
        mask = saved_mask(flat, held)
        flat.layout.check_mask(mask)
        self._pending = None
        for group, fresh in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in fresh.items() if k != "params"})
        flat.mask = mask
        packed = PackedState(self.state_names, self._counted, len(flat.parameters))
        packed.use(Packing.of(flat.layout, mask, index.values()))
        names = {name for of_one in state.values() for name in of_one if of_one[name] is not None}
        packed.allocate(tuple(n for n in self.state_names if n in names), flat)
        for i, of_one in state.items():
            packed.put(i, of_one, held[i], self._count_of(of_one))
        self._packed = packed
        if self._shown is not None:
            self._shown.state.clear()
        self._lay_out()
        for i, of_one in state.items():
            if entries := own_entries(of_one, self.state_names):
                self.state.setdefault(flat.parameters[i], {}).update(entries)

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks, as torch's: the flat parameters, groups and state."""
        return {
            "flat": self.flat,
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "_pending": self._pending or self._save(),
            "_parameters": len(self._packed.array),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = state.pop("_parameters")
        self._begin(parameters)  # not from `flat`, which may not be whole yet
        super().__setstate__(state)

    def _wanted_state(self) -> tuple[str, ...]:
        """Names of the packed tensors that the groups ask for."""
        return self.state_names

    def _repeats(self, part: Part) -> bool:
        """Whether the part's next step is like the ones after it; its flags are so then."""
        return True

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for hyper-parameters out of range."""

    @abstractmethod
    def _hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """A group's hyper-parameters, in the order of the columns."""

    @abstractmethod
    def _flags(self, group: dict[str, Any]) -> int:
        """A group's flags in the table of segments."""

    @abstractmethod
    def _count_of(self, saved: Mapping[str, Any]) -> float:
        """The count of steps of a parameter with this saved state."""

    @abstractmethod
    def _advance(self, part: Part, stepping: int) -> None:
        """Write what changes from step to step; segments without an address do not step."""
