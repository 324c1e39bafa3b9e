"""Entropy coding: every implementation writes the same bytes, near the bound, and trusts none."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fedmap_sparse as fs
from fedmap_sparse import codec
from fedmap_sparse._backends import native
from fedmap_sparse.ops import entropy

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLENTY = 1 << 22


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_bits(numel: int, density: float) -> Tensor:
    """int32 words; gaps are drawn, so that sparse masks of 1e8 bits are quick."""
    flip = density > 0.5
    rare = 1 - density if flip else density
    words = np.zeros(-(-numel // 32) * 4, np.uint8)
    if rare:
        rng = np.random.default_rng(numel)
        count = int(numel * rare + 6 * math.sqrt(numel * rare) + 10)
        at = rng.geometric(rare, count).cumsum() - 1
        at = at[at < numel]
        np.bitwise_or.at(words, at >> 3, (1 << (at & 7)).astype(np.uint8))
    if flip:
        words ^= 0xFF
        for i in range(numel, 8 * words.size):
            words[i >> 3] &= ~(1 << (i & 7)) & 0xFF
    return torch.from_numpy(words.view(np.int32))


def runs_of(numels: list[int], gap: int = 0) -> entropy.Runs:
    starts = np.cumsum([0] + [n + gap for n in numels])[:-1]
    return entropy.Runs(torch.from_numpy(starts), torch.tensor(numels, dtype=torch.int64))


def counts_in(mask: fs.Mask, runs: entropy.Runs) -> Tensor:
    return entropy.ranks_at(mask, runs.start + runs.numel) - entropy.ranks_at(mask, runs.start)


def shaped(numels: list[int], densities: list[float], gap: int) -> tuple[fs.Mask, entropy.Runs]:
    runs = runs_of(numels, gap)
    bits = torch.zeros(sum(numels) + gap * len(numels) + 7, dtype=torch.bool)
    for start, n, d in zip(runs.start.tolist(), numels, densities, strict=True):
        bits[start : start + n] = torch.rand(n) < d
    return fs.Mask.from_bool(bits), runs


SHAPES = [
    ([1], [1.0], 0),
    ([3, 4, 5], [0.5, 0.5, 0.5], 0),
    ([127, 128, 129, 0, 31], [0.1, 0.9, 0.001, 0.5, 0.0], 0),
    ([1000, 5000, 1, 20000], [0.999, 0.3, 1.0, 0.02], 13),
    ([150_000, 7, 40_000], [0.4, 0.5, 0.45], 3),
]


@pytest.mark.parametrize(("numels", "densities", "gap"), SHAPES)
def test_masks_same_bytes_everywhere(
    numels: list[int], densities: list[float], gap: int, isa: str, threads: int
) -> None:
    mask, runs = shaped(numels, densities, gap)
    nnz = counts_in(mask, runs)
    payload = entropy.encode_mask(mask.words, runs, nnz, PLENTY, backend="cpu")
    expected = entropy.encode_mask(mask.words, runs, nnz, PLENTY, backend="reference")
    assert payload is not None
    assert expected is not None
    assert torch.equal(payload, expected)
    assert torch.equal(entropy.decode_mask(payload, runs, mask.numel, backend="cpu"), mask.words)


@pytest.mark.parametrize(("numels", "densities", "gap"), SHAPES)
def test_masks_reference_reads(numels: list[int], densities: list[float], gap: int) -> None:
    mask, runs = shaped(numels, densities, gap)
    payload = entropy.encode_mask(mask.words, runs, counts_in(mask, runs), PLENTY)
    assert payload is not None
    back = entropy.decode_mask(payload, runs, mask.numel, backend="reference")
    assert torch.equal(back, mask.words)


def bound(numel: Tensor, nnz: Tensor) -> float:
    """Bytes: the sum over tensors of n H(d) / 8."""
    d = nnz.double() / numel.clamp(min=1)
    h = -(torch.xlogy(d, d) + torch.xlogy(1 - d, 1 - d)) / math.log(2)
    return float((numel * h).sum()) / 8


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.3, 0.5, 0.77, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("numel", [1_000, 30_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("tensors", [1, 300])
def test_masks_are_near_the_bound(density: float, numel: int, tensors: int) -> None:
    mask = fs.Mask.from_words(random_bits(numel, density), numel)
    each = numel // tensors
    runs = runs_of([each] * (tensors - 1) + [numel - each * (tensors - 1)])
    nnz = counts_in(mask, runs)
    payload = entropy.encode_mask(mask.words, runs, nnz, PLENTY)
    assert payload is not None
    raw = 4 * mask.words.numel()
    assert min(payload.numel(), raw) <= 1.02 * bound(runs.numel, nnz) + 512
    assert torch.equal(entropy.decode_mask(payload, runs, numel), mask.words)


@pytest.mark.parametrize("density", [0.001, 0.1])
def test_a_mask_of_1e8_bits_is_near_the_bound(density: float) -> None:
    numel = 100_000_000
    mask = fs.Mask.from_words(random_bits(numel, density), numel)
    runs = runs_of([numel])
    payload = entropy.encode_mask(mask.words, runs, counts_in(mask, runs), numel // 8)
    assert payload is not None
    assert payload.numel() <= 1.02 * bound(runs.numel, torch.tensor([mask.nnz])) + 512
    assert torch.equal(entropy.decode_mask(payload, runs, numel), mask.words)


def test_a_section_is_never_larger_than_raw() -> None:
    from fedmap_sparse.codec import masks

    for numel in (1, 100, 5_000, 200_000):
        layout = fs.FlatLayout.from_state_dict({"w": torch.empty(1, numel, device="meta")})
        for density in (0.0, 0.4, 0.5, 0.6):
            keep = layout.initial_mask().to_bool() & (torch.rand(layout.prunable_numel) < density)
            section = masks.full_section(fs.Mask.from_bool(keep), layout)
            assert len(section.payload) <= layout.prunable_numel // 8


@pytest.mark.parametrize("density", [0.02, 0.4, 0.47, 0.5, 0.53])
@pytest.mark.parametrize("numels", [[5], [100, 3000], [70_000]])
def test_what_fits_is_what_the_reference_fits(numels: list[int], density: float) -> None:
    """At one half C++ says no without coding; it has to be right about it."""
    mask, runs = shaped(numels, [density] * len(numels), 0)
    nnz = counts_in(mask, runs)
    whole = entropy.encode_mask(mask.words, runs, nnz, PLENTY, backend="reference")
    assert whole is not None
    size = whole.numel()
    for capacity in (0, size // 2, mask.numel // 8 - 1, mask.numel // 8 + 1, size - 1, size):
        payload = entropy.encode_mask(mask.words, runs, nnz, max(capacity, 0), backend="cpu")
        assert (payload is not None) == (capacity >= size)
        assert payload is None or torch.equal(payload, whole)


def values_of(kind: str, n: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(n) * 0.02
    if kind == "noise":  # any bits at all, NaN payloads included
        width = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
        low, high = torch.iinfo(width).min, torch.iinfo(width).max
        return torch.randint(low, high, (n,), dtype=width).view(dtype)
    if kind == "odd":
        x[::3], x[1::7], x[2::11] = 0.0, float("nan"), float("-inf")
    if kind == "zeros":
        x = x * 0
    if kind == "extremes":  # exponents of 0 and 255: their difference wraps in 8 bits
        x = torch.zeros(n)
        x[::3], x[1::5] = float("inf"), 3e38
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "noise", "odd", "zeros", "extremes"])
@pytest.mark.parametrize("n", [1, 31, 33, 1000, 32767, 32769, 70_001])
def test_values_same_bytes_everywhere(kind: str, n: int, dtype: torch.dtype) -> None:
    x = values_of(kind, n, dtype)
    expected = None
    for level in native.isa_levels():
        native.set_isa(level)
        payload = entropy.encode_values(x, PLENTY, backend="cpu")
        assert payload is not None
        if expected is None:
            expected = payload
            if n < 40_000:
                reference = entropy.encode_values(x, PLENTY, backend="reference")
                assert reference is not None
                assert torch.equal(payload, reference)
        assert torch.equal(payload, expected)
        back = entropy.decode_values(payload, n, dtype, backend="cpu")
        assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))
        assert entropy.check_values(payload, n, dtype) is bool(torch.isfinite(x).all())
    if n in (33, 32769):
        back = entropy.decode_values(payload, n, dtype, backend="reference")
        assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


def test_values_at_any_thread_count(threads: int) -> None:
    x = values_of("normal", 500_000, torch.float32)
    payload = entropy.encode_values(x, PLENTY)
    torch.set_num_threads(1)
    alone = entropy.encode_values(x, PLENTY)
    torch.set_num_threads(threads)
    assert payload is not None
    assert alone is not None
    assert torch.equal(payload, alone)
    assert torch.equal(entropy.decode_values(payload, x.numel(), x.dtype), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_coded_values_gives_the_bits_of_adding_values(dtype: torch.dtype) -> None:
    x = values_of("normal", 70_001, dtype)
    payload = entropy.encode_values(x, PLENTY)
    assert payload is not None
    acc = fs.ops.Accumulator(x.numel())
    acc.add(x, 0.3)
    sums = torch.zeros(x.numel(), dtype=torch.float64)
    entropy.add_values_(sums, payload, dtype, 0.3)
    assert torch.equal(sums.view(torch.int64), acc.sums.view(torch.int64))


def trained_survivors() -> Tensor:
    """The largest tenth of the weights of a network trained on a small task."""
    torch.manual_seed(3)
    x = torch.randn(512, 64)
    y = (x @ torch.randn(64, 10)).argmax(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU(),
        torch.nn.Linear(256, 10),
    )  # fmt: skip
    step = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(30):
        step.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        step.step()
    p = fs.flatten(net)
    keep = p.layout.eligible // 10
    mask = fs.ops.magnitude_mask(p.prunable, keep, within=p.mask)
    return fs.ops.pack(p.prunable.detach(), mask)


def test_survivors_of_a_trained_network_shrink() -> None:
    x = trained_survivors()
    for dtype, most in ((torch.float32, 28 / 32), (torch.bfloat16, 11.5 / 16)):
        values = fs.ops.cast(x, dtype)[0]
        payload = entropy.encode_values(values, values.nbytes)
        assert payload is not None
        assert payload.numel() <= most * values.nbytes


def outcome(read: object, *args: object, **options: object) -> object:
    try:
        return read(*args, **options)  # type: ignore[operator]
    except entropy.PayloadError as error:
        return str(error)


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return type(a) is type(b) and a == b


@settings(max_examples=150)
@given(st.data())
def test_broken_masks_get_one_verdict(data: st.DataObject) -> None:
    torch.manual_seed(1)
    mask, runs = shaped([300, 2000, 5, 900], [0.2, 0.05, 1.0, 0.7], 2)
    payload = entropy.encode_mask(mask.words, runs, counts_in(mask, runs), PLENTY)
    assert payload is not None
    broken = damage(payload, data)
    verdicts = [
        outcome(entropy.decode_mask, broken, runs, mask.numel, backend=b)
        for b in ("cpu", "reference")
    ]
    assert same(*verdicts), verdicts


@settings(max_examples=100)
@given(st.data())
def test_broken_values_get_one_verdict(data: st.DataObject) -> None:
    torch.manual_seed(1)
    dtype = data.draw(st.sampled_from(DTYPES))
    x = values_of("odd", 300, dtype)
    payload = entropy.encode_values(x, PLENTY)
    assert payload is not None
    broken = damage(payload, data)
    verdicts = [
        outcome(entropy.decode_values, broken, 300, dtype, backend=b) for b in ("cpu", "reference")
    ]
    assert same(*verdicts), verdicts
    if isinstance(verdicts[0], str):
        assert outcome(entropy.check_values, broken, 300, dtype) == verdicts[0]


def damage(payload: Tensor, data: st.DataObject) -> Tensor:
    broken = payload.clone()
    where = st.integers(0, payload.numel() - 1)
    for at, value in data.draw(st.lists(st.tuples(where, st.integers(0, 255)), max_size=3)):
        broken[at] = value
    return (
        broken[: data.draw(st.integers(0, payload.numel()))] if data.draw(st.booleans()) else broken
    )


def message_of(p: fs.FlatParameters, **options: object) -> tuple[codec.Message, codec.Message]:
    """(decoded at once, checked and kept as bytes)"""
    data = codec.encode(p, p.mask, **options)  # type: ignore[arg-type]
    base = options.get("base")
    return (
        codec.decode(data, p.layout, base=base),  # type: ignore[arg-type]
        codec.decode(data, p.layout, base=base, materialize=False),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("coding", ["entropy", "raw"])
def test_messages_add_themselves(dtype: str, coding: str) -> None:
    p = fs.flatten(torch.nn.Linear(200, 300))
    for message in message_of(p, dtype=dtype, coding=coding):
        expected, got = fs.ops.Accumulator(p.mask.nnz), fs.ops.Accumulator(p.mask.nnz)
        message.add_to(got, 3)
        expected.add(message.packed, 3)
        assert got.total == expected.total
        assert torch.equal(got.sums.view(torch.int64), expected.sums.view(torch.int64))


@pytest.mark.parametrize("kept", [False, True])
def test_large_checked_messages_keep_their_bytes_only(kept: bool) -> None:
    """Small ones keep what was decoded to check them."""
    p = fs.flatten(torch.nn.Linear(200, 300) if kept else torch.nn.Linear(600, 500))
    _, lazy = message_of(p)
    assert lazy.sections[16].encoding == 1
    lazy.add_to(fs.ops.Accumulator(p.mask.nnz), 1)
    assert ("packed" in lazy.__dict__) is kept
    p.prunable.detach()[5] = float("nan")
    for message in message_of(p):
        assert not message.all_finite()


def test_int8_carries_its_error_to_the_next_message() -> None:
    p = fs.flatten(torch.nn.Linear(64, 64))
    residual = torch.zeros(p.mask.nnz)
    packed = fs.ops.pack(p.prunable.detach(), p.mask)
    sent = torch.zeros(p.mask.nnz)
    for rounds in range(1, 9):
        data = codec.encode(p, p.mask, dtype="int8", block=64, residual=residual)
        message = codec.decode(data, p.layout)
        assert message.dtype == "int8"
        assert message.encode() == data
        sent += message.packed
        scale = packed.abs().max() / 127
        assert (sent - rounds * packed).abs().max() <= scale  # errors do not add up
    assert message.tail.dtype == torch.float32
    assert torch.equal(message.tail, p.tail.detach())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_streaming_a_hundred_messages_needs_the_memory_of_one() -> None:
    code = """
import re, torch
from pathlib import Path
import fedmap_sparse as fs
from fedmap_sparse import codec

def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

p = fs.flatten(torch.nn.Linear(2000, 1000))
data = codec.encode(p, p.mask, num_samples=1)
acc = fs.ops.Accumulator(p.mask.nnz)

def add():
    message = codec.decode(data, p.layout, materialize=False)
    message.add_to(acc, message.num_samples)
    return message

add()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = peak()
for _ in range(99):
    add()
print(peak() - before)
add().packed
print(peak() - before)
"""
    # Freed blocks go back to the system, so that what is resident is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    streamed, decoded = map(int, run.stdout.split())
    assert streamed < 1024, (streamed, decoded)  # KiB; a float32 copy takes 7,812
    assert decoded > 4096, (streamed, decoded)  # which this test would notice
