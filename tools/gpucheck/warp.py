"""Instructions by which the lanes of a warp exchange values, and matrix moves to shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpucheck.memory import Array
from gpucheck.parse import Instruction

Run = Callable[[Array | None], None]


def _shuffle(emulator: Any, ins: Instruction) -> Run:
    puts = [emulator.put(name) for name in ins.operands[0].split("|")]
    value, by, control = (
        emulator.get(o, t) for o, t in zip(ins.operands[1:4], ("b32", "u32", "u32"), strict=True)
    )
    mode = ins.opcode[2]
    every = np.arange(emulator.lanes)
    lane = every % 32

    def run(mask: Array | None) -> None:
        step, code = by().astype(np.int64) & 31, control().astype(np.int64)
        clamp, segment = code & 31, (code >> 8) & 31
        high, low = (lane & segment) | (clamp & ~segment), lane & segment
        source = {
            "up": lane - step,
            "down": lane + step,
            "bfly": lane ^ step,
            "idx": low | (step & ~segment),
        }[mode]
        valid = source >= high if mode == "up" else source <= high
        source = every // 32 * 32 + np.where(valid, source, lane)
        if mask is not None:
            absent = mask & ~mask[source]
            if absent.any():
                emulator.memory.faults.add("shfl from an inactive lane", ins, int(absent.sum()))
        puts[0](np.broadcast_to(value(), (emulator.lanes,))[source], mask)
        if len(puts) > 1:
            puts[1](valid, mask)

    return run


def _by_warp(mask: Array | None, lanes: int) -> Array:
    return (np.ones(lanes, bool) if mask is None else mask).reshape(-1, 32)


def _reduce(emulator: Any, ins: Instruction) -> Run:
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[ins.opcode[2]]
    put, value = emulator.put(ins.operands[0]), emulator.get(ins.operands[1], ins.types[-1])

    def run(mask: Array | None) -> None:
        x = np.broadcast_to(value(), (emulator.lanes,)).reshape(-1, 32)
        limits = np.iinfo(x.dtype)
        neutral = {"and": ~x.dtype.type(0), "min": limits.max, "max": limits.min}.get(
            ins.opcode[2], 0
        )
        kept = np.where(_by_warp(mask, emulator.lanes), x, x.dtype.type(neutral))
        put(np.repeat(function.reduce(kept, axis=1, dtype=x.dtype), 32), mask)

    return run


def _vote(emulator: Any, ins: Instruction) -> Run:
    put, value = emulator.put(ins.operands[0]), emulator.get(ins.operands[1], "pred")

    def run(mask: Array | None) -> None:
        on = _by_warp(mask, emulator.lanes)
        x = np.broadcast_to(value(), (emulator.lanes,)).reshape(-1, 32)
        if "ballot" in ins.opcode:
            bit = np.uint64(1) << np.arange(32, dtype=np.uint64)
            out = ((x & on) * bit).sum(1).astype(np.uint32)
        else:
            out = (x | ~on).all(1) if "all" in ins.opcode else (x & on).any(1)
        put(np.repeat(out, 32), mask)

    return run


def _elect(emulator: Any, ins: Instruction) -> Run:
    lane_put, chosen = (emulator.put(name) for name in ins.operands[0].split("|"))

    def run(mask: Array | None) -> None:
        first = np.repeat(_by_warp(mask, emulator.lanes).argmax(1), 32)
        lane_put(first.astype(np.uint32), mask)
        chosen(np.arange(emulator.lanes) % 32 == first, mask)

    return run


def _matrix(emulator: Any, ins: Instruction) -> Run:
    """ldmatrix and stmatrix: 8 x 8 tiles of 16-bit elements, row addresses from 8 lanes each."""
    count = int(next(p for p in ins.opcode if p in ("x1", "x2", "x4"))[1:])
    transposed, store = "trans" in ins.opcode, ins.name == "stmatrix"
    where, names = ins.operands if store else ins.operands[::-1]
    address = emulator.address(where)
    registers = [name.strip() for name in names.strip("{} ").split(",")]
    every = np.arange(emulator.lanes)
    lane, first = every % 32, every // 32 * 32

    def places(rows: Array, tile: int) -> list[tuple[Array, np.dtype]]:
        if not transposed:
            row = rows[first + 8 * tile + lane // 4]
            return [(row + 4 * (lane % 4), np.dtype(np.uint32))]
        return [
            (rows[first + 8 * tile + 2 * (lane % 4) + k] + 2 * (lane // 4), np.dtype(np.uint16))
            for k in (0, 1)
        ]

    def run(mask: Array | None) -> None:
        rows, memory = address(), emulator.memory
        for tile, register in zip(range(count), registers, strict=True):
            if store:
                value = emulator.get(register, "b32")()
                for k, (at, dtype) in enumerate(places(rows, tile)):
                    part = (value >> np.uint32(16 * k)).astype(dtype) if transposed else value
                    memory.store(at, mask, [part], dtype, ins, "shared")
                continue
            value = np.zeros(emulator.lanes, np.uint32)
            for k, (at, dtype) in enumerate(places(rows, tile)):
                part = memory.load(at, mask, dtype, 1, ins, "shared")[0][0]
                value |= part.astype(np.uint32) << np.uint32(16 * k)
            emulator.put(register)(value, mask)

    return run


TABLE: dict[str, Callable[[Any, Instruction], Run]] = {
    "shfl": _shuffle,
    "redux": _reduce,
    "vote": _vote,
    "elect": _elect,
    "ldmatrix": _matrix,
    "stmatrix": _matrix,
}
