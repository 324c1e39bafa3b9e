"""CRC-32C against published values and a bit-by-bit form."""

from __future__ import annotations

import numpy as np
import pytest
from guards import EDGES

from fedmap_sparse._backends import native

pytestmark = pytest.mark.skipif(native is None, reason="fedmap_sparse._native is not built")


def crc(data: bytes | np.ndarray, start: int = 0, threads: int = 1) -> int:
    array = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data
    return int(native.crc32c(array, start, threads))


def bit_by_bit(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_published_values(isa: str) -> None:
    """The check value of the CRC catalogues, and the vectors of RFC 3720, section B.4."""
    assert crc(b"123456789") == 0xE3069283
    assert crc(bytes(32)) == 0x8A9136AA
    assert crc(b"\xff" * 32) == 0x62A8AB43
    assert crc(bytes(range(32))) == 0x46DD794E
    assert crc(bytes(reversed(range(32)))) == 0x113FDB5C
    assert crc(b"") == 0


def test_every_edge(isa: str) -> None:
    """Also around three stretches of 256 and of 4096 bytes, the interleaved loops' lengths."""
    data = np.random.default_rng(0).integers(0, 256, 13_000, dtype=np.uint8)
    for size in [*EDGES, 767, 768, 769, 775, 12_287, 12_288, 12_289, 13_000]:
        assert crc(data[:size]) == bit_by_bit(data[:size].tobytes())


def test_from_any_alignment_and_in_pieces(isa: str) -> None:
    data = np.random.default_rng(1).integers(0, 256, 30_000, dtype=np.uint8)
    whole = crc(data)
    for at in (0, 1, 7, 8, 29_999, 30_000, *range(11, 30_000, 1777)):
        assert crc(data[at:], crc(data[:at])) == whole


def test_any_thread_count(isa: str) -> None:
    data = np.random.default_rng(2).integers(0, 256, (5 << 20) + 13, dtype=np.uint8)
    for size in (1 << 20, (2 << 20) - 1, data.size):
        pieces = crc(data[12345:size], crc(data[:12345], 77))
        assert {crc(data[:size], 77, threads) for threads in (1, 2, 3, 7)} == {pieces}


def test_a_flipped_bit_is_seen(isa: str) -> None:
    data = np.random.default_rng(3).integers(0, 256, 20_000, dtype=np.uint8)
    whole = crc(data)
    for at in range(0, 20_000, 613):
        data[at] ^= 1 << at % 8
        assert crc(data) != whole
        data[at] ^= 1 << at % 8
