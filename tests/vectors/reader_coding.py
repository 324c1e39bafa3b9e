"""The codings of the second reader: entropy-coded masks and values, and int8.

Written from docs/format.md alone and without the package, as is reader.py, which takes the message
apart.
"""

from __future__ import annotations

import math
import struct


class Refused(Exception):
    pass


def refuse_unless(condition, reason):
    if not condition:
        raise Refused(reason)


def to_bits(data, count):
    bits = [bool(data[i // 8] >> (i % 8) & 1) for i in range(8 * len(data))]
    refuse_unless(not any(bits[count:]), "a bit past the end")
    return bits[:count]


FLOAT32, FLOAT16, BFLOAT16, INT8, FLOAT64, INT64, BOOL, BIT, RECORD = range(9)
SIZES = {FLOAT32: 4, FLOAT16: 2, BFLOAT16: 2, INT8: 1, FLOAT64: 8, INT64: 8, BOOL: 1}


def rans(states, words, steps):
    """Symbols of a stream; `steps` lists (frequencies, lanes that take part)."""
    refuse_unless(all(1 << 15 <= x < 1 << 31 for x in states), "a state out of range")
    x, words, symbols = list(states), iter(words), []
    for frequencies, lanes in steps:
        starts = [sum(frequencies[:s]) for s in range(16)]
        for lane in range(lanes):
            slot = x[lane] % (1 << 15)
            s = next(s for s in range(16) if starts[s] <= slot < starts[s] + frequencies[s])
            x[lane] = frequencies[s] * (x[lane] >> 15) + slot - starts[s]
            if x[lane] < 1 << 15:
                word = next(words, None)
                refuse_unless(word is not None, "words run out")
                x[lane] = x[lane] << 16 | word
            symbols.append(s)
    refuse_unless(next(words, None) is None, "words left over")
    refuse_unless(all(lane == 1 << 15 for lane in x), "final state")
    return symbols


class Taker:
    """Takes parts off a payload."""

    def __init__(self, payload):
        self.payload, self.at = payload, 0

    def take(self, size):
        self.at += size
        refuse_unless(self.at <= len(self.payload), "payload cut short")
        return self.payload[self.at - size : self.at]

    def numbers(self, code, count):
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code)))

    def pad(self):
        refuse_unless(not any(self.take(-self.at % 4)), "padding of a part")

    def end(self):
        refuse_unless(self.at == len(self.payload), "payload left over")


