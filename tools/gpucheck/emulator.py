"""Executes compiled PTX on the CPU, all lanes of several blocks at once in numpy.

What it notices: out-of-bounds and misaligned accesses, races in global and shared memory, blocks
that diverge at a barrier or deadlock, loops that never end. What it counts: requested sectors by
source line, distinct sectors by tensor, bank conflicts. What it cannot show: time, bandwidth, the
ordering of a weak memory model, the driver.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpucheck import alu, warp
from gpucheck.memory import SECTOR, Array, Memory
from gpucheck.operands import Operands
from gpucheck.parse import NUMPY, UNSIGNED, Instruction, Program, parse, register_dtype, size_of

Run = Callable[[Array | None], None]

_MAX_STEPS = 20_000_000
#: Backward branches without any thread's exit before the launch counts as hung.
_MAX_SPINS = 5_000
_NOTHING = ("membar", "fence", "nanosleep", "griddepcontrol", "prefetch", "discard", "cp")


@dataclass
class Report:
    """One launch: faults, and what moved."""

    kernel: str
    grid: tuple[int, ...]
    faults: dict[tuple[str, int], list[Any]]
    #: Distinct 32-byte sectors of each tensor, by "ld", "st", "atom".
    sectors: dict[str, dict[str, int]]
    #: Counters by (place in the source, kind, space).
    stats: dict[tuple[str, str, str], Counter[str]]
    metadata: Any = None

    @property
    def touched_bytes(self) -> int:
        """Memory traffic if every sector moves once; an atomic reads and writes."""
        return SECTOR * sum(s["ld"] + s["st"] + 2 * s["atom"] for s in self.sectors.values())

    @property
    def requested_bytes(self) -> int:
        """Sectors that warps asked for, each request's counted once."""
        return SECTOR * sum(
            c["sectors"] for (_, kind, space), c in self.stats.items() if space == "global"
        )


