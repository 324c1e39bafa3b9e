"""A module's parameters as one contiguous buffer, so that one kernel call serves a whole model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmap_sparse import _checks, _module_tree
from fedmap_sparse._backends import native
from fedmap_sparse._gradients import Gradients
from fedmap_sparse._tensor_kinds import Extra, kind_of, ties
from fedmap_sparse.layout import FlatLayout, build, verdicts
from fedmap_sparse.mask import Mask
from fedmap_sparse.prunable import Prunable, from_module

# What a copy makes anew from its module, when it is first asked for.
_BOUND = frozenset(
    {
        "values",
        "parameters",
        "_tree",
        "_places",
        "_shapes",
        "_segments",
        "_tied",
        "_clean",
        "_order",
    }
)
_REFLATTEN = "rebind() cannot follow that: flatten the module again, fs.flatten(model)"


class FlatParameters(Gradients):
    """A module whose parameters are views of one contiguous buffer. Made by `flatten`.

    The module is used as before: forward, backward, state_dict, load_state_dict, zero_grad. What
    gives its parameters other memory (`.to(device)`, `.half()`, a replaced Parameter or submodule)
    is noticed by every use here (`check_bound`), and `rebind` takes in what still fits the layout.

    Copies and pickles hold the module's copy, bound anew.

    Attributes:
        values: the buffer, 1-D, `layout.numel` elements: the prunable part, then the tail; padding
            is zero. The module's parameters are views of it, so a write to one is seen in both.
        layout: where each parameter lies.
        module: the module that was flattened.
        parameters: its parameters, in the layout's order; tied ones once.
        mask: the current mask over `prunable`; `layout.initial_mask()` at first.

    >>> import torch, fedmap_sparse as fs
    >>> params = fs.flatten(torch.nn.Linear(4, 2))
    >>> params.module.weight.data_ptr() == params.values.data_ptr()
    True
    """

    _places: _module_tree.BufferPlaces
    _shapes: tuple[tuple[int, ...], ...]

    def __init__(self, module: nn.Module, layout: FlatLayout, shared: Iterable[str] = ()) -> None:
        # `shared`: aliases that are Parameters of their own on the memory of another one.
        self.module = module
        self.layout = layout
        self._shared = frozenset(shared)
        self._adopt()
        self._mask = layout.initial_mask(self.values.device)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _BOUND}

    def __getattr__(self, name: str) -> Any:
        # While a copy is made its module may be half done, so it is bound when it is first used.
        if name not in _BOUND or "_mask" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._adopt()
        self._mask = self._mask_here()
        return self.__dict__[name]

    def _adopt(self) -> None:
        """Copy the module's parameters into a fresh buffer, then make them views of it."""
        found = _module_tree.registered(self.module)
        if problem := self._misfit(found):
            raise ValueError(problem)
        current = {e.name: found[e.name].value for e in self.layout.entries}
        _module_tree.check_views(self.module, current)
        with torch.inference_mode(False), torch.no_grad():
            values = _module_tree.room_for(current, self.layout.numel)
            views = [
                values[e.offset : e.offset + e.numel].view(e.shape) for e in self.layout.entries
            ]
            for view, p in zip(views, current.values(), strict=True):
                view.copy_(p)
            of = dict(zip(current, views, strict=True))
            dims = dict(self.layout.permuted)
            alike = {
                name: of[of_name].permute(dims[name]) if name in dims else of[of_name]
                for name, of_name in self.layout.aliases
            }
            for name, view in alike.items():
                if not torch.equal(found[name].value.to(view), view):
                    other = dict(self.layout.aliases)[name]
                    raise ValueError(
                        f"{name}: expected the values of {other}, to which it was tied when the "
                        f"module was flattened, got others; {_REFLATTEN}"
                    )
            for view, p in zip(views, current.values(), strict=True):
                _bind(p, view)
            for name, of_name in self.layout.aliases:
                if name in self._shared:
                    _bind(found[name].value, alike[name])
                else:
                    found[name].holder[found[name].key] = current[of_name]
        index = {e.name: i for i, e in enumerate(self.layout.entries)}
        self._tied = [
            (found[name].value, index[of_name], dims.get(name))
            for name, of_name in self.layout.aliases
            if name in self._shared
        ]
        self.values = values
        self.parameters = list(current.values())
        self._tree = _module_tree.Tree.of(self.module)
        self._order = None, []
        self._places = _module_tree.BufferPlaces(self.module)
        self._shapes = tuple(e.shape for e in self.layout.entries)
        rows = [[e.offset, e.numel, 0, 0] for e in self.layout.entries]
        self._segments = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 4)
        self._clean = None, [-1] * len(self.parameters), -1
        tied = {i for _, i, _ in self._tied}
        alone = [p for i, p in enumerate(self.parameters) if i not in tied]
        _module_tree.save_tensors_alone(self.module, alone, values)

    @property
    def buffers(self) -> dict[str, Any]:
        """The module's persistent buffers, live, under every name that its state dict has.

        Raises:
            RuntimeError: a buffer was added, removed or given another shape or kind since
                `flatten`; the message names it.
        """
        found: dict[str, Any] | None = self._places.found() if self._tree.is_same() else None
        if found is None:
            found = _module_tree.buffers(self.module)
            self._places = _module_tree.BufferPlaces(self.module)
        elif (known := self._places.noted(found)) is not None:
            return known
        expected = {b.name: b for b in self.layout.buffers}
        for name in [*expected, *found]:
            wanted, got = expected.get(name), found.get(name)
            if wanted is not None and wanted.kind == "extra" and name in found:
                continue
            shape = None if wanted is None else (wanted.shape, wanted.kind)
            seen = None if got is None else (tuple(got.shape), kind_of(got))
            if shape != seen:
                was, now = _buffer_text(shape), _buffer_text(seen)
                raise RuntimeError(f"{name}: expected {was}, got {now}; {_REFLATTEN}")
        result = {name: found[name] for name in expected}
        self._places.note(found, result)
        return result

    def _is_as_bound(self) -> bool:
        """Whether nothing has changed since parameters were last looked at; false: look again."""
        return (
            native is not None
            and not self._tied
            and self._tree.is_same()
            and native.same_shapes(self.parameters, self._shapes)
            and self.read_gradients(self.values, self._segments) >= 0
        )

    @property
    def mask(self) -> Mask:
        """Which elements of `prunable` survive. Setting one writes no weight: see `zero_pruned`."""
        return self._mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        if mask is self._mask:  # as when an optimizer is made after each `receive`
            return
        self.layout.check_mask(mask)
        _checks.check_device("mask", mask.words, self.values.device)
        self._mask = mask

    @property
    def density(self) -> float:
        """Survivors of `mask` over eligible elements; 1.0 for a model with none."""
        return self._mask.nnz / self.layout.eligible if self.layout.eligible else 1.0

    def to_state_dict(self) -> dict[str, Any]:
        """Copies of all parameters (aliases too) and buffers, in the model's order, dense.

        Raises:
            RuntimeError: see `check_bound` and `buffers`.
        """
        self.check_bound()
        names = [e.name for e in self.layout.entries]
        found = dict(zip(names, self.parameters, strict=True))
        buffers = self.buffers
        state = {
            name: t.detach().clone()
            for name, t in self.layout.spread(found | buffers).items()
            if isinstance(t, Tensor)
        }
        extra = {n: copy.deepcopy(b.value) for n, b in buffers.items() if isinstance(b, Extra)}
        return {name: state[name] if name in state else extra[name] for name in self.layout.names}

    def to(self, device: torch.device | str) -> FlatParameters:
        """Move module, buffer and mask to `device`, in place, keeping the views; returns self."""
        self.module.to(device)
        self.rebind()
        return self

    def check_bound(self) -> None:
        """Raise unless the module's parameters are exactly the layout's, each a view of `values`.

        Every use asks: a step, encode, receive, begin_round, aggregate, state export.

        Raises:
            RuntimeError: names the parameter, what happened to it, and what to do.

        O(modules).
        """
        if self._is_as_bound():
            return
        found = _module_tree.registered(self.module)
        if problem := self._misfit(found):
            raise RuntimeError(problem)
        for p, e in zip(self.parameters, self.layout.entries, strict=True):
            if found[e.name].value is not p or not self._is_view(p, e.offset, e.shape):
                raise RuntimeError(
                    f"{e.name} is no longer a view of the flat buffer (the module was moved, cast, "
                    "re-strided, flattened again, or the parameter replaced after flatten). Call "
                    "rebind() on the FlatParameters"
                )
        for name, of_name in self.layout.aliases:
            p = found[name].value
            tied = found[of_name].value if name not in self._shared else None
            if tied is not None and p is not tied:
                raise RuntimeError(
                    f"{name} is no longer tied to {of_name}. Tie it, or {_REFLATTEN}"
                )
        for p, i, dims in self._tied:
            view = self.parameters[i] if dims is None else self.parameters[i].permute(dims)
            if (p.data_ptr(), p.stride(), p.dtype) != (view.data_ptr(), view.stride(), view.dtype):
                name = self.layout.entries[i].name
                raise RuntimeError(
                    f"a parameter no longer shares the memory of {name}. Call rebind() on the "
                    "FlatParameters"
                )
        self._tree = _module_tree.Tree.of(self.module)

    def _is_view(self, p: Tensor, offset: int, shape: tuple[int, ...]) -> bool:
        place = self.values.data_ptr() + offset * self.values.element_size()
        return (
            p.dtype == self.values.dtype
            and p.device == self.values.device
            and tuple(p.shape) == shape
            and p.is_contiguous()
            and (p.numel() == 0 or p.data_ptr() == place)
        )

    def _misfit(self, found: Mapping[str, _module_tree.Registered]) -> str:
        """Why the module's parameters are no longer the layout's, or "" if a rebind would do."""
        shapes = {e.name: e.shape for e in self.layout.entries}
        wanted = [*shapes, *(alias for alias, _ in self.layout.aliases)]
        fresh = [name for name in found if name not in set(wanted)]
        for name in wanted:
            if name not in found:
                inside = name.rpartition(".")[0]
                near = [n for n in fresh if n.startswith(f"{inside}." if inside else "")]
                shape = shapes.get(name)
                near = near or [n for n in fresh if tuple(found[n].value.shape) == shape][:3]
                got = f"none, but {', '.join(near)}" if near else "none"
                return (
                    f"{name}: expected a parameter of this name as when the module was flattened, "
                    f"got {got}; {_REFLATTEN}"
                )
            shape = tuple(found[name].value.shape)
            if name in shapes and shape != shapes[name]:
                return f"{name}: expected shape {shapes[name]}, got {shape}; {_REFLATTEN}"
        if fresh:
            return f"{fresh[0]}: expected no parameter of this name, got one; {_REFLATTEN}"
        return ""

    def rebind(self) -> None:
        """Take the module's parameters as they are now into a fresh buffer of their dtype, device.

        Pruned positions of the current mask are zeroed. Packed optimizer state stays valid: it
        follows the mask, not the address.

        Raises:
            ValueError, TypeError: parameters were added, removed or reshaped, or dtypes or devices
                are mixed; nothing is changed.
        """
        self._adopt()
        self._mask = self._mask_here()
        self.zero_pruned()

    def __repr__(self) -> str:
        return (
            f"FlatParameters({len(self.parameters)} parameters, {self.layout.eligible} prunable, "
            f"density {self.density:.4g}, {_checks.short(self.values.dtype)}, {self.values.device})"
        )


