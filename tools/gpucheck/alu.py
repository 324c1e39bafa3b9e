"""What PTX's arithmetic instructions compute, as functions of numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpucheck.parse import NUMPY, UNSIGNED, Instruction, size_of

Array = Any
#: The function, and the PTX type in which it takes each source operand.
Lowered = tuple[Callable[..., Array], list[str]]

_FLOATS = ("f16", "f32", "f64", "bf16", "f16x2", "bf16x2")
_HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def bits(ptx_type: str) -> int:
    return 8 * size_of(ptx_type)


def bfloat16(x: Array) -> Array:
    """float to bfloat16 bits, nearest even, NaN to 0x7fff, as `cvt.rn.bf16.f32` does."""
    u = x.astype(np.float32).view(np.uint32)
    r = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), r.astype(np.uint16))


def lower(ins: Instruction) -> Lowered | None:
    """How to compute a register from registers, or None if `ins` is no arithmetic."""
    kind = ins.types[-1] if ins.types else ""
    if kind in _HALVES and ins.name in _HALF:
        return _half(ins, kind)
    if kind in ("s16x2", "u16x2"):
        return _pair(ins, kind)
    make = _TABLE.get(ins.name)
    return make(ins, kind) if make else None


def _binary(ins: Instruction, kind: str) -> Lowered:
    if "cc" in ins.opcode:
        raise NotImplementedError(ins.text)
    return _BINARY[ins.name, kind in _FLOATS and "NaN" not in ins.opcode], [kind, kind]


_BINARY = {}
for _name, _plain, _float in (
    ("add", np.add, np.add),
    ("sub", np.subtract, np.subtract),
    ("min", np.minimum, np.fmin),
    ("max", np.maximum, np.fmax),
    ("and", np.bitwise_and, np.bitwise_and),
    ("or", np.bitwise_or, np.bitwise_or),
    ("xor", np.bitwise_xor, np.bitwise_xor),
):
    _BINARY[_name, False], _BINARY[_name, True] = _plain, _float

_HALF: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": lambda a, b, c: a * b + c,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
}


def _half(ins: Instruction, kind: str) -> Lowered:
    """16-bit floating point, one or two to a register, by way of float64 (exact but for fma)."""
    brain, lanes = kind.startswith("b"), 2 if kind.endswith("x2") else 1

    def decode(u: Array) -> Array:
        if brain:
            return (u.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        return u.astype(np.uint16).view(np.float16).astype(np.float64)

    def encode(x: Array) -> Array:
        return bfloat16(x) if brain else x.astype(np.float16).view(np.uint16)

    def compute(*sources: Array) -> Array:
        out = []
        for lane in range(lanes):
            shift = [(s >> s.dtype.type(16 * lane)) & s.dtype.type(0xFFFF) for s in sources]
            out.append(encode(_HALF[ins.name](*map(decode, shift))))
        if lanes == 1:
            return out[0]
        return out[0].astype(np.uint32) | (out[1].astype(np.uint32) << np.uint32(16))

    return compute, ["b32" if lanes == 2 else "b16"] * (len(ins.operands) - 1)


def _pair(ins: Instruction, kind: str) -> Lowered:
    """Two 16-bit integers to a register."""
    function, half = _BINARY[ins.name, False], np.dtype(kind[0].replace("s", "i") + "2")

    def compute(*sources: Array) -> Array:
        low, high = (
            function(*((s >> np.uint32(by)).astype(np.uint16).view(half) for s in sources))
            for by in (0, 16)
        )
        return low.view(np.uint16) | (high.view(np.uint16).astype(np.uint32) << np.uint32(16))

    return compute, [kind, kind]


def _multiply(ins: Instruction, kind: str) -> Lowered:
    count = len(ins.operands) - 1
    if kind in _FLOATS:
        if count == 2:
            return np.multiply, [kind] * 2
        wide = np.longdouble if kind == "f64" else np.float64
        return lambda a, b, c: (a.astype(wide) * b + c).astype(NUMPY[kind]), [kind] * 3
    mode = next((m for m in ("wide", "hi") if m in ins.opcode), "lo")
    double = (
        np.dtype(("i" if kind[0] == "s" else "u") + str(2 * size_of(kind)))
        if (bits(kind) < 64)
        else None
    )

    def product(a: Array, b: Array) -> Array:
        if mode == "lo":
            return a * b
        if double is None:  # the high half of 64 x 64 bits
            high = [((int(x) * int(y)) >> 64) & (2**64 - 1) for x, y in np.broadcast(a, b)]
            return np.array(high, np.uint64).view(NUMPY[kind])
        wide = a.astype(double) * b.astype(double)
        return wide if mode == "wide" else (wide >> double.type(bits(kind))).astype(NUMPY[kind])

    if count == 2:
        return product, [kind] * 2
    third = kind[0] + str(2 * bits(kind)) if mode == "wide" else kind
    return lambda a, b, c: product(a, b) + c, [kind, kind, third]


def _divide(ins: Instruction, kind: str) -> Lowered:
    if kind in _FLOATS:
        return np.divide, [kind] * 2

    def quotient(a: Array, b: Array) -> Array:
        safe = np.where(b == 0, b.dtype.type(1), b)
        if kind[0] == "s":
            x, y = a.astype(np.int64), safe.astype(np.int64)
            q = np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)
        else:
            q = a // safe
        return (q if ins.name == "div" else a - q * safe).astype(NUMPY[kind])

    return quotient, [kind] * 2


def _function(ins: Instruction, kind: str) -> Lowered:
    f: Callable[[Array], Array] = {
        "sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "rcp": lambda x: 1 / x,
        "ex2": np.exp2,
        "lg2": np.log2,
    }[ins.name]
    return lambda x: f(x).astype(NUMPY[kind]), [kind]


def _shift(ins: Instruction, kind: str) -> Lowered:
    width = bits(kind)

    def shift(a: Array, b: Array) -> Array:
        by = np.minimum(b, width - 1).astype(a.dtype)
        if ins.name == "shr" and kind[0] == "s":
            return a >> by
        return np.where(b >= width, a.dtype.type(0), a << by if ins.name == "shl" else a >> by)

    return shift, [kind, "u32"]


def _funnel(ins: Instruction, kind: str) -> Lowered:
    def funnel(a: Array, b: Array, c: Array) -> Array:
        by = (c & 31 if "wrap" in ins.opcode else np.minimum(c, 32)).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        out = (both << by) >> np.uint64(32) if "l" in ins.opcode else both >> by
        return out.astype(np.uint32)

    return funnel, ["b32", "b32", "u32"]


def _extract(ins: Instruction, kind: str) -> Lowered:
    width = bits(kind)

    def extract(a: Array, b: Array, c: Array) -> Array:
        at, count = np.minimum(b & 255, width), np.minimum(c & 255, width)
        if width == 64 and (at == 64).any():
            raise NotImplementedError(ins.text)
        ones = np.where(
            count >= 64, ~np.uint64(0), (np.uint64(1) << (count % 64).astype(np.uint64)) - 1
        ).astype(np.uint64)
        field = (a.view(UNSIGNED[width // 8]).astype(np.uint64) >> at.astype(np.uint64)) & ones
        if kind[0] == "s":
            top = np.minimum(at + count - 1, width - 1).astype(np.uint64)
            sign = (a.view(UNSIGNED[width // 8]).astype(np.uint64) >> top) & np.uint64(1)
            field = np.where((sign != 0) & (count > 0), field | ~ones, field)
        return field.astype(UNSIGNED[width // 8])

    return extract, [kind, "u32", "u32"]


def _insert(ins: Instruction, kind: str) -> Lowered:
    def insert(a: Array, b: Array, c: Array, d: Array) -> Array:
        ones = (np.uint64(1) << np.minimum(d, 32).astype(np.uint64)) - np.uint64(1)
        field = (ones << c.astype(np.uint64)).astype(np.uint32)
        return ((a << c) & field) | (b & ~field)

    return insert, ["b32", "b32", "u32", "u32"]


def _count(ins: Instruction, kind: str) -> Lowered:
    width = bits(kind)

    def unpacked(a: Array) -> Array:  # most significant bit first
        by = np.ascontiguousarray(a.view(UNSIGNED[width // 8]))
        return np.unpackbits(by.view(np.uint8).reshape(len(by), -1)[:, ::-1], axis=1)

    def count(a: Array) -> Array:
        found = unpacked(a)
        if ins.name == "popc":
            return found.sum(1).astype(np.uint32)
        if ins.name == "brev":
            reverse = np.packbits(found[:, ::-1], axis=1)[:, ::-1]
            return reverse.copy().view(UNSIGNED[width // 8]).ravel()
        leading = np.where(found.any(1), found.argmax(1), width)
        if ins.name == "clz":
            return leading.astype(np.uint32)
        return np.where(leading == width, 0xFFFFFFFF, width - 1 - leading).astype(np.uint32)

    return count, [kind]


def _permute(ins: Instruction, kind: str) -> Lowered:
    def permute(a: Array, b: Array, c: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        out = np.zeros(both.shape, np.uint64)
        for i in range(4):
            code = ((c >> np.uint32(4 * i)) & np.uint32(15)).astype(np.uint64)
            byte = (both >> ((code & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            out |= np.where(code & np.uint64(8), sign, byte) << np.uint64(8 * i)
        return out.astype(np.uint32)

    return permute, ["b32"] * 3


def _lop3(ins: Instruction, kind: str) -> Lowered:
    table = int(ins.operands[4], 0)

    def logic(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    return logic, ["b32"] * 3


def _convert(ins: Instruction, kind: str) -> Lowered:
    to, source = ins.types[0], ins.types[-1]

    def read(x: Array) -> Array:
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32) if source == "bf16" else x

    if to in ("bf16x2", "f16x2"):
        half = bfloat16 if to == "bf16x2" else (lambda x: x.astype(np.float16).view(np.uint16))
        return (
            lambda a, b: (half(a).astype(np.uint32) << np.uint32(16)) | half(b).astype(np.uint32)
        ), [source, source]

    def convert(x: Array) -> Array:
        x = read(x)
        if to == "bf16":
            return bfloat16(x)
        if x.dtype.kind == "f":
            return _convert_float(ins, to, x)
        if "sat" in ins.opcode:
            limits = np.iinfo(NUMPY[to])
            return np.clip(x.astype(np.int64), limits.min, limits.max).astype(NUMPY[to])
        return x.astype(NUMPY[to])

    return convert, [source]


def _convert_float(ins: Instruction, to: str, x: Array) -> Array:
    for mode, rounded in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        if mode in ins.opcode:
            x = rounded(x)
    if to[0] not in "us":
        return np.clip(x, 0, 1).astype(NUMPY[to]) if "sat" in ins.opcode else x.astype(NUMPY[to])
    limits = np.iinfo(NUMPY[to])
    x = np.nan_to_num(x.astype(np.float64), nan=0.0)
    inside = np.where((x >= limits.max) | (x <= limits.min), 0, x).astype(NUMPY[to])
    low, high = NUMPY[to](limits.min), NUMPY[to](limits.max)
    return np.where(x >= limits.max, high, np.where(x <= limits.min, low, inside))


def _unary(ins: Instruction, kind: str) -> Lowered:
    return {"not": np.invert, "neg": np.negative, "abs": np.abs}[ins.name], [kind]


def _select(ins: Instruction, kind: str) -> Lowered:
    return lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"]


_TABLE: dict[str, Callable[[Instruction, str], Lowered]] = {
    **dict.fromkeys(("add", "sub", "min", "max", "and", "or", "xor"), _binary),
    **dict.fromkeys(("mul", "mad", "fma"), _multiply),
    **dict.fromkeys(("div", "rem"), _divide),
    **dict.fromkeys(("sqrt", "rsqrt", "rcp", "ex2", "lg2"), _function),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), _count),
    **dict.fromkeys(("not", "neg", "abs"), _unary),
    "shf": _funnel,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _lop3,
    "cvt": _convert,
    "selp": _select,
}

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(ins: Instruction) -> Callable[[Array, Array], Array]:
    """The comparison of `setp`, ordered or (with a u) unordered."""
    how, is_float = ins.opcode[1], ins.types[-1] in _FLOATS

    def run(x: Array, y: Array) -> Array:
        if not is_float:
            return _COMPARE[how](x, y)
        unordered = np.isnan(x) | np.isnan(y)
        if how in ("num", "nan"):
            return ~unordered if how == "num" else unordered
        if how in _COMPARE:
            return _COMPARE[how](x, y) & ~unordered
        return _COMPARE[how[:-1]](x, y) | unordered

    return run
