"""cast, all_finite and int8 by blocks: every bit pattern, every ISA level, any thread count."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from guards import bits

from fedmap_sparse import ops
from fedmap_sparse.ops.quantize import cast_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 2047, 2049, 32_767, 32_769]
BACKENDS = ["reference", "cpu"]
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NAN = {torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}


def one_nan(t: torch.Tensor) -> torch.Tensor:
    """torch widens a float16 NaN to other payloads in its vectors than in its tails."""
    if t.dtype != torch.float32:
        return t
    return torch.where(t.isnan(), torch.full_like(t, float("nan")), t)


def patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def floats() -> torch.Tensor:
    """float32: random patterns of bits, and every value of the 16-bit types with its ties."""
    random = torch.randint(-(2**31), 2**31, (200_003,)).to(torch.int32).view(torch.float32)
    exact = torch.cat([patterns(d).to(torch.float32) for d in DTYPES[1:]])
    ties = torch.cat([ties_of(d) for d in DTYPES[1:]])
    near = [ties.view(torch.int32) + d for d in (-1, 0, 1)]
    return torch.cat([random, exact, *(n.view(torch.float32) for n in near)])


def ties_of(dtype: torch.dtype) -> torch.Tensor:
    """Halfway from each finite value of `dtype` to the next larger magnitude, exact in float32."""
    infinity = 0x7C00 if dtype == torch.float16 else 0x7F80
    lower = torch.arange(infinity, dtype=torch.int16)
    upper = (lower + 1).view(dtype).to(torch.float64)
    step = 2.0**5 if dtype == torch.float16 else 2.0**120  # of the largest binade
    upper[-1] = lower[-1:].view(dtype).item() + step
    tie = ((lower.view(dtype).to(torch.float64) + upper) / 2).to(torch.float32)
    return torch.cat([tie, -tie])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_ties_go_to_the_even_neighbour(isa: str, backend: str, dtype: torch.dtype) -> None:
    tie = ties_of(dtype)
    half = tie.numel() // 2
    lower = torch.arange(half).to(torch.int16)
    even = torch.where(lower % 2 == 0, lower, lower + 1)
    down, _ = ops.cast((tie.view(torch.int32) - 1).view(torch.float32), dtype, backend=backend)
    up, _ = ops.cast((tie.view(torch.int32) + 1).view(torch.float32), dtype, backend=backend)
    to, _ = ops.cast(tie, dtype, backend=backend)
    sign = torch.cat([torch.zeros(half), torch.full((half,), -(2.0**15))]).to(torch.int16)
    for got, expected in ((down, lower), (to, even), (up, lower + 1)):
        assert torch.equal(bits(got), torch.cat([expected, expected]) | sign)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_narrowing_is_what_torch_does_but_for_nan(isa: str, dtype: torch.dtype) -> None:
    x = floats()
    narrowed, overflowed = ops.cast(x, dtype, backend="cpu")
    expected = x.to(dtype)
    nan = x.isnan()
    assert torch.equal(bits(narrowed)[~nan], bits(expected)[~nan])
    assert bool((bits(narrowed)[nan] == NAN[dtype]).all())
    assert nan.any()
    assert overflowed == int((expected.isinf() & x.isfinite()).sum())
    assert overflowed > 0


@pytest.mark.parametrize(("source", "target"), list(permutations(DTYPES, 2)), ids=str)
def test_kernel_is_reference(isa: str, source: torch.dtype, target: torch.dtype) -> None:
    x = floats() if source == torch.float32 else patterns(source)
    ours, count = ops.cast(x, target, backend="cpu")
    theirs, expected = ops.cast(x, target, backend="reference")
    assert count == expected
    assert torch.equal(bits(one_nan(ours)), bits(one_nan(theirs)))
    for n in SIZES:
        for start in (0, 1, 3):
            part = x[start : start + n]
            room = torch.full((n + 5,), 7.0, dtype=target)
            ops.cast(part, target, out=room[2 : 2 + n], backend="cpu")
            same = one_nan(cast_reference(part, target))
            assert torch.equal(bits(one_nan(room[2 : 2 + n])), bits(same))
            assert room[:2].tolist() == [7.0] * 2
            assert room[2 + n :].tolist() == [7.0] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cast_to_the_same_dtype_copies(isa: str, dtype: torch.dtype) -> None:
    x = floats() if dtype == torch.float32 else patterns(dtype)
    for backend in BACKENDS:
        copied, overflowed = ops.cast(x, dtype, backend=backend)
        assert torch.equal(bits(copied), bits(x))
        assert overflowed == 0


def test_casts_do_not_depend_on_threads(isa: str, threads: int) -> None:
    x = torch.randn(300_001) * 40_000
    for dtype in DTYPES[1:]:
        narrowed, overflowed = ops.cast(x, dtype, backend="cpu")
        expected, count = ops.cast(x, dtype, backend="reference")
        assert overflowed == count
        assert torch.equal(bits(narrowed), bits(expected))


@pytest.mark.parametrize("start", [0, 1])
def test_results_that_go_past_the_cache_are_the_same(isa: str, start: int) -> None:
    """From 16 MiB on results are written by other instructions, where they are aligned."""
    n = (16 << 20) // 4 + 77
    x = torch.randn(2 * n)
    for dtype in DTYPES[1:]:
        out = torch.empty(2 * n + start, dtype=dtype)[start:]
        ops.cast(x, dtype, out=out, backend="cpu")
        assert torch.equal(bits(out), bits(x.to(dtype)))
        wide = torch.empty(n + start)[start:]
        ops.cast(out[:n], torch.float32, out=wide, backend="cpu")
        assert torch.equal(wide, out[:n].to(torch.float32))
    q, scales = ops.quantize_int8(x[:n], block=64)
    expected = ops.dequantize_int8(q, scales, block=64, backend="reference")
    assert torch.equal(ops.dequantize_int8(q, scales, block=64, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_finite_sees_any_element(isa: str, threads: int, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for n in (1, 15, 16, 33, 70_001):
        x = torch.randn(n).to(dtype)
        x[0], x[-1] = largest, -largest
        assert ops.all_finite(x)
        for at in {0, n // 2, n - 1}:
            for bad in (float("inf"), -float("inf"), float("nan")):
                x[at] = bad
                assert not ops.all_finite(x)
            x[at] = 1
    assert ops.all_finite(torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("block", [64, 128, 320, 1024])
@pytest.mark.parametrize("feedback", [False, True])
def test_int8_kernel_is_reference(isa: str, block: int, feedback: bool) -> None:
    for n in (0, 1, 63, 64, 65, 1023, 1025, 40_001):
        x = (torch.randn(n + 1) * torch.randint(-30, 30, (n + 1,)).float().exp2())[1:]
        ours = torch.zeros(n) if feedback else None
        theirs = torch.zeros(n) if feedback else None
        for _ in range(3):  # the residual of one call enters the next
            q, scales = ops.quantize_int8(x, block=block, residual=ours, backend="cpu")
            code, scale = ops.quantize_int8(x, block=block, residual=theirs, backend="reference")
            assert torch.equal(q, code)
            assert torch.equal(bits(scales), bits(scale))
            if ours is not None and theirs is not None:
                assert torch.equal(bits(ours), bits(theirs))
            back = ops.dequantize_int8(q, scales, block=block, backend="cpu")
            meant = ops.dequantize_int8(code, scale, block=block, backend="reference")
            assert torch.equal(bits(back), bits(meant))


def test_int8_does_not_depend_on_threads(isa: str, threads: int) -> None:
    x = torch.randn(400_001)
    ours, theirs = torch.full_like(x, 1e-3), torch.full_like(x, 1e-3)
    q, scales = ops.quantize_int8(x, residual=ours, backend="cpu")
    code, scale = ops.quantize_int8(x, residual=theirs, backend="reference")
    assert torch.equal(q, code)
    assert torch.equal(bits(scales), bits(scale))
    assert torch.equal(bits(ours), bits(theirs))
    assert torch.equal(
        ops.dequantize_int8(q, scales, backend="cpu"),
        ops.dequantize_int8(q, scales, backend="reference"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_by_hand(isa: str, backend: str) -> None:
    """Scale 1: codes are the values, halves to even; then blocks of zeros and of almost nothing."""
    x = torch.zeros(256)
    x[:8] = torch.tensor([127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49])
    x[128:192] = 1.4e-45  # a subnormal: amax / 127 rounds to 0
    x[192:] = 190 * 1.4e-45  # amax / 127 rounds to one subnormal step: x / scale is 190
    x[224:] *= -1
    residual = torch.zeros(256)
    q, scales = ops.quantize_int8(x, block=64, residual=residual, backend=backend)
    assert q[:8].tolist() == [127, -127, 0, 2, 2, 0, -2, 0]
    assert scales.tolist() == [1.0, 0.0, 0.0, 2.0**-149]
    assert not q[64:192].any()
    assert q[192:].tolist() == [127] * 32 + [-127] * 32
    assert torch.equal(residual[:8], torch.tensor([0, 0, 0.5, -0.5, 0.5, -0.5, 0.5, 0.49]))
    assert torch.equal(residual[128:192], x[128:192])
    assert torch.equal(residual[192:], x[192:].sign() * 63 * 2.0**-149)


def test_error_feedback_makes_up_for_what_was_lost(isa: str) -> None:
    """Over many rounds the codes sum to the values, but for one residual, not one per round."""
    x = torch.randn(4096)
    residual, total = torch.zeros(4096), torch.zeros(4096, dtype=torch.float64)
    for _ in range(50):
        total += ops.dequantize_int8(*ops.quantize_int8(x, residual=residual)).double()
    torch.testing.assert_close(total + residual, 50 * x.double(), rtol=0, atol=1e-4)
    assert residual.abs().max() < x.abs().max() / 127


def test_arguments_are_checked() -> None:
    x = torch.ones(8)
    with pytest.raises(TypeError, match="float64"):
        ops.cast(x.double(), torch.float16)
    with pytest.raises(TypeError, match="int8"):
        ops.cast(x, torch.int8)
    with pytest.raises(ValueError, match="8 elements"):
        ops.cast(x, torch.float16, out=torch.empty(7, dtype=torch.float16))
    with pytest.raises(ValueError, match="contiguous"):
        ops.cast(torch.ones(8, 2)[:, 0], torch.float16)
    with pytest.raises(TypeError, match="float16"):
        ops.quantize_int8(x.half())
    for block in (0, 63, 96, 2048):
        with pytest.raises(ValueError, match="multiple of 64"):
            ops.quantize_int8(x, block=block)
    residual = torch.full((8,), 7.0)
    with pytest.raises(ValueError, match="finite"):
        ops.quantize_int8(torch.tensor([1.0] * 7 + [float("inf")]), residual=residual)
    assert residual.tolist() == [7.0] * 8
    with pytest.raises(TypeError, match="int8"):
        ops.dequantize_int8(x, x[:1])
    with pytest.raises(ValueError, match="1 elements"):
        ops.dequantize_int8(x.to(torch.int8), x[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_pattern_widens_alike_nan_payloads_too(dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    ours, theirs = (
        ops.cast(every, torch.float32, backend=b)[0].view(torch.int32) for b in ("cpu", "reference")
    )
    assert torch.equal(ours, theirs)


def test_subnormal_scales(isa: str) -> None:
    """By integers: 66,051 steps times 127 are the last product below the normal numbers."""
    steps = torch.tensor([1, 2, 3, 66_051, 66_052, (1 << 23) - 1, 1 << 23], dtype=torch.int32)
    codes = torch.randint(-127, 128, (len(steps), 64)).char()
    codes[:, :3] = torch.tensor([127, -127, 0])
    scales = steps.view(torch.float32)
    got = ops.dequantize_int8(codes.view(-1), scales, block=64)
    expected = codes.float() * scales[:, None]
    assert torch.equal(got.view(torch.int32), expected.view(-1).view(torch.int32))