class Emulator(Operands):
    """A kernel, ready to run. `blocks` run side by side; more find more races between blocks."""

    def __init__(self, ptx: str, blocks: int = 8) -> None:
        self.resident = blocks
        self.load(ptx)

    def load(self, ptx: str) -> None:
        """Take another text of the same kernel, as with a barrier dropped."""
        self.ptx = ptx
        self.program: Program = parse(ptx)
        self.threads = int(np.prod(self.program.threads))
        self.index = {name: i for i, name in enumerate(self.program.registers)}
        self.built_for = -1
        #: Barriers that some block came to, by their number in the text.
        self.reached: set[int] = set()
        self._barriers = [i for i, ins in enumerate(self.program.code) if ins.is_barrier]

    def run(
        self,
        grid: Sequence[int],
        arguments: Sequence[Any],
        names: Sequence[str],
        *,
        visible: Sequence[tuple[str, torch.Tensor]] = (),
        shared_bytes: int = 0,
        check_races: bool = True,
        seed: int | None = None,
        only: Sequence[int] | None = None,
    ) -> Report:
        """Run every block, in an order drawn from `seed`; tensors receive what was written.

        `visible` tensors are reached by addresses, in memory or given as integers; arguments beyond
        those given are null. `only`: run these blocks of the grid.
        """
        self.grid = tuple(grid) + (1,) * (3 - len(grid))
        self.rng = None if seed is None else np.random.default_rng(seed)
        tensors = [
            (n, a) for n, a in zip(names, arguments, strict=True) if isinstance(a, torch.Tensor)
        ]
        self.memory = Memory([*tensors, *visible], check_races)
        self.constants = {}
        for i, (name, _) in enumerate(self.program.params):
            value = arguments[i] if i < len(arguments) else 0
            if isinstance(value, torch.Tensor):
                value = value.data_ptr()
            elif isinstance(value, float):
                value = struct.unpack("<I", struct.pack("<f", value))[0]
            self.constants[name] = int(value)
        self.steps = 0
        order = np.arange(np.prod(self.grid)) if only is None else np.array(only)
        self.memory.grid_blocks = len(order)
        if self.rng is not None:
            order = self.rng.permutation(order)
        for start in range(0, len(order), self.resident):
            self._run_blocks(order[start : start + self.resident], shared_bytes)
        self.memory.write_back()
        return Report(
            self.program.name,
            self.grid,
            self.memory.faults.found,
            self.memory.sectors(),
            self.memory.accesses(),
        )

    # -- translation -----------------------------------------------------------------------------

    def _build(self, ins: Instruction) -> Run | None:
        """The closure that executes `ins` under a mask; None for control flow."""
        if ins.name in ("bra", "ret", "exit", "trap") or ins.is_barrier:
            return None
        lowered = alu.lower(ins)
        if lowered is not None:
            return self._pure(ins, *lowered)
        if ins.name in ("setp", "set"):
            return self._setp(ins)
        if ins.name in ("mov", "cvta"):
            return self._move(ins)
        if ins.name in ("ld", "ldu", "st"):
            return self._load_store(ins)
        if ins.name in ("atom", "red"):
            return self._atomic(ins)
        if ins.name in warp.TABLE:
            return warp.TABLE[ins.name](self, ins)
        if ins.name in _NOTHING and not (ins.name == "cp" and ins.operands[0].startswith("[")):
            return lambda mask: None
        if ins.name in ("bar", "barrier"):  # bar.warp.sync: lanes run in step
            return lambda mask: None
        raise NotImplementedError(ins.text)

    def _pure(self, ins: Instruction, function: Any, types: list[str]) -> Run:
        sources = [self.get(o, t) for o, t in zip(ins.operands[1:], types, strict=False)]
        put = self.put(ins.operands[0])

        def run(mask: Array | None) -> None:
            with np.errstate(all="ignore"):
                put(function(*[source() for source in sources]), mask)

        return run

    def _setp(self, ins: Instruction) -> Run:
        compare, kind = alu.compare(ins), ins.types[-1]
        a, b = self.get(ins.operands[1], kind), self.get(ins.operands[2], kind)
        joined = next((alu.COMBINE[p] for p in ins.opcode[2:] if p in alu.COMBINE), None)
        other = self.get(ins.operands[3], "pred") if joined else None
        if ins.name == "set":
            raise NotImplementedError(ins.text)
        puts = [self.put(name) for name in ins.operands[0].split("|")]

        def run(mask: Array | None) -> None:
            yes = np.broadcast_to(compare(a(), b()), (self.lanes,))
            both = [yes, ~yes]
            for put, value in zip(puts, both, strict=False):
                put(joined(value, other()) if joined and other else value, mask)

        return run

    def _move(self, ins: Instruction) -> Run:
        kind, to, source = ins.types[-1], *ins.operands
        if to.startswith("{"):
            puts = [self.put(name.strip()) for name in to[1:-1].split(",")]
            width = alu.bits(kind) // len(puts)
            get = self.get(source, kind)

            def unpack(mask: Array | None) -> None:
                value = get().astype(np.uint64)
                for k, put in enumerate(puts):
                    part = (value >> np.uint64(k * width)) & np.uint64(2**width - 1)
                    put(part.astype(UNSIGNED[width // 8]), mask)

            return unpack
        if source.startswith("{"):
            names = [name.strip() for name in source[1:-1].split(",")]
            width = alu.bits(kind) // len(names)
            gets = [self.get(name, f"b{width}") for name in names]
            put = self.put(to)

            def pack(mask: Array | None) -> None:
                value = np.zeros(self.lanes, np.uint64)
                for k, get in enumerate(gets):
                    value |= get().astype(np.uint64) << np.uint64(k * width)
                put(value.astype(UNSIGNED[alu.bits(kind) // 8]), mask)

            return pack
        return self._pure(ins, lambda a: a, [kind])

    def _load_store(self, ins: Instruction) -> Run:
        kind = ins.types[-1]
        space = next((s for s in ("shared", "param", "local") if s in ins.opcode), "global")
        dtype = np.dtype(UNSIGNED[size_of(kind)])
        to, source = ins.operands
        if space == "param":
            value = self.constants_slot(source, kind)
            put_constant = self.put(to.strip("{} "))
            return lambda mask: put_constant(value(), mask)
        names = [n.strip() for n in (source if ins.name == "st" else to).strip("{} ").split(",")]
        address = self.address(to if ins.name == "st" else source)
        if space == "local":
            return self._local(ins, address, names, dtype)
        if ins.name == "st":
            gets = [self.get(name, f"b{8 * dtype.itemsize}") for name in names]
            return lambda mask: self.memory.store(
                address(), mask, [get() for get in gets], dtype, ins, space
            )
        puts = [self.put(name) for name in names]
        signed = np.dtype(NUMPY[kind]) if kind in ("s8", "s16", "s32") else dtype

        def load(mask: Array | None) -> None:
            values, good = self.memory.load(address(), mask, dtype, len(names), ins, space)
            for put, value in zip(puts, values, strict=True):
                put(value.view(signed), good)

        return load

    def _local(self, ins: Instruction, address: Any, names: list[str], dtype: np.dtype) -> Run:
        if ins.name == "st":
            gets = [self.get(name, f"b{8 * dtype.itemsize}") for name in names]
        else:
            puts = [self.put(name) for name in names]

        def run(mask: Array | None) -> None:
            cells = self.local.view(dtype)
            on = np.ones(self.lanes, bool) if mask is None else mask
            at = (address() + np.arange(self.lanes) * self.program.local_bytes) // dtype.itemsize
            for k in range(len(names)):
                if ins.name == "st":
                    cells[at[on] + k] = np.broadcast_to(gets[k](), (self.lanes,)).view(dtype)[on]
                else:
                    puts[k](cells[np.where(on, at + k, 0)], mask)

        return run

    def _atomic(self, ins: Instruction) -> Run:
        space = "shared" if "shared" in ins.opcode else "global"
        op = next(
            p
            for p in ins.opcode[1:]
            if p in ("add", "exch", "cas", "min", "max", "and", "or", "xor")
        )
        kind = ins.types[-1]
        dtype = np.dtype(NUMPY[kind])
        where, *sources = ins.operands if ins.name == "red" else ins.operands[1:]
        if any(source.startswith("{") for source in sources):
            raise NotImplementedError(ins.text)
        address, gets = self.address(where), [self.get(source, kind) for source in sources]
        fetch = ins.name == "atom" and ins.operands[0] != "_"
        put = self.put(ins.operands[0]) if fetch else None

        def run(mask: Array | None) -> None:
            with np.errstate(over="ignore"):
                values = [get() for get in gets]
                old, good = self.memory.atomic(
                    address(), mask, op, dtype, values, fetch, self.rng, ins, space
                )
            if put:
                put(old, good)

        return run

    # -- execution -------------------------------------------------------------------------------

    def _run_blocks(self, blocks: np.ndarray, shared_bytes: int) -> None:
        program = self.program
        self.blocks = blocks
        self.lanes = len(blocks) * self.threads
        self.memory.start_blocks(blocks, self.threads, program.shared_bytes + shared_bytes)
        self.local = np.zeros(max(16, program.local_bytes * self.lanes), np.uint8)
        fresh = [np.zeros(self.lanes, register_dtype(t)) for t in program.registers.values()]
        if self.built_for == self.lanes:
            self.registers[:] = fresh
        else:
            self.registers = fresh
            self.code = [self._build(ins) for ins in program.code]
            self.built_for = self.lanes
        # Threads that stand at one instruction run together: program counter to mask.
        groups: dict[int, Array] = {0: np.ones(self.lanes, bool)}
        waiting: dict[int, Array] = {}
        live = np.ones(self.lanes, bool)
        self.spins = turn = 0
        while groups or waiting:
            if not groups:
                at = program.code[next(iter(waiting))]
                stuck = sum(int(m.sum()) for m in waiting.values())
                self.memory.faults.add("barrier deadlock", at, stuck)
                return
            counters = sorted(groups)
            # The group furthest back goes first, so that threads meet again. A spinning group
            # would starve those it waits for: every now and then all have a turn.
            fair = self.spins % 64 > 56
            turn += fair
            pick = counters[turn % len(counters) if fair else 0]
            if not self._advance(pick, groups, waiting, live):
                return

    def _advance(
        self, counter: int, groups: dict[int, Array], waiting: dict[int, Array], live: Array
    ) -> bool:
        """Run one group until it branches, waits, ends or meets another."""

        def join(at: int, who: Array) -> None:
            if who.any():
                groups[at] = groups[at] | who if at in groups else who.copy()

        mask = groups.pop(counter)
        everyone = bool(mask.all())
        while True:
            ins = self.program.code[counter]
            self.steps += 1
            if self.steps > _MAX_STEPS or self.spins > _MAX_SPINS:
                self.memory.faults.add("livelock: a wait that never ends", ins, int(mask.sum()))
                return False
            active = None if everyone else mask
            if ins.predicate:
                predicate = self.registers[self.index[ins.predicate]]
                predicate = ~predicate if ins.negated else predicate
                active = predicate if active is None else mask & predicate
            taken = mask if active is None else active
            if ins.name == "bra":
                target = self.program.labels[ins.operands[0]]
                self.spins += target <= counter
                join(target, taken)
                if ins.predicate:
                    join(counter + 1, mask & ~taken)
                return True
            if ins.name in ("ret", "exit", "trap"):
                if ins.name == "trap" and taken.any():
                    self.memory.faults.add("trap", ins, int(taken.sum()))
                live &= ~taken
                join(counter + 1, mask & ~taken)
                self._release(groups, waiting, live)
                self.spins = 0
                return True
            if ins.is_barrier:
                self.reached.add(self._barriers.index(counter))
                waiting[counter] = waiting.get(counter, np.zeros(self.lanes, bool)) | mask
                self._release(groups, waiting, live)
                return True
            if active is None or active.any():
                self.code[counter](active)  # type: ignore[misc]
            counter += 1
            if counter in groups or (groups and counter > min(groups)):
                join(counter, mask)
                return True

    def _release(self, groups: dict[int, Array], waiting: dict[int, Array], live: Array) -> None:
        """Let the blocks go on whose live threads all wait."""
        if not waiting:
            return
        arrived = np.logical_or.reduce(list(waiting.values()))
        shape = (len(self.blocks), self.threads)
        ready = (arrived | ~live).reshape(shape).all(1) & arrived.reshape(shape).any(1)
        if not ready.any():
            return
        barriers = sum(m.reshape(shape).any(1).astype(int) for m in waiting.values())
        if (barriers[ready] > 1).any():
            at = self.program.code[next(iter(waiting))]
            self.memory.faults.add("barrier divergence", at, int((barriers[ready] > 1).sum()))
        lanes = np.repeat(ready, self.threads)
        self.memory.epoch[lanes] += 1
        for counter in list(waiting):
            gone = waiting[counter] & lanes
            if gone.any():
                groups[counter + 1] = groups[counter + 1] | gone if counter + 1 in groups else gone
            waiting[counter] = waiting[counter] & ~lanes
            if not waiting[counter].any():
                del waiting[counter]
