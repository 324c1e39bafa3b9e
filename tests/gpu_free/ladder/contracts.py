"""What every device must do: each op against its reference, bit for bit.

One set of contracts for the rungs of the ladder (small, on CPU tensors) and for real devices.
`show` tells a rung of tensors that kernels reach through tables of addresses.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fedmap_sparse as fs
from fedmap_sparse import ops
from fedmap_sparse.mask import digest_of, digest_reference
from fedmap_sparse.ops import masked_adamw as adamw
from fedmap_sparse.ops import masked_sgd as sgd
from fedmap_sparse.ops._segments import SKIPPED, ZEROED, Segments
from fedmap_sparse.triton_kernels import _tuning

Show = Callable[..., None]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def same(got: Tensor, want: Tensor, widened: bool = False) -> bool:
    """Equal bits, NaN payloads and signs of zero too.

    `widened`: converted to a wider dtype, where torch leaves a NaN's payload to the device.
    """
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    if widened:
        if not torch.equal(got.isnan(), want.isnan()):
            return False
        got, want = got.nan_to_num(0.0, torch.inf), want.nan_to_num(0.0, torch.inf)
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    return torch.equal(got.contiguous().view(kind).cpu(), want.contiguous().view(kind).cpu())


def same_mask(got: fs.Mask, want: fs.Mask) -> bool:
    return got == want and torch.equal(got.rank, want.rank)


def special(n: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal values; among them NaN of both signs, infinities, zeros, subnormals, large ones."""
    x = torch.randn(n)
    if n < 20:  # torch's own scatter of one NaN changes its bits
        return x.to(dtype).to(device)
    extra = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, 7e4, 1e38, 65519.99]
    x[torch.randperm(n)[: len(extra)]] = torch.tensor(extra)
    x = x.to(dtype)
    bits = x.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[17] = -1  # a negative NaN with every payload bit
    return x.to(device)


