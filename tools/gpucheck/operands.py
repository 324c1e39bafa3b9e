"""Reading and writing the emulator's registers, special registers and addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from gpucheck.memory import Array, Memory
from gpucheck.parse import NUMPY, UNSIGNED, Program, register_dtype, size_of

Get = Callable[[], Array]
Put = Callable[[Array, Array | None], None]


class Operands:
    """What the emulator's instructions share: closures that get and put operands."""

    program: Program
    index: dict[str, int]
    registers: list[Array]
    constants: dict[str, int]
    memory: Memory
    blocks: np.ndarray
    grid: tuple[int, ...]
    lanes: int
    threads: int
    steps: int

    def get(self, operand: str, kind: str) -> Get:
        """Operand `operand` as an array (or 0-d) of `kind`."""
        dtype = np.dtype(NUMPY[kind])
        registers = self.registers
        if operand[:1] in "-!" and operand[1:] in self.index:
            inner = self.get(operand[1:], kind)
            return (lambda: -inner()) if operand[0] == "-" else (lambda: ~inner())
        if operand in self.index:
            i = self.index[operand]
            held = register_dtype(self.program.registers[operand])
            if kind == "pred":
                return lambda: registers[i]
            if dtype.itemsize == held.itemsize:
                return lambda: registers[i].view(dtype)
            return lambda: registers[i].astype(UNSIGNED[dtype.itemsize]).view(dtype)
        if operand.startswith("%"):
            return lambda: self._special(operand[1:]).astype(dtype)
        value = self._constant(operand, kind, dtype)
        return lambda: value

    def _constant(self, text: str, kind: str, dtype: np.dtype) -> Array:
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            value = np.array(int(text[2:], 16), np.uint32).view(np.float32)
            return value.view(dtype) if dtype.itemsize == 4 else value.astype(dtype)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return np.array(int(text[2:], 16), np.uint64).view(np.float64).view(dtype)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            number = int(text.rstrip("U"), 0)
            if kind == "pred":
                return np.array(number != 0)
            wrapped = number & (2 ** (8 * dtype.itemsize) - 1)
            return np.array(wrapped, UNSIGNED[dtype.itemsize]).view(dtype)
        if text in self.program.shared:
            return np.array(self.program.shared[text], UNSIGNED[dtype.itemsize]).view(dtype)
        if text in self.program.local:
            return np.array(self.program.local[text], UNSIGNED[dtype.itemsize]).view(dtype)
        raise NotImplementedError(f"operand {text}")

    def _special(self, name: str) -> Array:
        register, _, axis_name = name.partition(".")
        axis = "xyz".find(axis_name) if axis_name else 0
        thread = np.tile(np.arange(self.threads), len(self.blocks))
        shape = self.program.threads
        if register == "tid":
            steps = (1, shape[0], shape[0] * shape[1])
            return (thread // steps[axis] % shape[axis]).astype(np.uint32)
        if register == "ctaid":
            steps = (1, self.grid[0], self.grid[0] * self.grid[1])
            block = self.blocks // steps[axis] % self.grid[axis]
            return np.repeat(block, self.threads).astype(np.uint32)
        if register in ("ntid", "nctaid"):
            return np.full(
                self.lanes, (shape if register == "ntid" else self.grid)[axis], np.uint32
            )
        if register == "laneid":
            return (thread % 32).astype(np.uint32)
        raise NotImplementedError("%" + name)

    def put(self, operand: str) -> Put:
        """Write an array into register `operand`, in the lanes of a mask (None: in all)."""
        if operand == "_":
            return lambda value, mask: None
        i, registers, lanes = self.index[operand], self.registers, self.lanes
        held = register_dtype(self.program.registers[operand])

        def write(value: Array, mask: Array | None) -> None:
            value = _as_bits(np.asarray(value), held)
            if mask is not None:
                registers[i] = np.where(mask, value, registers[i])
            elif value.shape == (lanes,):
                registers[i] = value
            else:
                registers[i] = np.broadcast_to(value, (lanes,)).copy()

        return write

    def address(self, operand: str) -> Get:
        """`[register + offset]` or `[symbol + offset]` as int64."""
        found = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        if found is None:
            raise NotImplementedError(f"address {operand}")
        base, offset = found[1], int(found[2] or "0", 0)
        wide = base in self.index and size_of(self.program.registers[base]) == 8
        read = self.get(base, "u64" if wide else "u32")
        return lambda: np.broadcast_to(read().astype(np.int64) + offset, (self.lanes,))

    def constants_slot(self, operand: str, kind: str) -> Get:
        """A kernel parameter, read at run time: the closures outlive one launch."""
        found: Any = re.match(r"\[([\w$]+)", operand)
        size = size_of(kind)
        return lambda: np.array(self.constants[found[1]] & (2 ** (8 * size) - 1), UNSIGNED[size])


def _as_bits(value: Array, held: np.dtype) -> Array:
    """Bits for a register of type `held`; narrower signed integers are extended by sign."""
    if value.dtype == held:
        return value
    if value.dtype == np.bool_:
        return value.astype(held)
    if value.dtype.itemsize == held.itemsize:
        return value.view(held)
    if value.dtype.kind == "i":
        return value.astype(np.dtype(f"i{held.itemsize}")).view(held)
    return value.view(UNSIGNED[value.dtype.itemsize]).astype(held)
