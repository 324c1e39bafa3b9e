"""Gaussian noise from a counter: the method of ops/noise.py, a group of 256 elements a step."""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.triton_kernels._launch import cdiv, launch

_PAIRS = tl.constexpr(128)
_LOW = tl.constexpr(0xFFFFFFFF)
_MANTISSA = tl.constexpr((1 << 52) - 1)
_ONE = tl.constexpr(0x3FF << 52)
_MAGIC = tl.constexpr(0x433 << 52)
# Groups of a program.
_GROUPS = 4


@triton.jit
def _philox(a, b, c, d, seed):
    """Philox4x32-10 over uint64 that hold 32 bits each: two times 64 bits."""
    k0 = seed & _LOW
    k1 = seed >> 32
    for _ in tl.static_range(10):
        x = a * 0xD2511F53
        y = c * 0xCD9E8D57
        a = (y >> 32) ^ b ^ k0
        c = (x >> 32) ^ d ^ k1
        b = y & _LOW
        d = x & _LOW
        k0 = (k0 + 0x9E3779B9) & _LOW
        k1 = (k1 + 0xBB67AE85) & _LOW
    return a | (b << 32), c | (d << 32)


@triton.jit
def _mantissa(bits):
    """Numbers in [1, 2) of 52 bits."""
    return ((bits & _MANTISSA) | _ONE).to(tl.float64, bitcast=True)


@triton.jit
def _atanh(x):
    """atanh(sqrt(x)) / sqrt(x)."""
    p = x * (1.0 / 21) + 1.0 / 19
    p = p * x + 1.0 / 17
    p = p * x + 1.0 / 15
    p = p * x + 1.0 / 13
    p = p * x + 1.0 / 11
    p = p * x + 1.0 / 9
    p = p * x + 1.0 / 7
    p = p * x + 1.0 / 5
    p = p * x + 1.0 / 3
    return p * x + 1.0


@triton.jit
def _cosine(x):
    """cos(sqrt(x))."""
    p = x * (1.0 / 20922789888000) + (-1.0 / 87178291200)
    p = p * x + 1.0 / 479001600
    p = p * x + (-1.0 / 3628800)
    p = p * x + 1.0 / 40320
    p = p * x + (-1.0 / 720)
    p = p * x + 1.0 / 24
    p = p * x + (-1.0 / 2)
    return p * x + 1.0


@triton.jit
def _sine(x):
    """sin(sqrt(x)) / sqrt(x)."""
    p = x * (-1.0 / 1307674368000) + 1.0 / 6227020800
    p = p * x + (-1.0 / 39916800)
    p = p * x + 1.0 / 362880
    p = p * x + (-1.0 / 5040)
    p = p * x + 1.0 / 120
    p = p * x + (-1.0 / 6)
    return p * x + 1.0


@triton.jit
def _normals(pair, seed, stream):
    """Both normal numbers of each pair."""
    stream = stream + (pair - pair)
    first, second = _philox(pair & _LOW, pair >> 32, stream & _LOW, stream >> 32, seed)
    bits = (2.0 - _mantissa(first >> 12)).to(tl.uint64, bitcast=True)
    m = _mantissa(bits)
    upper = m > 1.4142135623730951
    k = ((bits >> 52) | _MAGIC).to(tl.float64, bitcast=True) - 4503599627371519.0
    k = tl.where(upper, k + 1.0, k)
    m = tl.where(upper, m * 0.5, m)
    s = (m - 1.0) / (m + 1.0)
    radius = tl.sqrt(-(k * 1.3862943611198906) - 4.0 * s * _atanh(s * s))
    angle = (_mantissa(second >> 10) - 1.5) * 1.5707963267948966
    square = angle * angle
    cosine = radius * _cosine(square)
    sine = radius * (angle * _sine(square))
    cosine = tl.where((second >> 63) == 1, -cosine, cosine)
    swap = ((second >> 62) & 1) == 1
    return tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)


@triton.jit
def _add(values, offsets, inside, noise, std):
    x = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float64)
    tl.store(values + offsets, (x + noise * std).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["std", "seed", "stream", "n"])
def _add_gaussian(values, std: tl.int64, seed: tl.int64, stream: tl.int64, n, GROUPS: tl.constexpr):
    """`std` is a float64 as bits: a float argument would arrive as float32."""
    by = std.to(tl.int64).to(tl.float64, bitcast=True)
    key = seed.to(tl.uint64)
    which = stream.to(tl.uint64)
    for part in range(GROUPS):
        group = tl.program_id(0).to(tl.int64) * GROUPS + part
        lane = tl.arange(0, _PAIRS)
        pair = (group * _PAIRS + lane).to(tl.uint64)
        one, other = _normals(pair, key, which)
        offsets = group * (2 * _PAIRS) + lane
        if (group + 1) * (2 * _PAIRS) <= n:  # a mask that is always true does not split accesses
            _add(values, offsets, offsets >= 0, one, by)
            _add(values, offsets + _PAIRS, offsets >= 0, other, by)
        else:
            _add(values, offsets, offsets < n, one, by)
            _add(values, offsets + _PAIRS, offsets + _PAIRS < n, other, by)


def add_gaussian_(values: Tensor, std: float, seed: int, stream: int) -> None:
    """Add in place."""
    n = values.numel()
    if not n:
        return
    bits = int.from_bytes(struct.pack("<d", std), "little", signed=True)
    grid = (cdiv(n, 256 * _GROUPS),)
    launch(_add_gaussian, grid, values, bits, seed, stream, n, GROUPS=_GROUPS, num_warps=1)
