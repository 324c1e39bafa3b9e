"""What the kernels share: bits of words, floats as bits, and where survivors lie.

Values travel as integers of their size, so that copies keep every bit (NaN payloads too) and the
16-bit roundings are the ones that the reference defines, on any device and in the interpreter.

Pointers to words are not specialised on their alignment. If it is known, the compiler gives a
thread four neighbouring words, and where the mask then forbids one wide load it issues four narrow
ones, each touching every sector: four times the requests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT32 = tl.constexpr(0)
FLOAT16 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def raw(t: Tensor) -> Tensor:
    """The same memory as int32 or int16, flat."""
    return t.view(-1).view(torch.int32 if t.dtype == torch.float32 else torch.int16)


@triton.jit
def popcount(x):
    """Set bits of uint32, as int32. LLVM knows this form: one POPC."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_words(words, at, num_words):
    """Mask words as uint32, zero past the end."""
    w = tl.load(words + at, mask=at < num_words, other=0)
    return w.to(tl.uint32, bitcast=True)


@triton.jit
def exclusive(counts):
    """The sum of what comes before each element."""
    return tl.cumsum(counts, 0) - counts


@triton.jit
def widen(bits, KIND: tl.constexpr):
    """Bits of a value to float32."""
    if KIND == FLOAT32:
        x = bits.to(tl.float32, bitcast=True)
    elif KIND == BFLOAT16:
        x = (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        # cvt.f32.f16 forgets a NaN's sign and payload; the cpu backend keeps them.
        u = bits.to(tl.uint16, bitcast=True).to(tl.uint32)
        wide = bits.to(tl.float16, bitcast=True).to(tl.float32).to(tl.uint32, bitcast=True)
        nan = ((u & 0x8000) << 16) | 0x7F800000 | ((u & 0x3FF) << 13)
        x = tl.where((u & 0x7FFF) > 0x7C00, nan, wide).to(tl.float32, bitcast=True)
    return x


@triton.jit
def narrow(x, KIND: tl.constexpr):
    """float32 to the bits of a value: nearest, ties to even, NaN to the positive quiet one."""
    u = x.to(tl.uint32, bitcast=True)
    is_nan = (u & 0x7FFFFFFF) > 0x7F800000
    if KIND == FLOAT32:
        bits = u.to(tl.int32, bitcast=True)
    elif KIND == BFLOAT16:
        even = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        bits = tl.where(is_nan, 0x7FC0, even).to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        near = x.to(tl.float16).to(tl.uint16, bitcast=True)
        bits = tl.where(is_nan, 0x7E00, near.to(tl.uint32)).to(tl.uint16)
        bits = bits.to(tl.int16, bitcast=True)
    return bits


@triton.jit
def nonzero(x):
    """Whether a float64 scalar differs from zero. By integers: Triton's interpreter gives the
    result of a float comparison the operands' type, and then cannot combine it with masks."""
    return (x.to(tl.int64, bitcast=True) << 1) != 0


@triton.jit
def convert(bits, FROM: tl.constexpr, TO: tl.constexpr):
    """Bits of one kind to bits of another; a copy keeps every bit."""
    if FROM == TO:
        out = bits
    else:
        out = narrow(widen(bits, FROM), TO)
    return out


@triton.jit
def survivor(words, before, j, WORDS: tl.constexpr, STEPS: tl.constexpr):
    """Element of the tile that is its survivor number j: a binary search, then a select in a word.

    `before` counts the survivors before each of the tile's WORDS = 2**STEPS words. For j outside
    the tile the answer is some element of it.
    """
    word = tl.zeros_like(j)
    for i in tl.static_range(STEPS):
        half = WORDS >> (i + 1)
        word = tl.where(tl.gather(before, word + half, 0) <= j, word + half, word)
    bits = tl.gather(words, word, 0)
    left = j - tl.gather(before, word, 0)
    element = word * 32
    for i in tl.static_range(5):
        half = 16 >> i
        low = popcount(bits & ((1 << half) - 1))
        above = left >= low
        left = tl.where(above, left - low, left)
        bits = tl.where(above, bits >> half, bits)
        element = tl.where(above, element + half, element)
    return element


def block_of(*tensors: Tensor) -> tuple[int, int]:
    """Elements a program takes of flat streams, and its warps.

    Two accesses of 16 bytes per thread; one where the streams' widths differ, since a share by the
    narrowest would make its two accesses to the wider each touch all of the warp's sectors.
    One element where a stream starts at no multiple of 16 bytes, for the same reason.
    """
    warps, widths = 4, {t.element_size() for t in tensors}
    if any(t.data_ptr() % 16 for t in tensors):
        return 32 * warps, warps
    return 32 * warps * (16 // max(widths)) * (2 if len(widths) == 1 else 1), warps
