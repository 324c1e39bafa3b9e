"""weighted_mean and Accumulator: float64 in the order given, rounded once, on every backend."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from guards import bits
from page_faults import LINUX, touched_bytes

from fedmap_sparse import ops
from fedmap_sparse._backends import native
from fedmap_sparse.ops.accumulate import narrow

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 7, 8, 15, 16, 17, 33, 2047, 2048, 2049, 16_385]
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def payloads(clients: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Magnitudes from tiny to large, starting one element after an allocation does."""
    made = []
    for _ in range(clients):
        room = torch.randn(n + 1) * torch.randint(-12, 6, (n + 1,)).float().exp2()
        made.append(room.to(dtype)[1:])
    return made


def weights_of(clients: int) -> list[float]:
    return [1.0 + 37.3 * c % 11 for c in range(clients)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clients", [1, 3, 4, 5, 10])
def test_kernel_is_reference(isa: str, dtype: torch.dtype, clients: int) -> None:
    for n in SIZES:
        given, weights = payloads(clients, n, dtype), weights_of(clients)
        for out_dtype in DTYPES:
            mean = torch.full((n + 3,), 7.0, dtype=out_dtype)
            ops.weighted_mean(given, weights, out=mean[:n], backend="cpu")
            expected = torch.empty(n, dtype=out_dtype)
            ops.weighted_mean(given, weights, out=expected, backend="reference")
            assert torch.equal(bits(mean[:n]), bits(expected))
            assert mean[n:].tolist() == [7.0] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_nor_on_streaming(
    isa: str, threads: int, dtype: torch.dtype
) -> None:
    given, weights = payloads(6, 150_001, dtype), weights_of(6)
    expected = ops.weighted_mean(given, weights, backend="reference")
    assert torch.equal(bits(ops.weighted_mean(given, weights)), bits(expected))
    streaming = ops.Accumulator(150_001)
    for payload, weight in zip(given, weights, strict=True):
        streaming.add(payload, weight)
    assert torch.equal(bits(streaming.mean(dtype=dtype)), bits(expected))


def test_the_order_given_is_the_order_of_the_sums(isa: str) -> None:
    """2^53 + 1 + 1 is 2^53 from the left, 2^53 + 2 from the right."""
    large, one = torch.tensor([2.0**53]), torch.tensor([1.0])
    out = torch.empty(1, dtype=torch.float64)
    for order, expected in (([large, one, one], 2.0**53), ([one, one, large], 2.0**53 + 2)):
        sums = ops.Accumulator(1)
        for payload in order:
            sums.add(payload, 1)
        assert sums.sums.item() == expected
        out[0] = expected / 3
        assert torch.equal(ops.weighted_mean(order, [1, 1, 1]), out.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_payloads_give_that_payload(isa: str, dtype: torch.dtype) -> None:
    every = torch.arange(65536).to(torch.int16).view(torch.float16).to(torch.float32)
    if dtype == torch.bfloat16:
        every = torch.arange(65536).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    payload = every[every.isfinite() & (every.view(torch.int32) != -(2**31))].to(dtype)
    mean = ops.weighted_mean([payload] * 7, [0.1, 3, 17.7, 1e-3, 250, 1, 1 / 3], backend="cpu")
    assert torch.equal(bits(mean), bits(payload))


def test_the_mean_of_negative_zeros_is_positive_zero(isa: str) -> None:
    """Sums start from +0.0, in the batch and in the stream alike."""
    zeros = torch.full((40,), -0.0)
    assert not bits(ops.weighted_mean([zeros, zeros], [1, 2])).any()
    streaming = ops.Accumulator(40)
    streaming.add(zeros, 1)
    assert not bits(streaming.mean()).any()


def exactly(value: Fraction, dtype: torch.dtype) -> int:
    """The bits of a positive fraction in a 16-bit `dtype`, by integer arithmetic alone."""
    digits, least, most = (11, -24, 0x7C00) if dtype == torch.float16 else (8, -133, 0x7F80)
    exponent = least
    while value / Fraction(2) ** exponent >= 2**digits:
        exponent += 1
    mantissa = round(value / Fraction(2) ** exponent)  # half to even
    # The exponent's field counts from the subnormals' spacing; a carry moves into it by itself.
    return min(((exponent - least) << (digits - 1)) + mantissa, most)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sixteen_bits_are_rounded_once(isa: str, dtype: torch.dtype) -> None:
    """Next to ties in the 16-bit type, where rounding by way of float32 would round twice."""
    halves = torch.tensor([1, 3, 0x3C01, 0x0401, 0x03FF, 0x7BFE, 0x3F81, 0x0081], dtype=torch.int16)
    below = halves.view(dtype).to(torch.float64)
    above = (halves + 1).view(dtype).to(torch.float64)
    tie = (below + above) / 2
    sums = torch.cat([tie * (1 + d * 2.0**-45) for d in (-1, 0, 1)])
    assert (sums.to(torch.float32) == torch.cat([tie.to(torch.float32)] * 3)).all()
    out = torch.empty(sums.numel(), dtype=dtype)
    native.accumulate_mean(sums, 1.0, out, 1, False)
    assert bits(out).tolist() == [exactly(Fraction(s), dtype) for s in sums.tolist()]
    assert torch.equal(bits(narrow(sums, dtype)), bits(out))
    negative = -sums
    native.accumulate_mean(negative, 1.0, out, 1, False)
    assert torch.equal(bits(out), bits(narrow(negative, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_that_are_not_finite_are_counted(
    isa: str, threads: int, dtype: torch.dtype
) -> None:
    n = 70_003
    sums = torch.randn(n, dtype=torch.float64)
    bad = torch.tensor([0, 1, 17, 4000, n - 1])
    sums[bad] = torch.tensor([float("inf"), float("nan"), -float("inf"), 1e39, -1e300]).double()
    out = torch.empty(n, dtype=dtype)
    count = native.accumulate_mean(sums, 1.0, out, threads, False)
    assert count == 5
    assert (~out.isfinite()).nonzero().flatten().tolist() == bad.tolist()
    payload = torch.ones(100, dtype=dtype)
    payload[3], payload[99] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="got 2 NaN or infinite"):
        ops.weighted_mean([torch.ones(100, dtype=dtype), payload], [1, 1])


@pytest.mark.parametrize("block", [64, 192, 1024])
def test_int8_is_the_mean_of_what_it_stands_for(isa: str, threads: int, block: int) -> None:
    n, clients = 50_001, 5
    weights = weights_of(clients)
    coded = [ops.quantize_int8(p, block=block) for p in payloads(clients, n, torch.float32)]
    meant = [ops.dequantize_int8(*c, block=block, backend="reference") for c in coded]
    sums = torch.zeros(n, dtype=torch.float64)
    for (q, scales), weight in zip(coded, weights, strict=True):
        native.accumulate_add_int8(sums, q, scales, block, weight, threads, False)
    for dtype in DTYPES:
        streamed, expected = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
        ops.weighted_mean(meant, weights, out=expected, backend="reference")
        native.accumulate_mean(sums, sum(weights), streamed, threads, False)
        assert torch.equal(bits(streamed), bits(expected))


@LINUX
def test_peak_memory() -> None:
    setup = """
from fedmap_sparse import ops
payloads = [torch.ones(3_000_000) for _ in range(14)]
out = torch.ones(3_000_000)
"""
    touched = touched_bytes(setup, "ops.weighted_mean(payloads, [1.0] * 14, out=out)")
    assert 0 < touched < 400_000


def test_arguments_are_checked_before_anything_is_written() -> None:
    a, b = torch.ones(4), torch.ones(5)
    out = torch.full((4,), 7.0)
    with pytest.raises(ValueError, match="at least one"):
        ops.weighted_mean([], [])
    with pytest.raises(ValueError, match="weights: expected 1"):
        ops.weighted_mean([a], [1, 2], out=out)
    with pytest.raises(ValueError, match="expected 4 elements"):
        ops.weighted_mean([a, b], [1, 2], out=out)
    with pytest.raises(TypeError, match="one dtype"):
        ops.weighted_mean([a, a.half()], [1, 2], out=out)
    with pytest.raises(TypeError, match="float64"):
        ops.weighted_mean([a.double()], [1], out=out)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            ops.weighted_mean([a], [weight], out=out)
    with pytest.raises(ValueError, match="contiguous"):
        ops.weighted_mean([torch.ones(4, 2)[:, 0]], [1], out=out)
    with pytest.raises(ValueError, match="at least one payload"):
        ops.Accumulator(4).mean()
    assert out.tolist() == [7.0] * 4
