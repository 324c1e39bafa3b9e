"""A fault planted in a copy of each kernel, and the rungs that notice it.

The whole table is printed by `make test-gpu-free`; every fault must be noticed by one rung.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpucheck import WHOLE, coding, contracts
from gpucheck.driver import emulate
from gpucheck.interpreter import guard

from fedmap_sparse import _backends, triton_kernels

Contract = Callable[[Any], None]
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Fault:
    stem: str
    what: str
    old: str
    new: str
    contract: Contract


def _pack(show: Any) -> None:
    contracts.pack(5001, 0.4, F32, "cpu", show)


def _deposit(show: Any) -> None:
    contracts.deposit(5001, 0.4, "cpu", show)


def _sgd(show: Any) -> None:
    contracts.masked_sgd(0.5, F32, "cpu", show)


def _sgd16(show: Any) -> None:
    contracts.masked_sgd(0.5, BF16, "cpu", show)


def _adamw(show: Any) -> None:
    contracts.masked_adamw(0.5, F32, "cpu", show, amsgrad=True)


def _mean(show: Any) -> None:
    contracts.accumulate(3001, F32, "cpu", show, aligned=True)


def _ties(show: Any) -> None:
    contracts.mean_rounds_once("cpu", show)


def _cast(show: Any) -> None:
    contracts.cast(2500, F32, "cpu", show)


def _quantize(show: Any) -> None:
    contracts.quantize(2500, 192, "cpu", show, feedback=True)


def _select(show: Any) -> None:
    values = contracts.special(20000, F32, "cpu")
    contracts.select(values.round(decimals=2), 2000, contracts.mask_of(20000, 0.7, "cpu"), show)


def _rank(show: Any) -> None:
    contracts.rank_index(2048 * 1100 + 5, "cpu", show)


def _select_missed(show: Any) -> None:
    contracts.select(torch.ones(70000), 41000, None, show)


def _select_distinct(show: Any) -> None:
    contracts.select(contracts.special(20000, F32, "cpu"), 2000, None, show)


def _rank(show: Any) -> None:
    contracts.rank_index(2048 * 1100 + 5, "cpu", show)


def _masks(show: Any) -> None:
    with coding.small_chunks(16, 256):
        coding.masks(coding.RUNS, 3, "cpu", show, by="reference")


def _no_room(show: Any) -> None:
    coding.masks_without_room("cpu", show)


def _ranks(show: Any) -> None:
    coding.ranks(5001, "cpu", show)


def _values(show: Any) -> None:
    with coding.small_chunks(16, 512):
        coding.values(700, torch.float16, "cpu", show, by="reference")


def _values32(show: Any) -> None:
    coding.values(300, F32, "cpu", show)


def _values_refused(show: Any) -> None:
    coding.values_refused("cpu", show)


FAULTS = [
    Fault("pack", "dropped mask of the load", "element, mask=live, other=0)", "element)", _pack),
    Fault(
        "pack",
        "dropped mask of the store",
        "convert(bits, FROM, TO), mask=live)",
        "convert(bits, FROM, TO))",
        _pack,
    ),
    Fault(
        "pack",
        "rank off by one block",
        "tl.load(rank + tile * (WORDS // 64))",
        "tl.load(rank + tile * (WORDS // 64) + 1)",
        _pack,
    ),
    Fault("pack", "dropped mask at the end", "dense, mask=offsets < numel)", "dense)", _pack),
    Fault(
        "pack",
        "survivors counted from one",
        "below = popcount(mine & ((1 <<",
        "below = 1 + popcount(mine & ((1 <<",
        _pack,
    ),
    Fault(
        "extract",
        "rank off by one block",
        "first = tl.load(rank + tile * (WORDS // 64))",
        "first = tl.load(rank + tile * (WORDS // 64) + 1)",
        _deposit,
    ),
    Fault(
        "extract",
        "bits that cross a word lost",
        "tl.where(shift > 0, high",
        "tl.where(shift > 31, high",
        _deposit,
    ),
    Fault("extract", "window short of a word", "(end + 31) // 32", "end // 32", _deposit),
    Fault("extract", "search one tile late", "<= first:", "<= first + 4000:", _deposit),
    Fault(
        "extract",
        "dropped mask of the store",
        "mask=offset < out_words)",
        "mask=offset >= 0)",
        _deposit,
    ),
    Fault(
        "_bits", "missing other=", "mask=at < num_words, other=0)", "mask=at < num_words)", _rank
    ),
    Fault("_scan", "carry forgotten", "carry += tl.sum(here, 0)", "carry += 0", _rank),
    Fault("_step", "dropped mask", "live = (j >= 0) & (j < count)", "live = j >= 0", _sgd),
    Fault(
        "_step",
        "state begins a survivor late",
        "base += tl.sum(popcount(earlier), 0)",
        "base += tl.sum(popcount(earlier), 0) + 1",
        _sgd,
    ),
    Fault("_step", "padding not covered", "& covered", "", _sgd),
    Fault(
        "_step",
        "skipped gradient taken",
        "np.where(table[:, 2] != 0,",
        "np.where(table[:, 2] >= 0,",
        _sgd,
    ),
    Fault(
        "_step",
        "pruned weights left",
        "if (flags & _ZEROED) == 0:",
        "if (flags & _ZEROED) != 0:",
        _sgd,
    ),
    Fault(
        "_step",
        "alignment claimed",
        "bool((table[:, 2] % 16 == 0).all())",
        "True",
        lambda show: contracts.masked_sgd(1.0, F32, "cpu", show, aligned=False),
    ),
    Fault(
        "masked_sgd",
        "momentum applied twice",
        "momentum * buffer + rest * g)",
        "momentum * buffer * momentum + rest * g)",
        _sgd,
    ),
    Fault(
        "masked_sgd",
        "decay after the momentum",
        "g = tl.where(decays, g + decay * p, g)",
        "g = tl.where(decays, g + decay * (p - lr * g), g)",
        _sgd16,
    ),
    Fault(
        "masked_adamw",
        "an order of operations",
        "m = m + (g - m) * towards1",
        "m = m * (1.0 - towards1) + g * towards1",
        _adamw,
    ),
    Fault(
        "masked_adamw",
        "division rounded twice",
        "size * tl.div_rn(m, denominator)",
        "size * m / denominator",
        _adamw,
    ),
    Fault(
        "accumulate",
        "dropped mask at the end",
        "offsets, offsets < n, FROM, TO, ALIGNED",
        "offsets, offsets >= 0, FROM, TO, ALIGNED",
        _mean,
    ),
    Fault(
        "accumulate",
        "sums in float32",
        "return sums + x.to(tl.float64) * weight",
        "return sums + (x * weight.to(tl.float32)).to(tl.float64)",
        _mean,
    ),
    Fault("accumulate", "rounded twice", "odd.to(tl.float32, bitcast=True)", "single", _ties),
    Fault(
        "quantize",
        "dropped mask",
        "tl.store(q + at, codes.to(tl.int8), mask=inside)",
        "tl.store(q + at, codes.to(tl.int8))",
        _quantize,
    ),
    Fault(
        "quantize",
        "no rounding",
        "codes = (steps + 12582912.0) - 12582912.0",
        "codes = steps",
        _quantize,
    ),
    Fault(
        "quantize",
        "counted by every program alone",
        'tl.atomic_add(overflowed, count.to(tl.int64), mask=count > 0, sem="relaxed")',
        "tl.store(overflowed, tl.load(overflowed) + count)",
        _cast,
    ),
    Fault(
        "select",
        "highest index of ties kept",
        "(exclusive(equal) >= left)",
        "(exclusive(equal) < tl.sum(equal, 0) - left)",
        _select,
    ),
    Fault(
        "_search",
        "rank off by one",
        "above + counts >= wanted",
        "above + counts > wanted",
        _select_distinct,
    ),
    Fault(
        "select",
        "ties of earlier blocks forgotten",
        "left = allowed - tl.load(ties_before + first_block + block)",
        "left = allowed",
        _select,
    ),
    Fault(
        "_search",
        "padding eligible",
        "w = load_words(within, word, num_words)[:, None]",
        "w = load_words(within, word, num_words)[:, None] | 1",
        _select,
    ),
    Fault(
        "_search",
        "candidates past their room",
        "if start + found <= capacity:",
        "if found >= 0:",
        _select_missed,
    ),
    Fault(
        "_search",
        "no ticket: every program concludes",
        "return ticket == tl.num_programs(0) - 1",
        "return ticket >= 0",
        _select,
    ),
    Fault(
        "_scan",
        "a scan that forgets earlier spans",
        "carry = sum_before(counts, begin, CHUNK)",
        "carry = sum_before(counts, 0, CHUNK)",
        _rank,
    ),
    Fault(
        "select",
        "count read and written by all",
        "tl.store(kept + slot, tl.load(above + slot) + tl.sum(more, 0))",
        "tl.store(above + slot, tl.load(above + slot) + tl.sum(more, 0))\n"
        "        tl.store(kept + slot, tl.load(above))",
        _select,
    ),
    Fault(
        "_rans",
        "inactive lanes put words",
        "full = on & ((x >> 16) >= f)",
        "full = (x >> 16) >= f",
        _masks,
    ),
    Fault(
        "_rans",
        "words in the wrong order",
        "tl.store(scratch + end + before,",
        "tl.store(scratch + end + count - 1 - before,",
        _masks,
    ),
    Fault("_rans", "reciprocal rounded down", "+ (f - 1).to(tl.uint64)", "", _values),
    Fault(
        "_rans",
        "no bias where the frequency is 1",
        "bias = _starts(f, lane) + tl.where(f < 2, (1 << 15) - 1, 0)",
        "bias = _starts(f, lane)",
        _masks,
    ),
    Fault(
        "_entropy_masks",
        "filling forgotten",
        "tile = (tile & inside) | (fill & (inside ^ 0xFFFFFFFF))",
        "tile = tile & inside",
        _masks,
    ),
    Fault(
        "_entropy_masks",
        "words past the run read",
        "low = tl.load(words, mask=rest > 0, other=0)",
        "low = tl.load(words)",
        _masks,
    ),
    Fault(
        "_rans",
        "the first of equal starts taken",
        "symbol = tl.where(t3 <= key, s + 3, tl.where(t2 <= key, s + 2, symbol))",
        "symbol = tl.where(t2 <= key, s + 2, tl.where(t3 <= key, s + 3, symbol))",
        _values,
    ),
    Fault(
        "_rans",
        "a register of words skipped",
        "now = then\n        then = ahead",
        "now = ahead",
        _masks,
    ),
    Fault(
        "_entropy_masks",
        "bits that cross a word lost",
        "tl.atomic_or(words + to + 1, high, mask=high != 0,",
        "tl.atomic_or(words + to + 1, high, mask=high == 1,",
        _masks,
    ),
    Fault(
        "_entropy_masks",
        "words shared by chunks stored",
        'tl.atomic_or(words + to, low, mask=low != 0, sem="relaxed")',
        "tl.store(words + to, low, mask=low != 0)",
        _masks,
    ),
    Fault(
        "_entropy_masks",
        "words left over not noticed",
        "(wrong == 0) & (taken == tl.load(offsets + c + 1) - begin)",
        "(wrong == 0) & (taken >= 0)",
        _masks,
    ),
    Fault(
        "_entropy_masks",
        "ones one bit short",
        "last - at * 32, 0)",
        "last - 1 - at * 32, 0)",
        _masks,
    ),
    Fault(
        "entropy",
        "past the capacity",
        "mask=(i < count) & (to < limit))",
        "mask=i < count)",
        _no_room,
    ),
    Fault(
        "entropy", "ranks count the bit itself", "at - w * 32, 0)", "at + 1 - w * 32, 0)", _ranks
    ),
    Fault(
        "_entropy_values",
        "the highest top of equals",
        "top = 255 - (tl.max((through - earlier) * 256 + 255 - bins, 0) & 255)",
        "top = tl.max((through - earlier) * 256 + bins, 0) & 255",
        _values32,
    ),
    Fault(
        "_entropy_values",
        "lanes past the end counted",
        "counts -= tl.where(bins == 0, blocks * BLOCK - size, 0)",
        "counts -= tl.where(bins == 0, 0, 0)",
        _values32,
    ),
    Fault(
        "_entropy_values",
        "escapes of every lane",
        "mask=escaped & (place < limit))",
        "mask=place < limit)",
        _values,
    ),
    Fault(
        "_entropy_values",
        "a step of symbols ahead",
        "on = lane < live - 32 * j\n            x, s, now",
        "on = lane < live - 32 * j - 1\n            x, s, now",
        _values,
    ),
    Fault(
        "_entropy_values",
        "impossible symbols taken",
        "impossible = (s > top) & (s != _ESCAPE)",
        "impossible = (s > top) & (s == _ESCAPE)",
        _values_refused,
    ),
    Fault(
        "_entropy_values",
        "three bits without their spill",
        "tl.where(shift > 0, high, 0)",
        "tl.where(shift > 16, high, 0)",
        _values,
    ),
    Fault(
        "_entropy_values",
        "a word of three bits begins late",
        "(8 * (word % 3))",
        "(8 * (word % 2))",
        _values,
    ),
    Fault(
        "_entropy_values",
        "the symbol of another step",
        "(((i >> 5) & 7) * 4)",
        "(((i >> 4) & 7) * 4)",
        _values32,
    ),
]
_QUICK = (
    "dropped mask of the store",
    "highest index of ties kept",
    "missing other=",
    "state begins a survivor late",
    "words shared by chunks stored",
)


def _plant(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import a copy of the module with the fault, and again what was imported from it."""
    package = Path(triton_kernels.__file__).parent
    text = (package / f"{fault.stem}.py").read_text()
    assert fault.old in text, f"{fault.stem}: the code that {fault.what!r} replaces is gone"
    names = [fault.stem]
    names += {
        "_step": ["masked_sgd", "masked_adamw"],
        "_bits": ["_scan"],
        "_scan": ["extract", "select"],
        "_search": ["select"],
        "_rans": ["_entropy_masks", "_entropy_values", "entropy"],
        "_entropy_masks": ["entropy"],
        "_entropy_values": ["entropy"],
    }.get(fault.stem, [])
    for name in names:
        full = f"fedmap_sparse.triton_kernels.{name}"
        copy = folder / f"{name}.py"
        source = text.replace(fault.old, fault.new) if name == fault.stem else None
        copy.write_text(source or (package / f"{name}.py").read_text())
        spec = importlib.util.spec_from_file_location(full, copy)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full, module)
        monkeypatch.setattr(triton_kernels, name, module, raising=False)
        spec.loader.exec_module(module)


def _noticed(session: Any, contract: Contract) -> str:
    values = ""
    with np.errstate(all="ignore"), session as watch:
        try:
            contract(watch.show)
        except Exception:
            values = "values"
    return " and ".join(filter(None, [values, "fault" if watch.faults else ""])) or "-"


@pytest.mark.parametrize(
    "fault",
    [f for f in FAULTS if WHOLE or f.what in _QUICK],
    ids=lambda fault: f"{fault.stem}: {fault.what}",
)
def test_planted_fault_is_noticed(
    fault: Fault,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    summary: list[str],
    poisoned: None,
) -> None:
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        importlib.import_module(f"fedmap_sparse.triton_kernels.{module.name}")
    monkeypatch.setattr(_backends, "_missing", lambda name: "")
    _plant(fault, tmp_path, monkeypatch)
    seen = {}
    for name, session in (("interpreter", guard(1)), ("ptx", emulate(seed=1))):
        torch.manual_seed(0)
        seen[name] = _noticed(session, fault.contract)
    found = f"interpreter: {seen['interpreter']:18s} ptx: {seen['ptx']}"
    summary.append(f"{fault.stem:13s} {fault.what:34s} {found}")
    assert any(how != "-" for how in seen.values())
