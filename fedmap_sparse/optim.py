"""Optimizers whose state exists for survivors only: torch.optim's arithmetic, one call a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks, ops
from fedmap_sparse._backends import native
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops import _segments, masked_adamw, masked_sgd

Groups = Iterable[dict[str, Any]]
#: A group's scalars and flags, as a row of the table of segments holds them.
Numbers = tuple[tuple[float, ...], int]


class MaskedOptimizer(torch.optim.Optimizer, ABC):
    """What MaskedSGD and MaskedAdamW share: groups, packed state, and following the mask.

    State tensors are float32 with one element a survivor and one an element of the dense tail;
    they are allocated at the first step that wants them. 16-bit parameters get float32 master
    copies, packed likewise.
    """

    #: Which packed tensors a step may keep, in the order of the op's arguments.
    state_names: tuple[str, ...] = ()
    _kernel: str
    _op: Callable[..., None]

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
        self.flat = params
        if mask is not None:
            params.mask = mask
        self._mask = params.mask
        entries = params.layout.entries
        self._segments = ops.Segments([e.offset for e in entries], [e.numel for e in entries])
        self._grouped: list[list[int]] = []
        self._ungrouped = list(range(len(entries)))
        self._written: list[Numbers] = []
        self._begun = False
        self._backend = _backends.pick(None, params.values.device)
        self._parameters = params.parameters
        self._packed: dict[str, Tensor] = {}
        self._versions = [-1] * len(params.parameters)
        self._stale = True
        chosen = list(groups) if groups is not None else [{"params": params.parameters}]
        super().__init__(chosen, defaults)

    @property
    def mask(self) -> Mask:
        """The mask that the state follows; `flat.mask` from the next step on."""
        return self._mask

    def set_mask(self, mask: Mask) -> None:
        """Let the state follow a nested mask; the values are not touched.

        Sets `flat.mask` too. A step does the same by itself when `flat.mask` was replaced. One
        pass over each state tensor, O(survivors): the rest of it is freed.

        Raises:
            ValueError: another size, bits in padding, or not a subset of the current mask: what
                was pruned has no state, so a mask that grows wants a new optimizer.
        """
        self.flat.layout.check_mask(mask)
        kept = ops.extract(mask.to(self._mask.device), self._mask)
        self.flat.mask = mask
        for name, old in self._packed.items():
            new = old.new_empty(mask.nnz + self.flat.layout.tail_numel)
            ops.pack(old[: kept.numel], kept, out=new[: mask.nnz])
            new[mask.nnz :] = old[kept.numel :]
            self._packed[name] = new
        self._mask = mask
        self._stale = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the parameters must be among the flattened ones."""
        super().add_param_group(param_group)
        known = {id(p): i for i, p in enumerate(self.flat.parameters)}
        group = self.param_groups[-1]
        indices = []
        for p in group["params"]:
            if id(p) not in known:
                self.param_groups.pop()
                raise ValueError(
                    f"params: expected parameters of the flattened module, got a tensor of shape "
                    f"{tuple(p.shape)} that is none of them"
                )
            indices.append(known[id(p)])
        self._grouped.append(indices)
        self._ungrouped = [i for i in self._ungrouped if i not in indices]

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients' norm over survivors and tail; returns the norm before.

        `torch.nn.utils.clip_grad_norm_` counts the gradients of pruned weights too and so clips
        harder. Those gradients are set to +0.0 here first; nothing else reads them.
        """
        mask = self.flat.mask
        for p, e in zip(self.flat.parameters, self.flat.layout.prunable_entries, strict=False):
            if p.grad is not None:
                grad = p.grad if p.grad.is_contiguous() else p.grad.contiguous()
                words = mask.words[e.offset // 32 : (e.offset + e.numel + 31) // 32]
                ops.zero_pruned_(grad, Mask.from_words(words, e.numel))
                p.grad = grad
        chosen = [p for group in self.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(chosen, max_norm, norm_type)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient, in one call into the kernels.

        Raises:
            RuntimeError: a parameter is no longer a view of the flat buffer (see `rebind`).
            ValueError: `flat.mask` was replaced by one that is no subset of the mask before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        flat, rows = self.flat, self._segments.rows
        read = flat.read_gradients(rows)
        if not read:
            flat.check_bound()
        if self._parameters is not flat.parameters:
            self._follow_rebind()
        grads = None if read and self._backend == "cpu" else self._gradients()
        if flat.mask is not self._mask:
            self.set_mask(flat.mask)
        self._follow_writes()
        self._follow_groups(grads)
        packed = [self._packed.get(name) for name in (*self.state_names, "master")]
        mask, scalars = self._mask, self._segments.scalars
        where = (flat.values, mask.words, mask.rank, mask.numel)
        if grads is None:
            kernel, threads = getattr(native, self._kernel), _backends.threads()
            kernel(*where, None, rows, scalars, *packed, threads, False)
        else:
            self._op(*where, mask.nnz, grads, rows, scalars, *packed, self._backend)
        flat.mark_written()
        self._versions = [p._version for p in flat.parameters]
        return loss

    def _gradients(self) -> list[Tensor | None]:
        """Of each segment, as kernels want them; those of no group are None."""
        grads = [p.grad for p in self.flat.parameters]
        for i in self._ungrouped:
            grads[i] = None
        for i, grad in enumerate(grads):
            if grad is not None:
                if grad.layout is not torch.strided:
                    raise TypeError(f"grad: expected dense gradients, got {grad.layout}")
                grads[i] = grad.contiguous()
        return _segments.check_gradients(grads, self._segments, self.flat.values)

    def _follow_groups(self, grads: list[Tensor | None] | None) -> None:
        """Flags and scalars of every segment; `grads` None: the table has their addresses.

        After a backward pass numpy's code is out of the caches, and each of its calls takes 20 us
        here: none where nothing changed.
        """
        segments = self._segments
        numbers = [self._numbers(group) for group in self.param_groups]
        if numbers != self._written:
            for (scalars, flags), indices in zip(numbers, self._grouped, strict=True):
                segments.scalars.numpy()[indices, : len(scalars)] = scalars
                segments.rows.numpy()[indices, 3] = flags
            self._allocate_state()
            self._written = numbers
            self._begun = False
        if self._ungrouped:
            segments.rows[self._ungrouped, 2] = 0
        if grads is not None:
            segments.rows[:, 2] = torch.tensor([g is not None for g in grads])  # 1 for an address
        self._advance()

    def _follow_rebind(self) -> None:
        for group, indices in zip(self.param_groups, self._grouped, strict=True):
            group["params"] = [self.flat.parameters[i] for i in indices]
        self._parameters = self.flat.parameters
        self._packed = {k: t.to(self.flat.values.device) for k, t in self._packed.items()}
        self._packed.pop("master", None)  # the values are what was taken in: start from them
        self._backend = _backends.pick(None, self.flat.values.device)
        self._written = []
        self._mask = self._mask.to(self.flat.values.device)

    def _allocate_state(self) -> None:
        """What the groups want and lack."""
        size = self._mask.nnz + self.flat.layout.tail_numel
        for name in self._wanted_state():
            if name not in self._packed:
                self._packed[name] = torch.zeros(size, device=self.flat.values.device)
        if self.flat.values.dtype != torch.float32 and "master" not in self._packed:
            self._packed["master"] = self._masters()

    def _follow_writes(self) -> None:
        """What someone else wrote (load_state_dict, a new mask) since the last step.

        The kernels touch only memory lines with a survivor, so pruned weights must be zero before;
        masters of parameters that changed start again from the values. torch counts in-place
        writes a parameter, so nothing is read to find out.
        """
        now = [p._version for p in self.flat.parameters]
        if now == self._versions and not self._stale:
            return
        self.flat.zero_pruned()
        self._stale = False
        if "master" in self._packed:
            fresh = self._masters()
            for e, version, seen in zip(self.flat.layout.entries, now, self._versions, strict=True):
                if version != seen:
                    start, stop = self._state_span(e.offset, e.numel)
                    self._packed["master"][start:stop] = fresh[start:stop]

    def _masters(self) -> Tensor:
        """The values in float32, packed like state."""
        nnz = self._mask.nnz
        size = nnz + self.flat.layout.tail_numel
        fresh = torch.empty(size, device=self.flat.values.device)
        ops.pack(self.flat.prunable, self._mask, out=fresh[:nnz])
        fresh[nnz:] = self.flat.tail
        return fresh

    def _state_span(self, offset: int, numel: int) -> tuple[int, int]:
        """Where a segment's survivors lie in packed state."""
        mask, tail = self._mask, offset - self._mask.numel
        if tail >= 0:
            return mask.nnz + tail, mask.nnz + tail + numel
        before = offset // 2048 * 2048
        lead = mask.words[before // 32 : offset // 32]
        start = int(mask.rank[offset // 2048]) + Mask.from_words(lead, offset - before).nnz
        own = mask.words[offset // 32 : (offset + numel + 31) // 32]
        return start, start + Mask.from_words(own, numel).nnz

    def state_dict(self) -> dict[str, Any]:
        """Groups as in torch; state as packed tensors with the mask that they follow.

        Keys of `state`: the packed tensors' names, `mask` (its words), `segments` (what is kept a
        parameter). Plain tensors and numbers, safe to save with `weights_only`.
        """
        groups = [
            {**{k: v for k, v in g.items() if k != "params"}, "params": list(indices)}
            for g, indices in zip(self.param_groups, self._grouped, strict=True)
        ]
        state: dict[str, Any] = {name: t.clone() for name, t in self._packed.items()}
        state["mask"] = self._mask.words.clone()
        state["segments"] = torch.from_numpy(self._segment_state().copy())
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, also into another density.

        Survivors of both masks keep their state; survivors that the saved mask lacked start at 0.

        Raises:
            ValueError: other groups, names or sizes than this optimizer's; nothing is changed.
        """
        state = dict(state_dict["state"])
        groups = state_dict["param_groups"]
        ours = [list(indices) for indices in self._grouped]
        if [list(g["params"]) for g in groups] != ours:
            raise ValueError("param_groups: expected the groups of this optimizer, got others")
        numel = self.flat.layout.prunable_numel
        device = self.flat.values.device
        saved = Mask.from_words(state.pop("mask").to(device), numel)
        segments = state.pop("segments").numpy()
        if segments.shape != self._segment_state().shape:
            wanted = self._segment_state().shape
            raise ValueError(f"segments: expected shape {wanted}, got {segments.shape}")
        unknown = set(state) - {*self.state_names, "master"}
        if unknown:
            raise ValueError(f"state: expected {self.state_names}, got {sorted(unknown)}")
        packed = {}
        for name, t in state.items():
            _checks.check_tensor(name, t, (torch.float32,))
            _checks.check_numel(
                name, t, saved.nnz + self.flat.layout.tail_numel, "survivors and tail"
            )
            dense = ops.unpack(t[: saved.nnz].to(device), saved)
            packed[name] = torch.cat([ops.pack(dense, self._mask), t[saved.nnz :].to(device)])
        self._packed = packed
        self._written = []
        if "master" in packed:
            self._versions = [p._version for p in self.flat.parameters]
        self._segment_state()[:] = segments
        for group, fresh in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in fresh.items() if k != "params"})

    def _wanted_state(self) -> tuple[str, ...]:
        """Names of the packed tensors that the groups ask for."""
        return self.state_names

    @abstractmethod
    def _segment_state(self) -> np.ndarray:
        """What is kept a segment between steps, float64 [segments, ...]."""

    @abstractmethod
    def _numbers(self, group: dict[str, Any]) -> Numbers:
        """What a group's segments have in their rows."""

    @abstractmethod
    def _advance(self) -> None:
        """Write what changes from step to step; segments without an address do not step."""


class MaskedSGD(MaskedOptimizer):
    """`torch.optim.SGD` for a flattened model under a mask; momentum for survivors only.

    Args:
        params: a FlatParameters.
        mask: which of `params.prunable` survive; becomes `params.mask`. None: the current one.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        groups: parameter groups as torch takes them (dicts with "params": parameters of the
            module, and overrides). None: one group of all. Parameters of no group stay as they are.

    Pruned weights are +0.0 after each step, whatever gradient, decay or momentum say; the dense
    tail is updated in the same call. With a dense mask the result is torch's within rounding.

    Raises:
        ValueError: hyper-parameters out of range; TypeError: `params` is not flat.
    """

    state_names = ("momentum_buffer",)
    _kernel, _op = "masked_sgd", masked_sgd.op

    def __init__(
        self,
        params: FlatParameters,
        mask: Mask | None = None,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        groups: Groups | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, mask, defaults, groups)
        self._started = np.zeros((len(params.layout.entries), 1))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        merged = {**self.defaults, **param_group}
        _at_least("lr", merged["lr"], 0)
        _at_least("momentum", merged["momentum"], 0)
        _at_least("weight_decay", merged["weight_decay"], 0)
        if merged["nesterov"] and (merged["momentum"] <= 0 or merged["dampening"] != 0):
            raise ValueError(
                "nesterov: expected a momentum above 0 and no dampening, got momentum="
                f"{merged['momentum']}, dampening={merged['dampening']}"
            )
        super().add_param_group(param_group)

    def _segment_state(self) -> np.ndarray:
        return self._started

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        scalars = tuple(float(group[k]) for k in ("lr", "momentum", "dampening", "weight_decay"))
        flags = ops.sgd_flags(nesterov=group["nesterov"], maximize=group["maximize"], zeroed=True)
        return scalars, flags

    def _advance(self) -> None:
        if self._begun:
            return
        rows, momentum = self._segments.rows.numpy(), self._segments.scalars.numpy()[:, 1]
        first = (self._started[:, 0] == 0) & (momentum != 0)
        rows[:, 3] = rows[:, 3] & ~_segments.FIRST | _segments.FIRST * first
        self._begun = not first.any()
        self._started[first & (rows[:, 2] != 0)] = 1

    def _wanted_state(self) -> tuple[str, ...]:
        return self.state_names if any(g["momentum"] != 0 for g in self.param_groups) else ()


class MaskedAdamW(MaskedOptimizer):
    """`torch.optim.AdamW` for a flattened model under a mask; both averages for survivors only.

    Args:
        params, mask, groups: as in MaskedSGD.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.

    The powers of the betas are carried as float64 products, one a parameter, so betas that change
    between steps correct the bias they really left; for constant betas that is torch's formula.
    Otherwise as MaskedSGD.
    """

    state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _kernel, _op = "masked_adamw", masked_adamw.op

    def __init__(
        self,
        params: FlatParameters,
        mask: Mask | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        groups: Groups | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, mask, defaults, groups)
        self._powers = np.ones((len(params.layout.entries), 2))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        merged = {**self.defaults, **param_group}
        _at_least("lr", merged["lr"], 0)
        _at_least("eps", merged["eps"], 0)
        _at_least("weight_decay", merged["weight_decay"], 0)
        for beta in merged["betas"]:
            if not 0 <= beta < 1:
                raise ValueError(f"betas: expected 0 <= beta < 1, got {merged['betas']}")
        super().add_param_group(param_group)

    def _segment_state(self) -> np.ndarray:
        return self._powers

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        beta1, beta2 = group["betas"]
        given = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        flags = ops.adamw_flags(maximize=group["maximize"], amsgrad=group["amsgrad"], zeroed=True)
        return tuple(float(x) for x in given), flags

    def _advance(self) -> None:
        scalars, stepping = self._segments.scalars.numpy(), self._segments.rows.numpy()[:, 2:3] != 0
        np.multiply(self._powers, scalars[:, 1:3], out=self._powers, where=stepping)
        scalars[:, 5:7] = self._powers

    def _wanted_state(self) -> tuple[str, ...]:
        if any(g["amsgrad"] for g in self.param_groups):
            return self.state_names
        return self.state_names[:2]


def _at_least(name: str, value: Any, least: float) -> None:
    if not float(value) >= least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
