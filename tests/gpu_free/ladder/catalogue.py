"""Every kernel at work: launches whose machine code, bytes and sectors are accounted for.

They call the launchers, which never wait for the device, so that they can be compiled without
being run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import fedmap_sparse as fs
from fedmap_sparse.ops import _payload
from fedmap_sparse.ops import entropy as coder
from fedmap_sparse.ops._segments import ZEROED, Segments
from fedmap_sparse.triton_kernels import (
    _scan,
    accumulate,
    distances,
    entropy,
    extract,
    masked_adamw,
    masked_sgd,
    pack,
    quantize,
    select,
    trimmed,
)

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Workload:
    """One op at one size; `floor` is the bytes per element that any method must move."""

    name: str
    numel: int
    run: Callable[[], object]
    floor: float
    #: The most that the op may touch and ask for, in units of the floor.
    touch_limit: float
    request_limit: float
    shown: dict[str, Tensor] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        return self.name.split()[0]


def touched(density: float, lanes: int = 8) -> float:
    """Share of sectors (or lines) of `lanes` elements that hold a survivor."""
    return 1 - (1 - density) ** lanes


def _masks(n: int, density: float, device: torch.device) -> fs.Mask:
    return fs.Mask.from_bool(torch.rand(n, device=device) < density)


def _packing(n: int, device: torch.device) -> Iterator[Workload]:
    for dtype in (F32, BF16):
        size, short = dtype.itemsize, str(dtype).removeprefix("torch.")
        for density in (1.0, 0.5, 0.1):
            mask, values = _masks(n, density, device), torch.randn(n, device=device).to(dtype)
            packed = torch.empty(mask.nnz, dtype=dtype, device=device)
            moved = size * density + 0.125
            read = size * touched(density, 32 // size)
            # By elements, a warp's survivors are those of one word: what it asks for begins and
            # ends within a sector that its neighbour asks for too, from a cache.
            yield Workload(
                f"pack {short} {density}",
                n,
                lambda v=values, m=mask, p=packed: pack.pack_out(v, m.words, m.rank, p),
                moved + read,
                1.05,
                {(F32, 0.5): 1.2, (BF16, 0.5): 1.4}.get((dtype, density), 1.1),
            )
            yield Workload(
                f"unpack {short} {density}",
                n,
                lambda v=values, m=mask, p=packed: pack.unpack_out(p, m.words, m.rank, v),
                moved + size,
                1.05,
                1.1 if density == 1 else 1.25 if dtype == F32 else 1.5,
            )


def _nesting(n: int, device: torch.device) -> Iterator[Workload]:
    for density in (0.5, 0.1):
        parent = _masks(n, density, device)
        child = fs.Mask.from_bool(parent.to_bool() & (torch.rand(n, device=device) < 0.8))
        kept = fs.ops.extract(child, parent, backend="reference")
        index = 8 / 2048
        yield Workload(
            f"extract {density}",
            n,
            lambda c=child, p=parent: extract.extract(c.words, p.words, p.rank, p.numel, p.nnz),
            # Counts of a program and of two blocks, for 128 words, written and read.
            0.25 + density / 8 + index + index * density + 2 * 12 / 4096,
            1.05,
            # A program reads on for its last word, and one iteration ahead: 64 words of 128 that
            # the next program reads too, from a cache. On an H200 programs of 256 took longer.
            1.65,
        )
        yield Workload(
            f"deposit {density}",
            n,
            lambda k=kept, p=parent: extract.deposit(k.words, p.words, p.rank, p.numel, p.nnz),
            0.125 * 2 + density / 8 + 3 * index,
            1.05,
            1.1,
        )
    mask = _masks(n, 0.5, device)
    yield Workload(
        "rank_index", n, lambda: _scan.rank_index(mask.words, n), 0.125 + 24 / 2048, 1.05, 1.05
    )


def _stepping(n: int, device: torch.device) -> Iterator[Workload]:
    for rule in ("masked_sgd", "masked_adamw"):
        for dtype, density in ((F32, 1.0), (F32, 0.5), (F32, 0.1), (F32, 0.01), (BF16, 0.1)):
            mask, values = _masks(n, density, device), torch.randn(n, device=device).to(dtype)
            grads: list[Tensor | None] = [torch.randn(n, device=device).to(dtype)]
            segments = Segments([0], [n])
            segments.rows[0, 3] = ZEROED
            scalars = [0.1, 0.9, 0.99, 1e-8, 0.01, 0.5, 0.5, 0.0]
            segments.scalars[0] = torch.tensor(scalars)
            states = [
                torch.rand(mask.nnz, device=device)
                for _ in range(2 if rule == "masked_adamw" else 1)
            ]
            master = None if dtype == F32 else torch.rand(mask.nnz, device=device)
            size, held = dtype.itemsize, len(states) + (master is not None)
            table = (mask.words, mask.rank, n, mask.nnz, grads, segments.rows, segments.scalars)
            streams = 3  # weights are read with masters too: one that is not its master was written

            def run(
                rule: str = rule,
                v: Tensor = values,
                t: tuple = table,
                s: list[Tensor] = states,
                m: Tensor | None = master,
            ) -> None:
                if rule == "masked_sgd":
                    masked_sgd.masked_sgd_(v, *t, s[0], m)
                else:
                    masked_adamw.masked_adamw_(v, *t, s[0], s[1], None, m)

            yield Workload(
                f"{rule} {str(dtype).removeprefix('torch.')} {density}",
                n,
                run,
                0.125 + 8 * held * density + streams * size * touched(density, 32 // size),
                1.05,
                # At density 0.5 a warp's survivors span eight sectors and a part, and SGD's, of one
                # word, begin and end within a sector; at 0.01 each program asks for its segment's
                # row and scalars as for a tenth of its survivors, at 0.1 for a fiftieth.
                {0.5: 1.3 if rule == "masked_sgd" else 1.12, 0.1: 1.13, 0.01: 1.35}.get(
                    density, 1.1
                ),
                {"grad": grads[0]},  # type: ignore[dict-item]
            )


def _accumulating(n: int, device: torch.device) -> Iterator[Workload]:
    for dtype in (F32, BF16):
        size, short = dtype.itemsize, str(dtype).removeprefix("torch.")
        payloads = [torch.randn(n, device=device).to(dtype) for _ in range(10)]
        out = torch.empty(n, dtype=dtype, device=device)
        sums = torch.zeros(n, dtype=torch.float64, device=device)
        weights = [float(i + 1) for i in range(10)]
        yield Workload(
            f"weighted_mean 10 {short}",
            n,
            lambda p=payloads, w=weights, o=out: accumulate.weighted_mean_out(p, w, o),
            11.0 * size,
            1.01,
            1.1,
            {f"payload{i}": p for i, p in enumerate(payloads)},
        )
        yield Workload(
            f"accumulate_add {short}",
            n,
            lambda s=sums, p=payloads: accumulate.accumulate_add_(s, p[0], 3.0),
            16.0 + size,
            1.01,
            1.1,
        )
        yield Workload(
            f"accumulate_mean {short}",
            n,
            lambda s=sums, o=out: accumulate.accumulate_mean_out(s, 3.0, o),
            8.0 + size,
            1.01,
            1.1,
        )


def _comparing(n: int, device: torch.device) -> Iterator[Workload]:
    """What looks at every client's vector, by elements and by pairs."""
    vectors = [torch.randn(n, device=device) for _ in range(50)]
    out = torch.empty(n, device=device)
    shown = {f"vector{i}": v for i, v in enumerate(vectors)}
    for count, trim in ((10, 4), (10, 1), (50, 24)):
        yield Workload(
            f"trimmed_mean {count} less {trim}",
            n,
            lambda v=vectors[:count], t=trim: trimmed.trimmed_mean_out(v, t, out),
            4.0 * (count + 1),
            1.01,
            1.1 if count == 10 else 1.3,  # each warp asks for 50 addresses, and takes 32 elements
            shown,
        )
    yield Workload(
        "squared_distances 8 to 1",
        n,
        lambda: distances.squared_distances(vectors[:8], vectors[8:9]),
        4.0 * 9,
        1.01,
        1.15,  # four vectors a program, and the one beside them
        shown,
    )
    yield Workload(
        "squared_distances among 8",
        n,
        lambda: distances.squared_distances(vectors[:8], []),
        4.0 * 8,
        1.015,  # and the sums of each block
        3.05,  # three programs of four by four, from the caches
        shown,
    )