def flatten(model: nn.Module, *, prunable: Prunable | None = None) -> FlatParameters:
    """Give all parameters of `model` one contiguous buffer as their memory, in place.

    Values, gradients, names and the module's behaviour stay as they are. Prunable tensors come
    first, each on a multiple of 128 elements, padding zero; tied parameters are stored once.

    Args:
        model: any module whose parameters share one dtype (float32, float16 or bfloat16) and one
            device. Parameters become row-major, whatever their memory format was.
        prunable: which parameters a mask covers: `(name, parameter) -> bool`, or their names. None:
            weights of linear, convolution, embedding, recurrent and attention layers, and of other
            modules the tensors of two or more dimensions that are no normalisation, scale, bias or
            table of positions. `params.layout.describe()` prints what that gave, and why.

    Returns:
        The buffer, its layout and a mask that keeps everything.

    Raises:
        ValueError: no parameters, mixed dtypes or devices, an uninitialised lazy parameter, or
            parameters that share a part of their memory, or a buffer that shares a parameter's.
        TypeError: a dtype that the kernels do not serve, or a parameter that is no ordinary tensor.

    O(parameters): one copy.

    >>> import torch, fedmap_sparse as fs
    >>> params = fs.flatten(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4)))
    >>> [e.name for e in params.layout.prunable_entries]
    ['0.weight']
    """
    named = {name: r.value for name, r in _module_tree.registered(model).items()}
    _module_tree.check_ordinary(model, named)
    first: dict[int, str] = {}
    tied: dict[str, Any] = {}
    for name, p in named.items():
        if id(p) in first:  # both are alive in `named`, so the id is no recycled one
            tied[name] = first[id(p)], None
        else:
            first[id(p)] = name
    apart = {name: named[name] for name in first.values()}
    _module_tree.common(apart)
    shared = ties(apart)
    parameters = {name: p for name, p in apart.items() if name not in shared}
    _module_tree.check_apart(parameters)
    tied = {
        name: (shared[of][0], shared[of][1]) if of in shared else (of, None)
        for name, (of, _) in tied.items()
    } | shared
    buffers = _module_tree.buffers(model)
    order = tuple(n for n in model.state_dict(keep_vars=True) if n in named or n in buffers)
    verdict = verdicts(parameters, prunable, from_module(model))
    tied = {name: tied[name] for name in named if name in tied}
    layout = build(parameters, tied, buffers, order, verdict)
    return FlatParameters(model, layout, shared)


def _bind(p: Tensor, view: Tensor) -> None:
    if p.grad is not None and (p.grad.dtype != view.dtype or p.grad.device != view.device):
        p.grad = None
    p.data = view


def _buffer_text(found: tuple[tuple[int, ...], str] | None) -> str:
    return "no buffer" if found is None else f"a buffer of shape {list(found[0])} ({found[1]})"
