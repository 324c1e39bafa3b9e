"""add_gaussian_: published vectors of the generator, the distribution, the same bits everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from guards import bits
from scipy import stats

from fedmap_sparse import ops
from fedmap_sparse.ops.noise import normal_reference, philox_reference

SIZES = [0, 1, 127, 128, 129, 255, 256, 257, 511, 5000]


# Random123's kat_vectors, philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_generator_is_philox(
    counter: list[int], key: tuple[int, int], expected: list[int]
) -> None:
    words = philox_reference([torch.tensor([w]) for w in counter], key)
    assert [int(w) for w in words] == expected


def test_numbers_are_those_of_the_formula() -> None:
    """Against numpy's log, cos and sin of the same bits."""
    n, seed, stream = 20 * 256, 123, 2**40 + 9
    pair = torch.arange(n // 2)
    far = [torch.full_like(pair, stream & 0xFFFFFFFF), torch.full_like(pair, stream >> 32)]
    words = philox_reference([pair & 0xFFFFFFFF, pair >> 32, *far], (seed, 0))
    w = [t.numpy().astype(np.uint64) for t in words]
    first, second = w[0] | w[1] << np.uint64(32), w[2] | w[3] << np.uint64(32)
    u = 1 - (first >> np.uint64(12)).astype(np.float64) / 2**52
    share = (second >> np.uint64(10) & np.uint64(2**52 - 1)).astype(np.float64) / 2**52
    radius, angle = np.sqrt(-2 * np.log(u)), (share - 0.5) * np.pi / 2
    cosine, sine = radius * np.cos(angle), radius * np.sin(angle)
    cosine = np.where(second >> np.uint64(63), -cosine, cosine)
    swap = (second >> np.uint64(62) & np.uint64(1)).astype(bool)
    expected = np.stack(
        [
            np.where(swap, sine, cosine).reshape(-1, 128),
            np.where(swap, cosine, sine).reshape(-1, 128),
        ],
        1,
    ).reshape(-1)
    got = normal_reference(n, seed, stream).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-15)


@pytest.mark.parametrize("n", SIZES)
def test_kernel_is_reference(isa: str, n: int) -> None:
    values = torch.randn(n + 1)[1:].clone()
    for std, seed, stream in ((0.0, 0, 0), (1e-3, 2**63 - 1, 2**63 - 1), (40.0, 5, 2**35)):
        ours, theirs = values.clone(), values.clone()
        ops.add_gaussian_(ours, std, seed=seed, stream=stream, backend="cpu")
        ops.add_gaussian_(theirs, std, seed=seed, stream=stream, backend="reference")
        assert torch.equal(bits(ours), bits(theirs))


def test_neither_threads_nor_place_change_bits(isa: str, threads: int) -> None:
    n = 400_003
    expected = normal_reference(n, 3, 4).float()
    room = torch.full((n + 10,), 7.0)
    room[3 : n + 3] = 0
    ops.add_gaussian_(room[3 : n + 3], 1.0, seed=3, stream=4, backend="cpu")
    assert torch.equal(room[3 : n + 3], expected)
    assert room[:3].tolist() == [7.0] * 3
    assert room[n + 3 :].tolist() == [7.0] * 7


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    values = torch.zeros(4_000_000)
    ops.add_gaussian_(values, 1.0, seed=2024, stream=1)
    return values.double().numpy()


def test_moments(drawn: np.ndarray) -> None:
    """Each within five standard errors of the normal distribution's own."""
    n = len(drawn)
    assert abs(drawn.mean()) < 5 / math.sqrt(n)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((drawn**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((drawn**4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_distribution(drawn: np.ndarray) -> None:
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    first, second = drawn.reshape(-1, 2, 128).transpose(1, 0, 2).reshape(2, -1)
    assert stats.kstest(first, "norm").pvalue > 1e-3
    assert stats.kstest(second, "norm").pvalue > 1e-3
    angle = np.arctan2(second, first)
    assert stats.kstest(angle, "uniform", args=(-np.pi, 2 * np.pi)).pvalue > 1e-3


@pytest.mark.parametrize("beyond", [3.0, 4.0, 4.8])
def test_tails(drawn: np.ndarray, beyond: float) -> None:
    """Counts beyond so many standard deviations, as of a binomial."""
    share = 2 * stats.norm.sf(beyond)
    count = int((np.abs(drawn) > beyond).sum())
    assert stats.binomtest(count, len(drawn), share).pvalue > 1e-3


def test_neighbours_pairs_streams_and_seeds_are_independent(drawn: np.ndarray) -> None:
    def related(a: np.ndarray, b: np.ndarray) -> bool:
        return abs(np.corrcoef(a, b)[0, 1]) > 5 / math.sqrt(len(a))

    for step in (1, 128, 256):
        assert not related(drawn[:-step], drawn[step:])
    halves = drawn.reshape(-1, 2, 128)
    assert not related(halves[:, 0].ravel() ** 2, halves[:, 1].ravel() ** 2)
    for seed, stream in ((2025, 1), (2024, 2), (2024, 1 << 32)):
        other = torch.zeros(len(drawn))
        ops.add_gaussian_(other, 1.0, seed=seed, stream=stream)
        assert not related(drawn, other.double().numpy())


def test_arguments_are_named() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="std: expected a finite number at least 0, got -1"):
        ops.add_gaussian_(x, -1.0, seed=0)
    for bad in (-1, 2**63):
        with pytest.raises(ValueError, match="seed: expected a finite number at least 0 and below"):
            ops.add_gaussian_(x, 1.0, seed=bad)
        with pytest.raises(ValueError, match="stream"):
            ops.add_gaussian_(x, 1.0, seed=0, stream=bad)
    with pytest.raises(TypeError, match="seed: expected an int, got float"):
        ops.add_gaussian_(x, 1.0, seed=1.0)  # type: ignore[arg-type]
    assert x.tolist() == [0.0] * 3