def density(code):
    """(frequencies, common bit) of a density byte, None for constant ones."""
    k, common_bit = code % 128, code >> 7
    if k == 127:
        return None, common_bit
    refuse_unless(k < 120, "unknown density")
    rare = (16 - k % 8) << (15 - k // 8)
    common = (1 << 20) - rare
    rr, rc, cc = rare * rare >> 20, rare * common >> 20, common * common >> 20
    p = [cc * cc >> 20, cc * rc >> 20, rc * rc >> 20, rc * rr >> 20, rr * rr >> 20]
    frequencies = [0] * 16
    for nibble in range(16):
        rare_bits = 4 - nibble.bit_count() if common_bit else nibble.bit_count()
        if rare_bits:
            frequencies[nibble] = max(1, (p[rare_bits] + 16) >> 5)
    frequencies[15 * common_bit] = (1 << 15) - sum(frequencies)
    return frequencies, common_bit


def coded_bits(payload, runs, count):
    """The bits of an entropy-coded MASK or DELTA; `runs` lists (start, number of bits)."""
    taker = Taker(payload)
    chunk, chunks = taker.numbers("I", 2)
    refuse_unless(chunk in [1 << e for e in range(10, 18)], "steps a chunk")
    densities = [density(code) for code in taker.take(len(runs))]
    taker.pad()
    steps = []
    for (_, n), (frequencies, common_bit) in zip(runs, densities, strict=True):
        refuse_unless(n or (frequencies, common_bit) == (None, 0), "density of nothing")
        if frequencies:
            nibbles = -(-n // 4)
            steps += [(frequencies, min(32, nibbles - i)) for i in range(0, nibbles, 32)]
    refuse_unless(chunks == -(-len(steps) // chunk), "number of chunks")
    sizes = taker.numbers("I", chunks)
    states = [taker.numbers("I", 32) for _ in range(chunks)]
    symbols = []
    for c in range(chunks):
        words = taker.numbers("H", sizes[c])
        symbols += rans(states[c], words, steps[c * chunk : (c + 1) * chunk])
    taker.end()
    bits, at = [False] * count, 0
    for (start, n), (frequencies, common_bit) in zip(runs, densities, strict=True):
        if not frequencies:
            bits[start : start + n] = [bool(common_bit)] * n
            continue
        nibbles = symbols[at : at + -(-n // 4)]
        at += len(nibbles)
        run = [bool(s >> i & 1) for s in nibbles for i in range(4)]
        refuse_unless(all(bit == common_bit for bit in run[n:]), "bits of a last nibble")
        bits[start : start + n] = run[:n]
    return bits


def coded_values(dtype, payload, n):
    """The bytes of entropy-coded elements in encoding 0."""
    exponent_bits, low, high = {FLOAT32: (8, 16, 8), FLOAT16: (5, 8, 3), BFLOAT16: (8, 0, 8)}[dtype]
    taker, chunks = Taker(payload), -(-n // 32768)
    directory = [
        (*taker.numbers("H", 2), *taker.take(4), taker.numbers("H", 16)) for _ in range(chunks)
    ]
    states = [taker.numbers("I", 32) for _ in range(chunks)]
    lows = taker.numbers("BH"[low // 8 - 1], n) if low else [0] * n
    taker.pad()
    plane = to_bits(taker.take(-(-n * high // 8)), n * high)
    taker.pad()
    highs = [sum(plane[high * i + b] << b for b in range(high)) for i in range(n)]
    streams = [taker.numbers("H", entry[0]) for entry in directory]
    taker.pad()
    exponents = []
    for c, (_, escapes, top, *zeros, frequencies) in enumerate(directory):
        refuse_unless(not any(zeros), "reserved bytes of a directory")
        refuse_unless(top < 1 << exponent_bits, "top")
        refuse_unless(sum(frequencies) == 1 << 15, "sum of frequencies")
        m = min(32768, n - 32768 * c)
        steps = [(frequencies, min(32, m - i)) for i in range(0, m, 32)]
        escaped = iter(taker.take(escapes))
        for s in rans(states[c], streams[c], steps):
            e = top - s if s < 15 else next(escaped, -1)
            refuse_unless(0 <= e < 1 << exponent_bits, "exponent")
            exponents.append(e)
        refuse_unless(next(escaped, None) is None, "escapes left over")
    taker.pad()
    taker.end()
    out, mantissa = [], low + high - 1
    for lo, hi, e in zip(lows, highs, exponents, strict=True):
        sign, rest = hi >> (high - 1), hi % (1 << (high - 1))
        out.append(sign << (exponent_bits + mantissa) | e << mantissa | rest << low | lo)
    return b"".join(v.to_bytes(SIZES[dtype], "little") for v in out)


def single(x):
    """float32 bytes of a number, rounded; what is beyond the largest one is infinite."""
    try:
        return struct.pack("<f", x)
    except OverflowError:
        return struct.pack("<f", math.copysign(math.inf, x))


def int8_values(payload, n, block):
    """float32 bytes of int8 blocks."""
    refuse_unless(block in range(64, 1025, 64), "block")
    taker = Taker(payload)
    scales = taker.take(4 * -(-n // block))
    codes = taker.numbers("b", n)
    taker.end()
    out = b""
    for i, code in enumerate(codes):
        (bits,) = struct.unpack_from("<I", scales, i // block * 4)
        (scale,) = struct.unpack_from("<f", scales, i // block * 4)
        refuse_unless(bits < 0x7F800000, "scale")
        refuse_unless(code != -128 and (scale or not code), "code")
        # A product with an integer of 8 bits is exact in a double, so it is rounded once.
        out += single(code * scale)
    return out
