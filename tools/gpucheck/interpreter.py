"""Triton's interpreter with eyes.

By itself it notices nothing. Here its four memory primitives are replaced: bounds, alignment, lanes
that are masked off but used, races between programs, any order of programs, bytes moved.
Kernels decorated for compilation are interpreted, so that one process can do both.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.jit import JITFunction

from gpucheck.memory import SECTOR

_TRITON = str(Path(triton.__file__).parent)
_NOBODY, _SEVERAL = -1, -2


def _where() -> str:
    """The kernel's line that led here."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_TRITON) and name != __file__:
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


class _Tracked:
    """One stretch of memory: sectors touched, and which program touched each granule (2 bytes, or
    one where some tensor's elements are) last."""

    def __init__(self, name: str, address: int, size: int, granule: int) -> None:
        self.name, self.address, self.size = name, address, size
        kinds = ("ld", "st", "atom")
        self.phase = address % SECTOR
        self.sectors = {k: np.zeros((size + self.phase) // SECTOR + 1, bool) for k in kinds}
        self.granule = granule
        self.program = {k: np.full(size // granule + 1, _NOBODY, np.int32) for k in kinds}


class Guard:
    """Stands in for the interpreter's memory; also what a `guard` block collected."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self.errors: Counter[tuple[str, str]] = Counter()
        self.launches: list[str] = []
        self.visible: list[tuple[str, torch.Tensor]] = []
        self._bytes = 0
        self.program = self.programs = 0
        self.original = interpreter._interpreter
        self._start([])

    def show(self, **tensors: torch.Tensor) -> None:
        """Let kernels reach these tensors by their addresses."""
        self.visible += tensors.items()

    @property
    def faults(self) -> list[str]:
        return [f"{line}: {kind} x{count}" for (kind, line), count in self.errors.items()]

    @property
    def touched_bytes(self) -> int:
        """Distinct sectors of each launch, in bytes; an atomic reads and writes."""
        return self._bytes + SECTOR * sum(
            int(t.sectors["ld"].sum() + t.sectors["st"].sum() + 2 * t.sectors["atom"].sum())
            for t in self._tracked
        )

    def start(self, kernel: str, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """A launch: each one's sectors count anew."""
        self._bytes = self.touched_bytes
        self.launches.append(kernel)
        self._start(tensors)

    def _start(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        merged: list[list[Any]] = []
        every = [(t.data_ptr(), t.numel(), t.element_size(), n) for n, t in tensors if t.numel()]
        for address, numel, each, name in sorted(every):
            size, granule = numel * each, min(2, each)
            if merged and address < merged[-1][0] + merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], address + size - merged[-1][0])
                merged[-1][3] = min(merged[-1][3], granule)
            else:
                merged.append([address, size, name, granule])
        self._tracked = [
            _Tracked(name, address, size, granule) for address, size, name, granule in merged
        ]
        # Which programs did an acquiring and releasing atomic at an address, and who came last.
        self._tickets: dict[int, set[int]] = defaultdict(set)
        self._after_all = _NOBODY
        self._starts = np.array([t.address for t in self._tracked] or [0], np.int64)
        self._ends = np.array([t.address + t.size for t in self._tracked] or [0], np.int64)

    def _check(self, pointers: Any, mask: Any, size: int, kind: str) -> Any:
        """Note one access; returns the mask of its good lanes."""
        address = pointers.astype(np.int64).ravel()
        good = np.broadcast_to(mask, pointers.shape).ravel().astype(bool)
        own = np.maximum(np.searchsorted(self._starts, address, "right") - 1, 0)
        bad = good & ((address < self._starts[own]) | (address + size > self._ends[own]))
        line = _where()
        if bad.any():
            self.errors[f"out-of-bounds {kind}", line] += int(bad.sum())
            good &= ~bad
        if (good & (address % size != 0)).any():
            self.errors["misaligned", line] += 1
        for i in np.unique(own[good]):
            tracked = self._tracked[i]
            offset = address[good & (own == i)] - tracked.address
            tracked.sectors[kind][(offset + tracked.phase) // SECTOR] = True
            self._race(tracked, offset, size, kind, line)
        return good.reshape(pointers.shape) if pointers.shape else good[0]

    def _race(self, tracked: _Tracked, offset: Any, size: int, kind: str, line: str) -> None:
        granule = tracked.granule
        at = (offset // granule)[:, None] + np.arange(max(1, size // granule))
        against = {"ld": ("st",), "st": ("ld", "st", "atom"), "atom": ("st",)}[kind]
        for other in against if self.program != self._after_all else ():
            who = tracked.program[other][at]
            if ((who != _NOBODY) & (who != self.program)).any():
                self.errors[f"race between programs ({kind} of {tracked.name})", line] += 1
        who = tracked.program[kind]
        who[at] = np.where((who[at] == _NOBODY) | (who[at] == self.program), self.program, _SEVERAL)
        if kind == "st" and len(np.unique(offset)) != len(offset):
            self.errors["two lanes of one store hit one element", line] += 1

    # The interpreter's primitives, by its names.

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        good = self._check(pointers, mask, np.dtype(dtype).itemsize, "ld")
        return self.original.load(pointers, good, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        good = self._check(pointers, mask, value.dtype.itemsize, "st")
        return self.original.store(pointers, value, good)

    def atomic_rmw(self, op: Any, pointers: Any, value: Any, mask: Any, sem: Any) -> Any:
        good = self._check(pointers, mask, value.dtype.itemsize, "atom")
        if sem.name == "ACQUIRE_RELEASE":
            for address in pointers.ravel()[np.ravel(good)].tolist():
                self._tickets[address].add(self.program)
                if len(self._tickets[address]) == self.programs:
                    self._after_all = self.program
        return self.original.atomic_rmw(op, pointers, value, good, sem)

    def atomic_cas(self, pointers: Any, compare: Any, value: Any, sem: Any) -> Any:
        everyone = np.ones(pointers.shape, bool)
        self._check(pointers, everyone, value.dtype.itemsize, "atom")
        return self.original.atomic_cas(pointers, compare, value, sem)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def _poison(pointers: Any) -> Any:
    """What a masked-off lane of a load without `other=` holds."""
    dtype = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty()))
    value = np.empty(pointers.data.shape, dtype)
    value.fill(np.nan if dtype.kind == "f" else np.array(0x5A5A5A5A5A5A5A5A).astype(dtype))
    return interpreter.TensorHandle(value, pointers.get_element_ty())


class _Nothing:
    def restore(self) -> None:
        pass


@contextlib.contextmanager
def guard(seed: int | None = None) -> Iterator[Guard]:
    """Launches inside are interpreted and watched, programs in an order drawn from `seed`."""
    watch = Guard(seed)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    saved = [
        (interpreter, "_interpreter"),
        (interpreter, "_patch_lang"),
        (executor, "_init_args_hst"),
        (builder, "create_masked_load"),
        (builder, "set_grid_dim"),
        (builder, "set_grid_idx"),
        (JITFunction, "run"),
        (JITFunction, "__call__"),
        (triton.knobs.runtime, "interpret"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name in saved]
    init_args, masked_load = executor._init_args_hst, builder.create_masked_load
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    order: dict[str, Any] = {}

    def watched_init(self: Any, arguments: Any, keywords: Any) -> Any:
        given, named = init_args(self, arguments, keywords)
        pairs = [*zip(self.arg_names, given, strict=False), *named.items(), *watch.visible]
        watch.start(self.fn.__name__, [(n, t) for n, t in pairs if isinstance(t, torch.Tensor)])
        return given, named

    def poisoned_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        return masked_load(
            self, pointers, mask, _poison(pointers) if other is None else other, *rest
        )

    def shuffled_dim(self: Any, x: int, y: int, z: int) -> Any:
        count = watch.programs = x * y * z
        order["shape"] = (x, y, z)
        order["of"] = (
            np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
        )
        return set_dim(self, x, y, z)

    def shuffled_index(self: Any, x: int, y: int, z: int) -> Any:
        _, ys, zs = order["shape"]
        watch.program = int(order["of"][(x * ys + y) * zs + z])
        return set_index(
            self, watch.program // (ys * zs), watch.program // zs % ys, watch.program % zs
        )

    functions: dict[Any, Any] = {}

    def interpreted(function: Any) -> Any:
        if function.fn not in functions:
            functions[function.fn] = interpreter.InterpretedFunction(function.fn)
        return functions[function.fn]

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        interpreted(self).run(*arguments, grid=grid, warmup=warmup, **keywords)

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return interpreted(self)(*arguments, **keywords)

    # Once for the block: the interpreter patches at each call of a device function, which is slow,
    # and does not undo it, which would spoil later compilations.
    language = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    scope = interpreter._patch_lang(language)
    interpreter._interpreter = watch
    interpreter._patch_lang = lambda fn: _Nothing()
    executor._init_args_hst, builder.create_masked_load = watched_init, poisoned_load
    builder.set_grid_dim, builder.set_grid_idx = shuffled_dim, shuffled_index
    JITFunction.run, JITFunction.__call__ = run, call
    triton.knobs.runtime.interpret = True
    try:
        yield watch
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        scope.restore()