def mask_of(n: int, density: float, device: str, holes: bool = False) -> fs.Mask:
    """Random; with `holes` also a stretch without survivors and one without pruned elements."""
    keep = torch.rand(n) < density
    if holes:
        keep[n // 4 : n // 2] = False
        keep[n // 2 : 5 * n // 8] = True
    return fs.Mask.from_bool(keep.to(device))


def pack(n: int, density: float, dtype: torch.dtype, device: str, show: Show) -> None:
    mask, values = mask_of(n, density, device, holes=True), special(n, dtype, device)
    want = ops.pack(values, mask, backend="reference")
    assert same(ops.pack(values, mask, backend="triton"), want)
    assert same(
        ops.unpack(want, mask, backend="triton"), ops.unpack(want, mask, backend="reference")
    )
    for to in FLOATS:
        packed, dense = (torch.full((k,), 7.0, dtype=to, device=device) for k in (mask.nnz, n))
        ops.pack(values, mask, out=packed, backend="triton")
        ops.unpack(want, mask, out=dense, backend="triton")
        wider = to == torch.float32 != dtype
        expected = ops.pack(values, mask, out=torch.empty_like(packed), backend="reference")
        assert same(packed, expected, wider)
        expected = ops.unpack(want, mask, out=torch.empty_like(dense), backend="reference")
        assert same(dense, expected, wider)


def extract_in_chunks(device: str, show: Show) -> None:
    """By one program that joins the counts of several chunks, as from 134 million elements on."""
    scan = importlib.import_module("fedmap_sparse.triton_kernels._scan")
    parent = mask_of(2048 * 258, 0.02, device)
    child = fs.Mask.from_bool(parent.to_bool() & (torch.rand(parent.numel) < 0.5).to(device))
    whole = scan._PROGRAMS
    try:
        scan._PROGRAMS = 1
        with mock.patch.object(_tuning, "EXTRACT_WORDS", 64):
            kept = ops.extract(child, parent, backend="triton")
    finally:
        scan._PROGRAMS = whole
    assert same_mask(kept, ops.extract(child, parent, backend="reference"))


def deposit(n: int, density: float, device: str, show: Show) -> None:
    parent = mask_of(n, density, device, holes=True)
    for share in (0.0, 0.3, 1.0):
        child = fs.Mask.from_bool(parent.to_bool() & (torch.rand(n) < share).to(device))
        kept = ops.extract(child, parent, backend="triton")
        assert same_mask(kept, ops.extract(child, parent, backend="reference"))
        assert same_mask(ops.deposit(kept, parent, backend="triton"), child)


#: A segment that is kept whole at its start, one with holes, one of the tail.
_SKIPPING = [0, 2, 4]


def _model(
    density: float, dtype: torch.dtype, device: str, aligned: bool
) -> tuple[fs.Mask, Tensor, Segments, list[Tensor | None]]:
    """A flat buffer with prunable tensors and a tail; sizes odd, one gradient missing.

    The first tensor is kept whole, so that flat streams are exercised at every density.
    """
    shapes = ((0, 9000), (9088, 130), (9344, 3001), (12416, 8), (12424, 4500))
    prunable, numel = 12416, 12424 + 4504
    keep = torch.zeros(prunable, dtype=torch.bool)
    for offset, size in shapes[:3]:
        keep[offset : offset + size] = torch.rand(size) < density
    keep[:4096] = True
    mask = fs.Mask.from_bool(keep.to(device))
    values = torch.randn(numel).to(dtype)
    values[:prunable][~keep] = 0.0
    segments = Segments([o for o, _ in shapes], [s for _, s in shapes])
    grads: list[Tensor | None] = []
    for _, size in shapes:
        room = torch.randn(size + 8, device=device).to(dtype)
        grads.append(room[:size] if aligned else room[1 : size + 1])
    grads[3] = None
    return mask, values.to(device), segments, grads


def _compare_steps(
    step: Callable[..., Any],
    values: Tensor,
    states: list[Tensor | None],
    show: Show,
    grads: list[Tensor | None],
) -> None:
    show(**{f"grad{i}": g for i, g in enumerate(grads) if g is not None})
    results = []
    for backend in ("reference", "triton"):
        fresh = [None if t is None else t.clone() for t in (values, *states)]
        step(*fresh, backend)
        results.append(fresh)
    for want, got in zip(*results, strict=True):
        assert want is None or got is None or same(got, want)


def masked_sgd(density: float, dtype: torch.dtype, device: str, show: Show, **how: bool) -> None:
    mask, values, segments, grads = _model(density, dtype, device, how.get("aligned", True))
    size = mask.nnz + values.numel() - mask.numel
    flags = [sgd.sgd_flags(nesterov=i % 2 == 0, maximize=i == 2, first=i == 4) for i in range(5)]
    for i, flag in enumerate(flags):
        segments.rows[i, 3] = flag | (ZEROED if how.get("zeroed") else 0)
        momentum, decay = (0.0 if i == 1 else 0.9), (0.0 if i == 2 else 0.01)
        segments.scalars[i, :4] = torch.tensor([0.1 / (i + 1), momentum, 0.1 * i, decay])
    if how.get("skipped"):
        segments.scalars[_SKIPPING, SKIPPED] = 1.0
    if not how.get("zeroed"):
        values[:8][::2] = 0.5
        values[9000] = 3.0  # padding: no segment covers it
        values[9100:9120] = 4.0  # pruned here and there, and not zero
    momentum_buffer = torch.randn(size, device=device) if how.get("momentum", True) else None
    master = None if dtype == torch.float32 else torch.randn(size, device=device)

    def step(v: Tensor, m: Tensor | None, master: Tensor | None, backend: str) -> None:
        sgd.step_segments_(
            v, mask, grads, segments, momentum_buffer=m, master=master, backend=backend
        )

    _compare_steps(step, values, [momentum_buffer, master], show, grads)


def masked_adamw(density: float, dtype: torch.dtype, device: str, show: Show, **how: bool) -> None:
    mask, values, segments, grads = _model(density, dtype, device, how.get("aligned", True))
    size = mask.nnz + values.numel() - mask.numel
    amsgrad = how.get("amsgrad", False)
    for i in range(5):
        flag = adamw.adamw_flags(maximize=i == 2, amsgrad=amsgrad and i % 2 == 0)
        segments.rows[i, 3] = flag | (ZEROED if how.get("zeroed") else 0)
        decay, t = (0.0 if i == 1 else 0.02), i + 1
        scalars = [0.01 * t, 0.9, 0.999, 1e-8, decay, 0.9**t, 0.999**t, 0.0]
        segments.scalars[i] = torch.tensor(scalars, dtype=torch.float64)
    if how.get("skipped"):
        segments.scalars[_SKIPPING, SKIPPED] = 1.0
    states: list[Tensor | None] = [
        torch.randn(size, device=device),
        torch.rand(size, device=device),
        torch.rand(size, device=device) if amsgrad else None,
        None if dtype == torch.float32 else torch.randn(size, device=device),
    ]

    def step(v: Tensor, *args: Any) -> None:
        first, second, largest, master, backend = args
        adamw.step_segments_(
            v, mask, grads, segments, exp_avg=first, exp_avg_sq=second, max_exp_avg_sq=largest,
            master=master, backend=backend,
        )  # fmt: skip

    _compare_steps(step, values, states, show, grads)


def accumulate(n: int, dtype: torch.dtype, device: str, show: Show, *, aligned: bool) -> None:
    rooms = [(torch.randn(n + 1) * 10.0 ** (i - 1)).to(dtype).to(device) for i in range(3)]
    payloads = [room[:n] if aligned else room[1:] for room in rooms]
    weights = [1.0, 0.3, 700.0]
    show(**{f"payload{i}": p for i, p in enumerate(payloads)})
    for to in FLOATS:
        want, got = (torch.full((n,), 7.0, dtype=to, device=device) for _ in range(2))
        ops.weighted_mean(payloads, weights, out=want, backend="reference")
        ops.weighted_mean(payloads, weights, out=got, backend="triton")
        assert same(got, want)
        stream = ops.Accumulator(n, device=device, backend="triton")
        for payload, weight in zip(payloads, weights, strict=True):
            stream.add(payload, weight)
        assert same(stream.mean(dtype=to), want)


def mean_rounds_once(device: str, show: Show) -> None:
    """Means a little above a tie of the 16-bit types, and so little that float32 cannot tell."""
    payloads = [torch.tensor([2 + 2**-7, 2 + 2**-10]), torch.tensor([2.0**-37, 2.0**-37])]
    payloads = [p.to(device) for p in payloads]
    show(first=payloads[0], second=payloads[1])
    for to, at, want in ((torch.bfloat16, 0, 1 + 2**-7), (torch.float16, 1, 1 + 2**-10)):
        out = torch.empty(2, dtype=to, device=device)
        ops.weighted_mean(payloads, [1.0, 1.0], out=out, backend="triton")
        assert float(out[at]) == want


def _apart(count: int, n: int, device: str, aligned: bool) -> list[Tensor]:
    rooms = [(torch.randn(n + 1) * 10.0 ** (i % 3 - 1)).round(decimals=2) for i in range(count)]
    return [room.to(device)[:n] if aligned else room.to(device)[1:] for room in rooms]


def trimmed(count: int, trim: int, n: int, device: str, show: Show, *, aligned: bool) -> None:
    vectors = _apart(count, n, device, aligned)
    if trim:
        vectors[0][: n // 2] = math.inf
        vectors[-1][: n // 3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # NaN
    show(**{f"vector{i}": v for i, v in enumerate(vectors)})
    want, got = (torch.full((n,), 7.0, device=device) for _ in range(2))
    ops.trimmed_mean(vectors, trim, out=want, backend="reference")
    ops.trimmed_mean(vectors, trim, out=got, backend="triton")
    assert same(got, want)


def distances(count: int, n: int, device: str, show: Show) -> None:
    vectors = _apart(count, n, device, False)
    show(**{f"vector{i}": v for i, v in enumerate(vectors)})
    for others in ([], vectors[:1], vectors[1:]):
        want = ops.squared_distances(vectors, others, backend="reference")
        assert same(ops.squared_distances(vectors, others, backend="triton"), want)


def rank_index(n: int, device: str, show: Show) -> None:
    """By several programs, and by one in several chunks, as from 134 million elements on.

    A chunk of 512: with fewer elements than threads, several would hold one, and race.
    """
    scan = importlib.import_module("fedmap_sparse.triton_kernels._scan")
    mask = mask_of(n, 0.5, device)
    whole = scan._CHUNK, scan._PROGRAMS
    try:
        for chunk, programs in (whole, (512, 64), (512, 1)):
            scan._CHUNK, scan._PROGRAMS = chunk, programs
            assert torch.equal(scan.rank_index(mask.words, n), mask.rank)
    finally:
        scan._CHUNK, scan._PROGRAMS = whole


def digest(n: int, device: str, show: Show) -> None:
    module = importlib.import_module("fedmap_sparse.triton_kernels._digest")
    words = mask_of(n, 0.4, device).words
    assert digest_of(module.digest_sums(words).tolist(), n) == digest_reference(words, n)


def all_finite(n: int, dtype: torch.dtype, device: str, show: Show) -> None:
    module = importlib.import_module("fedmap_sparse.triton_kernels.quantize")
    values = torch.randn(n).to(dtype).to(device)
    assert bool(module.all_finite(values))
    for at, wrong in ((0, math.inf), (n // 2, -math.inf), (n - 1, math.nan)):
        broken = values.clone()
        broken[at] = wrong
        assert not bool(module.all_finite(broken))


def cast(n: int, dtype: torch.dtype, device: str, show: Show) -> None:
    values = special(n, dtype, device)
    for to in FLOATS:
        want, overflowed = ops.cast(values, to, backend="reference")
        got, count = ops.cast(values, to, backend="triton")
        assert same(got, want, widened=to == torch.float32 != dtype)
        assert count == overflowed


def quantize(n: int, block: int, device: str, show: Show, *, feedback: bool) -> None:
    values = torch.randn(n, device=device)
    values[: n // 4] = 0.0
    values[n // 4 : n // 2] *= 1e-43  # scales that are subnormal or underflow
    residuals = [torch.randn(n, generator=torch.Generator().manual_seed(1)).to(device) * 1e-3] * 2
    residuals = [r.clone() for r in residuals]
    values[: min(n, block)] = 0.0
    residuals[0][:block] = residuals[1][:block] = 0.0
    out = []
    for backend, residual in zip(("reference", "triton"), residuals, strict=True):
        q, scales = ops.quantize_int8(
            values, block=block, residual=residual if feedback else None, backend=backend
        )
        out.append(
            (q, scales, residual, ops.dequantize_int8(q, scales, block=block, backend=backend))
        )
    for want, got in zip(*out, strict=True):
        assert same(got, want)


def select(values: Tensor, keep: int, within: fs.Mask | None, show: Show) -> None:
    want = ops.magnitude_mask(values, keep, within=within, backend="reference")
    assert same_mask(ops.magnitude_mask(values, keep, within=within, backend="triton"), want)
    if keep:
        threshold = ops.magnitude_threshold(values, keep, within=within, backend="triton")
        expected = ops.magnitude_threshold(values, keep, within=within, backend="reference")
        assert same(threshold, expected)


def select_list(values: list[Tensor], keep: int, within: list[fs.Mask | None], show: Show) -> None:
    got = ops.magnitude_mask(values, keep, within=within, backend="triton")
    want = ops.magnitude_mask(values, keep, within=within, backend="reference")
    assert all(same_mask(a, b) for a, b in zip(got, want, strict=True))


def prune(n: int, keep: int, within: fs.Mask | None, dtype: torch.dtype, device: str) -> None:
    values = torch.randn(n).to(dtype).to(device)
    pruned, expected = values.clone(), values.clone()
    got = ops.prune_(pruned, keep, within=within, backend="triton")
    want = ops.prune_(expected, keep, within=within, backend="reference")
    assert same_mask(got, want)
    assert same(pruned, expected)


def hidden_from_the_sample(n: int, dtype: torch.dtype, device: str) -> Tensor:
    """Distinct values, small in each word that a selection samples and large in every other."""
    words = n // 32
    runs = max(1, min(words, min(n, max(16384, min(65536, n // 64))) // 32))
    run = torch.arange(runs)
    begin, end = run * words // runs, (run + 1) * words // runs
    mixed = ((run * 0x9E3779B1) & 0xFFFFFFFF) >> 8
    values = torch.rand(n) + 1.0
    for word in (begin + mixed % (end - begin)).tolist():
        values[32 * word : 32 * word + 32] *= 0.1
    return values.to(dtype).to(device)


def select_places_in_chunks(device: str, show: Show) -> None:
    """The scan of a selection over 2600 blocks behind 20 ties, by three programs."""
    module = importlib.import_module("fedmap_sparse.triton_kernels.select")
    blocks, allowed = 2600, 700
    kept = torch.randint(0, 9, (blocks,), dtype=torch.int32)
    ties = torch.randint(0, 2, (10 + blocks,), dtype=torch.int32)
    ties[:10] = 2
    through = ties.to(torch.int64).cumsum(0)
    want = torch.zeros(blocks + 1, dtype=torch.int64)
    want[1:] = kept.cumsum(0) + through[10:].clamp(max=allowed) - 20
    state = torch.zeros(16, dtype=torch.int64)
    state[3] = allowed
    padded = torch.nn.functional.pad(kept, (10, 0))
    rank, before = (torch.empty(s, dtype=torch.int64) for s in (blocks + 1, blocks + 10))
    state, padded, ties, before, rank = (t.to(device) for t in (state, padded, ties, before, rank))
    module._place[(3,)](
        state, padded, ties, before, rank, blocks, 10, 1024, CHUNK=1024, num_warps=8
    )
    assert torch.equal(rank.cpu(), want)
    assert torch.equal(before[10:].cpu(), (through - ties.cpu())[10:])
    assert int(state[15]) == int(through[-1])
