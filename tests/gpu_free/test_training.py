"""A model pruned round by round: what is compiled anew; and that no launcher waits for a device."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from gpucheck.driver import compile_only
from ladder.catalogue import Workload, workloads
from torch import Tensor

import fedmap_sparse as fs
from fedmap_sparse import _transfer, triton_kernels
from fedmap_sparse.mask import num_ranks, num_words
from fedmap_sparse.ops._segments import ZEROED, Segments
from fedmap_sparse.triton_kernels import (
    _digest,
    _scan,
    accumulate,
    extract,
    masked_adamw,
    masked_sgd,
    pack,
    quantize,
    select,
)

_N = 100_000
_WAITS = ("item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__",
          "nonzero", "is_nonzero")  # fmt: skip


def train(rounds: int) -> Iterator[int]:
    """What a party launches in each round as density falls from 1 to 0.1; yields rounds."""
    values, grad = torch.randn(_N), torch.randn(_N)
    mask = fs.Mask.full(_N)
    for r in range(rounds):
        keep = round(_N * (1 - 0.9 * (r + 1) / rounds)) - 7 * r
        words, rank = select.magnitude_mask([values], [mask.words], mask.nnz, keep)
        # Nothing ran: the mask is made here.
        kept = torch.zeros(_N, dtype=torch.bool)
        kept[mask.to_bool().nonzero().flatten()[:keep]] = True
        child = fs.Mask.from_bool(kept)
        assert (words.numel(), rank.numel()) == (num_words(_N), num_ranks(_N))
        select.zero_pruned_(values, mask.words, child.words)
        extract.extract(child.words, mask.words, mask.rank, _N, mask.nnz)
        extract.deposit(child.words, mask.words, mask.rank, _N, mask.nnz)
        mask = child
        packed, half = torch.empty(mask.nnz), torch.empty(mask.nnz, dtype=torch.bfloat16)
        pack.pack_out(values, mask.words, mask.rank, packed)
        pack.unpack_out(packed, mask.words, mask.rank, values)
        segments = Segments([0], [_N])
        segments.rows[0, 3] = ZEROED
        state = torch.zeros(mask.nnz)
        table = (mask.words, mask.rank, _N, mask.nnz, [grad], segments.rows, segments.scalars)
        masked_sgd.masked_sgd_(values, *table, state, None)
        masked_adamw.masked_adamw_(values, *table, state, state.clone(), None, None)
        quantize.cast_out(packed, half)
        q, scales = torch.empty(mask.nnz, dtype=torch.int8), torch.empty(-(-mask.nnz // 256))
        quantize.quantize_int8_out(packed, 256, q, scales, None)
        accumulate.weighted_mean_out([packed] * (3 + r), [1.0 + r] * (3 + r), packed.clone())
        sums = torch.zeros(mask.nnz, dtype=torch.float64)
        accumulate.accumulate_add_(sums, packed, 1.0 + r)
        accumulate.accumulate_mean_out(sums, 2.0 + r, packed)
        _scan.rank_index(mask.words, _N)
        yield r


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Any]]:
    """Launches do nothing but tell what Triton would compile for them."""
    compiled: set[Any] = set()

    def note(
        kernel: Any,
        grid: tuple[int, ...],
        *given: Any,
        num_warps: int = 4,
        maxnreg: int | None = None,
        **constants: Any,
    ) -> None:
        bind = kernel.device_caches[triton.runtime.driver.active.get_current_device()][4]
        meaning = bind(*given, **constants)[1]
        compiled.add((kernel.fn, str(meaning), num_warps, maxnreg))

    with compile_only(90):
        for module in pkgutil.iter_modules(triton_kernels.__path__):
            loaded = importlib.import_module(f"fedmap_sparse.triton_kernels.{module.name}")
            if hasattr(loaded, "launch"):
                monkeypatch.setattr(loaded, "launch", note)
        yield compiled


def test_compilations_over_20_rounds(launched: set[Any]) -> None:
    """After the first round at most two: packing and unpacking change shape as density falls."""
    counts = [len(launched) for _ in train(20)]
    assert counts[0] > 15
    assert counts[-1] - counts[0] <= 2, counts


@contextlib.contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Notes each call that would fetch a number from a device, if its tensor lay on one."""
    calls: list[str] = []

    def watch(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def watched(self: Tensor, *arguments: Any, **named: Any) -> Any:
            calls.append(name)
            return original(self, *arguments, **named)

        monkeypatch.setattr(torch.Tensor, name, watched)

    for name in _WAITS:
        watch(name)
    yield calls
    monkeypatch.undo()


#: What a launcher may read on the host, because it lies there: the rows of a table.
_ON_THE_HOST = {"masked_sgd": {"numpy"}, "masked_adamw": {"numpy"}}


@functools.cache
def catalogue() -> dict[str, Workload]:
    return {w.name: w for w in workloads(4096)}


@pytest.mark.parametrize("name", [w.name for w in workloads(64)])
def test_no_launcher_waits_for_the_device(
    name: str, launched: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = catalogue()[name]
    with no_waiting(monkeypatch) as calls:
        workload.run()
    assert launched
    assert set(calls) <= _ON_THE_HOST.get(workload.stem, set())


def test_a_digest_waits_for_its_16_bytes_alone(
    launched: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch works: a digest is a number of the host, and is fetched once, its sums not."""
    with no_waiting(monkeypatch) as calls:
        sums = _digest.digest_sums(torch.zeros(64, dtype=torch.int32))
    assert calls == []
    with no_waiting(monkeypatch) as calls:
        _transfer.fetch(sums)
    assert calls == ["tolist"]


def test_the_ticket_is_ordered_in_ptx() -> None:
    """The last program of a launch reads what the others counted. What orders that is in the code:
    the block's barrier, an atomic that acquires and releases at the device's scope, and a barrier
    before anybody of the block reads on."""
    with compile_only(90) as kernels:
        select.magnitude_mask([torch.randn(_N)], [None], _N, _N // 10)
    seen = 0
    for kernel in kernels.values():
        ptx, name = kernel.asm["ptx"], kernel.metadata.name
        for ticket in re.finditer(r"[^\n]*\batom\.[^\n]*acq_rel[^\n]*", ptx):
            assert re.search(r"\.(gpu|sys)\.", ticket[0]), ticket[0]
            before = ptx[: ticket.start()].rpartition("bar.sync")
            after = ptx[ticket.end() :].partition("bar.sync")
            assert before[1], f"{name}: no barrier before the ticket"
            assert after[1], f"{name}: no barrier after it"
            for between in (before[2], after[0]):
                assert not re.search(r"\b(ld|st|atom|red)\.global", between), (name, between)
            seen += 1
    assert seen >= 4  # the sample's, and each refinement's
