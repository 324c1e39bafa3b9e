"""A module's parameters as one contiguous buffer, so that one kernel call serves a whole model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmap_sparse import _checks
from fedmap_sparse._backends import native
from fedmap_sparse.layout import FlatLayout, Prunable, build, matrices
from fedmap_sparse.mask import Mask


class FlatParameters:
    """A module whose parameters are views of one contiguous buffer. Made by `flatten`.

    Attributes:
        values: the buffer, 1-D, `layout.numel` elements: the prunable part, then the tail; padding
            is zero. The module's parameters are views of it, so a write to one is seen in both.
        layout: where each parameter lies.
        module: the module, which is used as before: forward, backward, state_dict,
            load_state_dict, zero_grad. What re-homes its parameters (`.to(device)`, `.half()`,
            replacing a Parameter) breaks the views; `check_bound` notices and `rebind` mends.
        mask: the current mask over `prunable`; `layout.initial_mask()` at first.
    """

    def __init__(self, module: nn.Module, layout: FlatLayout) -> None:
        self.module = module
        self.layout = layout
        owners = _owners(module)
        self._owners = [owners[e.name] for e in layout.entries]
        self._names = [e.name for e in layout.entries]
        self.values = torch.empty(0)
        self._adopt()
        self._mask = layout.initial_mask(self.values.device)

    def _adopt(self) -> None:
        """Copy the module's parameters into a fresh buffer, then make them views of it."""
        parameters = [owner._parameters[key] for owner, key in self._owners]
        current = {n: p for n, p in zip(self._names, parameters, strict=True) if p is not None}
        if len(current) != len(parameters):
            gone = next(n for n in self._names if n not in current)
            raise ValueError(f"{gone}: expected a parameter, got None")
        for e in self.layout.entries:
            if tuple(current[e.name].shape) != e.shape:
                got = tuple(current[e.name].shape)
                raise ValueError(f"{e.name}: expected shape {e.shape}, got {got}")
        dtype, device = _common(current)
        values = torch.zeros(self.layout.numel, dtype=dtype, device=device)
        views = [values[e.offset : e.offset + e.numel].view(e.shape) for e in self.layout.entries]
        with torch.no_grad():
            for view, p in zip(views, current.values(), strict=True):
                view.copy_(p)
        for view, p in zip(views, current.values(), strict=True):
            if p.grad is not None and (p.grad.dtype != dtype or p.grad.device != device):
                p.grad = None
            p.data = view
        other = dict(self.layout.aliases)
        owners = _owners(self.module) if other else {}
        for alias, name in other.items():
            owner, key = owners[alias]
            owner._parameters[key] = current[name]
        self.values = values
        self.parameters = list(current.values())
        self._holders = [owner._parameters for owner, _ in self._owners]
        self._keys = [key for _, key in self._owners]

    @property
    def prunable(self) -> Tensor:
        """The 1-D view that a `Mask` covers, padding included."""
        return self.values[: self.layout.prunable_numel]

    @property
    def tail(self) -> Tensor:
        """The rest: biases, normalisation, whatever `prunable` refused. Never pruned."""
        return self.values[self.layout.prunable_numel :]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers, live."""
        found = _buffers(self.module)
        return {b.name: found[b.name] for b in self.layout.buffers}

    @property
    def mask(self) -> Mask:
        return self._mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        self.layout.check_mask(mask)
        _checks.check_device("mask", mask.words, self.values.device)
        self._mask = mask

    @property
    def density(self) -> float:
        """Survivors of `mask` over eligible elements; 1.0 for a model with none."""
        return self._mask.nnz / self.layout.eligible if self.layout.eligible else 1.0

    def to_state_dict(self) -> dict[str, Tensor]:
        """Copies of all parameters (aliases too) and buffers, in the model's order, dense."""
        found: dict[str, Tensor] = dict(zip(self._names, self.parameters, strict=True))
        found.update({alias: found[name] for alias, name in self.layout.aliases})
        found.update(self.buffers)
        return {name: found[name].detach().clone() for name in self.layout.names}

    def to(self, device: torch.device | str) -> FlatParameters:
        """Move module, buffer and mask to `device`, in place, keeping the views; returns self."""
        self.module.to(device)
        self.rebind()
        return self

    def check_bound(self) -> None:
        """Raise RuntimeError unless every parameter of the module is still the view it was.

        The optimizers ask at each step (see `read_gradients`), so that nobody trains stale copies.
        """
        start, size = self.values.data_ptr(), self.values.element_size()
        for holder, key, p, e in zip(
            self._holders, self._keys, self.parameters, self.layout.entries, strict=True
        ):
            if (
                holder.get(key) is not p
                or p.dtype != self.values.dtype
                or p.numel() != e.numel
                or not p.is_contiguous()
                or (e.numel and p.data_ptr() != start + e.offset * size)
            ):
                raise RuntimeError(
                    f"{e.name} is no longer a view of the flat buffer (the module was moved, cast, "
                    "re-strided, or the parameter replaced after flatten). Call rebind() on the "
                    "FlatParameters"
                )

    def read_gradients(self, rows: Tensor) -> bool:
        """Write each gradient's address (0 for None) into a table of segments, `Segments.rows`.

        True only if `check_bound` would pass and every gradient is as kernels want it: contiguous,
        of its parameter's size, of the buffer's dtype and device. Else, and where there is no C++,
        it is for Python to say what is wrong or to mend it. 0.24 us a parameter, where the same
        attributes read from Python take 0.9.
        """
        return native is not None and native.read_gradients(
            self.values, self.parameters, self._holders, self._keys, rows.data_ptr()
        )

    def rebind(self) -> None:
        """Take the module's parameters as they are now into a fresh buffer of their dtype, device.

        Raises ValueError or TypeError, changing nothing, if a shape changed or dtypes are mixed.
        Pruned positions of the current mask are zeroed. Packed optimizer state stays valid: it
        follows the mask, not the address.
        """
        self._adopt()
        self._mask = self._mask.to(self.values.device)
        self.zero_pruned()

    def zero_pruned(self) -> None:
        """Write +0.0 to what the current mask does not keep, e.g. after `load_state_dict`."""
        from fedmap_sparse import ops

        ops.zero_pruned_(self.prunable, self._mask)
        self.mark_written()

    def mark_written(self) -> None:
        """Tell autograd that the parameters changed, after a write through raw pointers.

        Bumping the version of `values` alone leaves a backward over an old graph silently wrong
        where torch raises: the Parameters carry their own versions.
        """
        torch.autograd.graph.increment_version(self.parameters)

    def __repr__(self) -> str:
        return (
            f"FlatParameters({len(self.parameters)} parameters, {self.layout.eligible} prunable, "
            f"density {self.density:.4g}, {_checks.short(self.values.dtype)}, {self.values.device})"
        )


