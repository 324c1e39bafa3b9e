"""What a module holds where: its parameters by name, and a quick look whether that changed."""

from __future__ import annotations

import bisect
import copyreg
import itertools
import operator
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.weak import WeakIdKeyDictionary

from fedmap_sparse import _checks
from fedmap_sparse._backends import native
from fedmap_sparse._tensor_kinds import Extra, ties
from fedmap_sparse.prunable import named_owners


@dataclass(frozen=True)
class Registered:
    """One name of a parameter: `holder[key] is value`."""

    holder: dict[str, Any]  # of Tensor or None
    key: str
    value: Tensor


def registered(module: nn.Module) -> dict[str, Registered]:
    """Every name of every parameter, tied ones under each."""
    found = {}
    for prefix, owner in named_owners(module):
        for key, p in owner._parameters.items():
            if p is not None:
                name = f"{prefix}.{key}" if prefix else key
                found[name] = Registered(owner._parameters, key, p)
    return found


class Tree:
    """What some dicts held when this was made."""

    def __init__(self, dicts: Iterable[dict[Any, Any]]) -> None:
        # Each dict, then its keys and values. One list, so that C++ walks it in a microsecond.
        self._seen: list[Any] = []
        for held in dicts:
            self._seen += [held, *itertools.chain(*held.items())]

    @staticmethod
    def of(module: nn.Module) -> Tree:
        """The modules and parameters that `module` holds, all under it too."""
        return Tree(d for owner in module.modules() for d in (owner._modules, owner._parameters))

    def is_same(self) -> bool:
        """Whether every module and parameter is where it was, and none was added."""
        if native is not None:
            return bool(native.same_tree(self._seen))
        now = []
        for held in self._seen:
            if isinstance(held, dict):
                now += [held, *itertools.chain(*held.items())]
        return len(now) == len(self._seen) and all(map(operator.is_, now, self._seen))


class BufferPlaces:
    """Where a module holds what its state dict has beside parameters.

    To ask the state dict anew takes 0.5 ms of each look at resnet20's buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        of = {
            f"{prefix}.{key}" if prefix else key: (owner._buffers, key)
            for prefix, owner in named_owners(module)
            for key in owner._buffers
        }
        self._names = list(buffers(module))
        self._places = [of.get(name) for name in self._names]
        owners = list(module.modules())
        self._dicts: list[dict[Any, Any]] = [
            d for owner in owners for d in (owner._buffers, owner._state_dict_hooks)
        ]
        self._sets = [owner._non_persistent_buffers_set for owner in owners]
        self._lengths = self._count()
        # What else decides a state dict's names is asked anew each time.
        self._plain = None not in self._places and all(
            type(owner).state_dict is nn.Module.state_dict
            and type(owner)._save_to_state_dict is nn.Module._save_to_state_dict
            for owner in owners
        )
        self._found: dict[str, Tensor] = {}
        self._tree: Tree | None = None
        self._noted: tuple[Any, dict[str, Tensor], list[Any]] = None, {}, []

    def _count(self) -> list[int]:
        return [*map(len, self._dicts), *map(len, self._sets)]

    def found(self) -> dict[str, Tensor] | None:
        """The buffers by name; None if the module must be asked. Its modules must be the same.

        The same dict as the last time, if nothing was replaced.
        """
        if not self._plain or self._count() != self._lengths:
            return None
        if self._tree is not None and self._tree.is_same():
            return self._found
        found = {}
        for name, place in zip(self._names, self._places, strict=True):
            value = None if place is None else place[0].get(place[1])
            if value is None:
                return None
            found[name] = value
        self._found, self._tree = found, Tree(self._dicts)
        return found

    def note(self, found: dict[str, Any], result: dict[str, Any]) -> None:
        """Remember what these buffers were found to be."""
        if self._plain:
            self._noted = found, dict(result), [(b.shape, b.dtype) for b in result.values()]

    def noted(self, found: dict[str, Any]) -> dict[str, Any] | None:
        """What was noted of them, if they are the same and have the shapes and dtypes of then."""
        last, result, looks = self._noted
        if found is last and [(b.shape, b.dtype) for b in result.values()] == looks:
            return dict(result)
        return None


# Parameters that are views of a flat buffer, and tied by no memory but their own: the buffer.
_views = WeakIdKeyDictionary()


def save_tensors_alone(module: nn.Module, parameters: Iterable[Tensor], values: Tensor) -> None:
    """Let state dicts and pickles hold tensors with storages of their own size, on this memory.

    A view of the flat buffer has the whole buffer as its storage, and that is what pickle and
    safetensors store for each.

    Args:
        module: whose state dicts.
        parameters: what `pickle` and `torch.save` meet in the module.
        values: the flat buffer, which other processes get as it is, once.
    """
    copyreg.pickle(nn.Parameter, _reduced)
    ForkingPickler.register(nn.Parameter, _sent)
    for p in parameters:
        _views[p] = values
    for owner in module.modules():
        if owner._parameters and _alone not in owner._state_dict_hooks.values():
            owner.register_state_dict_post_hook(_alone)


def _alone(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in module._parameters:
        t = state.get(prefix + key)
        if type(t) is Tensor:
            state[prefix + key] = own_storage(t)


def _reduced(p: nn.Parameter) -> Any:
    """What pickle stores of any Parameter."""
    if p not in _views:
        return p.__reduce_ex__(2)
    alone = nn.Parameter(own_storage(p.detach()), p.requires_grad)
    vars(alone).update(vars(p))
    return alone.__reduce_ex__(2)


def _sent(p: nn.Parameter) -> Any:
    """What another process gets of any Parameter: of a flat one its place in the shared buffer.

    By torch's own way each view shares the storage anew, and `Process(args=(model,))` fails, as it
    cannot pass one file twice.
    """
    values = _views.get(p)
    if values is None or p.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
        return reduce_tensor(p)
    return _received, (values, p.storage_offset(), p.shape, p.stride(), p.requires_grad)


def _received(
    values: Tensor, offset: int, shape: torch.Size, stride: tuple[int, ...], requires_grad: bool
) -> nn.Parameter:
    return nn.Parameter(values.as_strided(shape, stride, offset), requires_grad)


# By address, size and so on: what is in here lives, so no other object has its address. Tied
# parameters are one tensor in a state dict, and stored once.
_made: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()


def own_storage(t: Tensor) -> Tensor:
    """`t`, on the same memory, with a storage of its own size: what is saved of it is it alone."""
    if not t.numel() or t.device.type not in ("cpu", "cuda"):
        return t
    if t.untyped_storage().nbytes() == t.nbytes:
        return t
    key = (t.data_ptr(), t.dtype, t.device, tuple(t.shape), t.stride())
    found = _made.get(key)
    if found is None or found.data_ptr() != key[0] or tuple(found.shape) != key[3]:
        with torch.inference_mode(False):
            found = torch.utils.dlpack.from_dlpack(t)
        _made[key] = found
    return found


def check_ordinary(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Raise TypeError or ValueError where a flat buffer cannot take a module's parameters."""
    for m in module.modules():
        if isinstance(m, torch.jit.ScriptModule):
            raise TypeError("model: expected Python modules, got a ScriptModule; flatten it before")
    for name, p in parameters.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name}: expected an initialised parameter, got a lazy one; run once")
        if type(p.data) is not Tensor:
            kind = type(p.data).__name__
            remedy = (
                "; use DistributedDataParallel, or encode_state_dict on a full state dict"
                if kind == "DTensor"
                else ""
            )
            raise TypeError(f"{name}: expected an ordinary torch tensor, got a {kind}{remedy}")


