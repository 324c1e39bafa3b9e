"""PTX text to a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

#: numpy type in which an operand of a PTX type is computed.
NUMPY = {
    "u8": np.uint8,
    "s8": np.int8,
    "b8": np.uint8,
    "u16": np.uint16,
    "s16": np.int16,
    "b16": np.uint16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "bf16": np.uint16,
    "f16": np.float16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "s16x2": np.uint32,
    "u16x2": np.uint32,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}
#: Unsigned integer of a size in bytes.
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def size_of(ptx_type: str) -> int:
    """Bytes of a PTX type."""
    return np.dtype(NUMPY[ptx_type]).itemsize


def register_dtype(ptx_type: str) -> np.dtype:
    """Registers hold bits: unsigned integers of the type's size, at least 16 bits wide."""
    if ptx_type == "pred":
        return np.dtype(np.bool_)
    return np.dtype(UNSIGNED[max(2, size_of(ptx_type))])


@dataclass(frozen=True)
class Instruction:
    """`@predicate opcode operands;`, with the source line that `.loc` gave it."""

    predicate: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    line: int
    text: str
    #: Where in the source, and where what holds it was inlined.
    place: str = ""

    @property
    def name(self) -> str:
        return self.opcode[0]

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(part for part in self.opcode[1:] if part in NUMPY)

    @property
    def is_barrier(self) -> bool:
        return self.name in ("bar", "barrier") and "warp" not in self.opcode


@dataclass
class Program:
    """One kernel: parameters in order, registers by name, instructions, labels."""

    name: str
    params: list[tuple[str, str]]
    threads: tuple[int, int, int]
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def split_operands(text: str) -> list[str]:
    """Split at the commas that no bracket or brace encloses."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def parse(ptx: str) -> Program:
    """The only kernel of `ptx`. SyntaxError names a statement that is not understood."""
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\{(.*)\n\}", ptx, re.S)
    if entry is None:
        raise SyntaxError("ptx: expected an .entry, found none")
    name, params, directives, body = entry.groups()
    threads = re.search(
        r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives
    )
    if threads is None:
        raise SyntaxError(f"{name}: expected .reqntid or .maxntid, found neither")
    x, y, z = (int(n or 1) for n in threads.groups())
    program = Program(name, [_parameter(p) for p in split_operands(params)], (x, y, z))
    for found in re.finditer(
        r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[(\d*)\])?\s*;", ptx
    ):
        align, kind, symbol, is_array, count = found.groups()
        at = -(-program.shared_bytes // int(align or 8)) * int(align or 8)
        program.shared[symbol] = at
        program.shared_bytes = at + (int(count or 0) if is_array else 1) * size_of(kind)
    _parse_body(re.sub(r"/\*.*?\*/", "", body, flags=re.S), program)
    return program


def _parameter(text: str) -> tuple[str, str]:
    kind = re.search(r"\.param\s+\.(?:align\s+\d+\s+\.)?(\w+)", text)
    symbol = re.search(r"([\w$]+)(?:\[\d+\])?$", text)
    if kind is None or symbol is None:
        raise SyntaxError(text)
    return symbol[1], kind[1]


def _parse_body(body: str, program: Program) -> None:
    line, place, pending = 0, "", ""
    for raw in body.split("\n"):
        text, _, comment = (part.strip() for part in raw.partition("//"))
        if text.startswith(".loc"):
            line = int(text.split()[2])
            place = re.sub(r":(\d+):\d+", r":\1", comment)
            continue
        if text.startswith((".pragma", ".file", ".section")):
            continue
        while text:
            label = re.match(r"([\w$]+):\s*", text)
            if label and not pending:
                program.labels[label[1]] = len(program.code)
                text = text[label.end() :]
                continue
            if not pending and text[0] in "{}":  # scopes of inline assembly
                text = text[1:].strip()
                continue
            end = text.find(";")
            if end < 0:
                pending += " " + text
                break
            statement, text = (pending + " " + text[:end]).strip(), text[end + 1 :].strip()
            pending = ""
            if statement:
                _parse_statement(statement, line, place, program)


def _parse_statement(text: str, line: int, place: str, program: Program) -> None:
    if text.startswith(".reg"):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()  # type: ignore[union-attr]
        for name in split_operands(names):
            many = re.match(r"(%?[\w$]+)<(\d+)>", name)
            every = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            program.registers.update(dict.fromkeys(every, kind))
        return
    if text.startswith(".shared"):
        return
    if text.startswith(".local"):
        found = re.match(r"\.local\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)\[(\d+)\]", text)
        if found is None:
            raise SyntaxError(text)
        program.local[found[1]] = program.local_bytes
        program.local_bytes += -(-int(found[2]) // 16) * 16
        return
    found = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    if found is None:
        raise SyntaxError(text)
    negated, predicate, opcode, operands = found.groups()
    parts = tuple(opcode.replace("::cta", "").split("."))
    program.code.append(
        Instruction(
            predicate, bool(negated), parts, tuple(split_operands(operands)), line, text, place
        )
    )