def _quantizing(n: int, device: torch.device) -> Iterator[Workload]:
    values, residual = torch.randn(n, device=device), torch.randn(n, device=device)
    q = torch.empty(n, dtype=torch.int8, device=device)
    scales = torch.empty(-(-n // 256), device=device)
    for to in (torch.float16, BF16):
        out = torch.empty(n, dtype=to, device=device)
        name = f"cast float32 {str(to).removeprefix('torch.')}"
        yield Workload(name, n, lambda o=out: quantize.cast_out(values, o), 6.0, 1.01, 1.05)
    for feedback in (None, residual):
        yield Workload(
            f"quantize_int8{'' if feedback is None else ' feedback'}",
            n,
            lambda r=feedback: quantize.quantize_int8_out(values, 256, q, scales, r),
            5.0 + 4 / 256 + (0 if feedback is None else 8),
            1.01,
            1.1,
        )
    yield Workload(
        "dequantize_int8", n, lambda: quantize.dequantize_int8(q, scales, 256), 5.02, 1.01, 1.1
    )


def _selecting(n: int, device: torch.device) -> Iterator[Workload]:
    within = _masks(n, 0.3, device)
    for dtype in (F32, BF16):
        values, short = torch.randn(n, device=device).to(dtype), str(dtype).removeprefix("torch.")
        size = dtype.itemsize
        yield Workload(
            f"select {short}",
            n,
            lambda v=values: select.magnitude_mask([v], [None], n, n // 10),
            size + 0.125,
            # 5.2 and 3.2 bytes per element from a million on; scratch of fixed size below
            5.2 / 4.125 if dtype == F32 else 3.2 / 2.125,
            # Candidates (3% of the values) are loaded again one by one, and each counts in a bin of
            # its own: a sector for 4 bytes, from the caches. The sample likewise, a fixed number.
            1.75 if dtype == F32 else 2.05,
        )
    wide = values.float()
    yield Workload(
        "select within 0.3",
        n,
        lambda: select.magnitude_mask([wide], [within.words], within.nnz, n // 10),
        0.25 + 4 * touched(0.3),
        1.3,
        1.55,
    )
    dense = torch.randn(n, device=device)
    yield Workload(
        "zero_pruned",
        n,
        lambda: select.zero_pruned_(dense, None, within.words),
        0.125 + 4 * touched(0.7),
        1.01,
        1.05,
    )


def _coding(n: int, device: torch.device) -> Iterator[Workload]:
    """A chain of steps a chunk: bound by latency, not by bytes. Its words are stored step by step,
    some ten of 16 bits at a time where a sector has sixteen, and pass through scratch, as their
    place is known last."""
    by = "cpu" if device.type == "cpu" else "triton"
    mask, room = _masks(n, 0.1, device), n + 10_000
    runs, nnz = _payload.Runs(torch.tensor([0]), torch.tensor([n])), torch.tensor([mask.nnz])
    codes = _payload.density_codes(runs.numel, nnz)
    coded, steps = _payload.coded_runs(runs, codes.tolist())
    payload = coder.encode_mask(mask.words, runs, nnz, room, backend=by)
    assert payload is not None
    opened, size = _payload.open_mask(payload, runs), payload.numel()
    chunk = opened.chunk
    head = torch.frombuffer(bytearray(_payload.mask_head(codes, chunk, steps)), dtype=torch.uint8)
    plan, head = coder._plan_and(head, coded, device)
    offsets = coder._table(coder._offsets(opened.sizes, opened.words_at // 2), device)
    inside = coder._padded(payload, device)
    none = torch.empty(0, 2, dtype=torch.int64)
    yield Workload(
        "encode_mask 0.1",
        n,
        lambda: entropy.encode_mask(mask.words, plan, steps, chunk, head, size),
        0.125 + size / n,
        1.7,
        2.0,
    )
    yield Workload(
        "decode_mask 0.1",
        n,
        lambda: entropy.decode_mask(
            inside, opened.states_at, offsets, plan, steps, chunk, none, mask.words.numel()
        ),
        0.125 + size / n,
        1.75,
        1.0,
    )
    for dtype in (F32, torch.float16, BF16):
        values, short = torch.randn(n, device=device).to(dtype), str(dtype).removeprefix("torch.")
        parts = _payload.value_parts(n, dtype)
        payload = coder.encode_values(values, 8 * n + 10_000, backend=by)
        assert payload is not None
        valued = _payload.open_values(payload, n, dtype)
        inside = coder._padded(payload, device)
        escapes = valued.entries["escapes"].astype("int64")
        words = coder._offsets(valued.sizes, parts[-1] // 2)
        places = coder._table(
            np.concatenate([words, coder._offsets(escapes, valued.escapes_at)]), device
        ).view(2, -1)
        each = payload.numel()
        floor = dtype.itemsize + each / n
        yield Workload(
            f"encode_values {short}",
            n,
            lambda v=values, p=parts, room=each: entropy.encode_values(v, p, room),
            floor,
            1.7,
            # Values are read twice, for the table and for the symbols, and the first of a chunk a
            # third time, to know where its exponents lie; a float32 plane of 16 bits makes a
            # thread's two loads of the first reading lie 32 bytes apart.
            2.15 if dtype == F32 else 1.75,
        )
        yield Workload(
            f"decode_values {short}",
            n,
            lambda i=inside, p=parts, at=places, d=dtype: entropy.decode_values(i, p, at, n, d),
            floor,
            # Symbols are read twice, to join values and to find escapes.
            1.5,
            # A step of a plane is 32 bytes that begin at no sector's start: two sectors, of which
            # the next step finds one in L1. Of three bits each byte is asked for by itself. One
            # warp's threads join eight values of a tile at a time, and ask for symbols and planes
            # twice, of L1: on an H200 1% faster than four values, which asked once.
            {F32: 1.45, BF16: 1.75}.get(dtype, 2.4),
        )


def each_workload(n: int, device: torch.device) -> Iterator[Workload]:
    """All of them over `n` elements, made as they are asked for."""
    from ladder import private  # which takes Workload from here

    torch.manual_seed(0)
    for part in (
        _packing, _nesting, _stepping, _accumulating, _comparing, _quantizing, _selecting, _coding,
        private.each_workload,
    ):  # fmt: skip
        yield from part(n, device)


def workloads(n: int) -> list[Workload]:
    """All of them over `n` elements, on the CPU."""
    return list(each_workload(n, torch.device("cpu")))