def check_apart(parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError where two parameters, or two elements of one, share memory."""
    spans = []
    for name, p in parameters.items():
        if not p.numel() or p.device.type == "meta":
            continue
        reach = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)) + 1
        if reach < p.numel():
            raise ValueError(
                f"{name}: expected elements with memory of their own, got strides "
                f"{p.stride()} of an expanded tensor; clone it"
            )
        start = p.data_ptr()
        spans.append((start, start + reach * p.element_size(), name, p))
    spans.sort(key=lambda span: span[:2])
    for (_, stop, name, p), (start, _, other, q) in itertools.pairwise(spans):
        if start < stop and p.is_contiguous() and q.is_contiguous():
            raise ValueError(
                f"{other}: expected memory of its own, or all of another parameter's, got a part "
                f"of {name}'s; clone it, or tie them by assigning one Parameter to both names"
            )


def check_views(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError where something is a view of a parameter and would keep its old memory.

    Looks at the parameters, which are apart when a module is first flattened, at buffers, and at
    attributes of modules without a forward hook, which may make them anew.
    """
    for name, (of, _) in ties(parameters).items():
        raise ValueError(
            f"{name}: expected memory of its own as when the module was flattened, got {of}'s; "
            "flatten the module again, fs.flatten(model)"
        )
    spans = sorted((*_span(p), name) for name, p in parameters.items() if _has_memory(p))
    for prefix, owner in named_owners(module):
        held = {**owner._buffers, **({} if owner._forward_pre_hooks else vars(owner))}
        for key, t in held.items():
            if not isinstance(t, Tensor) or not _has_memory(t):
                continue
            start, stop = _span(t)
            at = bisect.bisect_left(spans, stop, key=operator.itemgetter(0)) - 1
            if at >= 0 and start < spans[at][1]:
                raise ValueError(
                    f"{prefix}{'.' * bool(prefix)}{key}: expected memory of its own, got a view of "
                    f"{spans[at][2]}, which moves into the flat buffer; clone it, or make it from "
                    "the parameter in forward"
                )


def _has_memory(t: Tensor) -> bool:
    return t.layout is torch.strided and t.device.type in ("cpu", "cuda") and t.numel() > 0


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first element and after its last one."""
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    return t.data_ptr(), t.data_ptr() + reach * t.element_size()


def room_for(parameters: Mapping[str, Tensor], numel: int) -> Tensor:
    """Zeros of the parameters' dtype and device; between processes where all of them are."""
    dtype, device = common(parameters)
    values = torch.zeros(numel, dtype=dtype, device=device)
    if device.type == "cpu" and all(p.is_shared() for p in parameters.values()):
        values.share_memory_()
    return values


def common(parameters: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of all parameters; raises where they are not the same."""
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


def buffers(module: nn.Module) -> dict[str, Any]:
    """What a state dict holds beside parameters: buffers under every name, then extra state."""
    parameters = registered(module)
    live = {
        f"{prefix}.{key}" if prefix else key: b
        for prefix, owner in named_owners(module)
        for key, b in owner._buffers.items()
        if b is not None
    }
    return {
        name: live.get(name, Extra(value))
        for name, value in module.state_dict(keep_vars=True).items()
        if name not in parameters
    }