def flatten(model: nn.Module, *, prunable: Prunable = matrices) -> FlatParameters:
    """Re-home all parameters of `model` as views of one contiguous buffer, in place.

    Values, gradients, names and the module's behaviour stay as they are. Prunable tensors come
    first, each on a multiple of 128 elements, padding zero; tied parameters are stored once.

    Args:
        model: any module whose parameters share one dtype (float32, float16 or bfloat16) and one
            device. Parameters become row-major, whatever their memory format was.
        prunable: `(name, parameter) -> bool`, which parameters a mask covers. The default keeps
            biases and normalisation out: two or more dimensions.

    Raises:
        ValueError: no parameters, mixed dtypes or devices, or an uninitialised lazy parameter.
        TypeError: a dtype that the kernels do not serve.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, p in named.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name}: expected an initialised parameter, got a lazy one; run once")
    first: dict[int, str] = {}
    aliases = []
    for name, p in named.items():
        if id(p) in first:  # both are alive in `named`, so the id is no recycled one
            aliases.append((name, first[id(p)]))
        else:
            first[id(p)] = name
    parameters = {name: named[name] for name in first.values()}
    _common(parameters)
    buffers = _buffers(model)
    order = tuple(n for n in model.state_dict(keep_vars=True) if n in named or n in buffers)
    return FlatParameters(model, build(parameters, aliases, buffers, order, prunable))


def _common(parameters: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
    if not parameters:
        raise ValueError("model: expected at least one parameter, got none")
    head, p0 = next(iter(parameters.items()))
    for name, p in parameters.items():
        if p.layout is not torch.strided or p.dtype not in _checks.FLOAT_DTYPES:
            kind = _checks.short(p.dtype) if p.layout is torch.strided else str(p.layout)
            raise TypeError(f"{name}: expected dense float32, float16 or bfloat16, got {kind}")
        if p.dtype != p0.dtype or p.device != p0.device:
            raise ValueError(
                f"{name}: expected {_checks.short(p0.dtype)} on {p0.device} like {head}, got "
                f"{_checks.short(p.dtype)} on {p.device}: one flat buffer has one dtype and device"
            )
    return p0.dtype, p0.device


def _owners(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    return {
        f"{prefix}.{key}" if prefix else key: (owner, key)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for key in owner._parameters
    }


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    kept = module.state_dict(keep_vars=True).keys()
    return {name: b for name, b in module.named_buffers() if name in kept}
