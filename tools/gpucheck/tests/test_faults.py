"""The tools of the ladder: each must see the faults that it claims to see, and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gpucheck import alu
from gpucheck.driver import emulate
from gpucheck.emulator import Emulator
from gpucheck.interpreter import guard
from gpucheck.offline import compile_kernel, cost
from gpucheck.parse import Instruction


@triton.jit
def add_one(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0) + 1.0, mask=at < n)


@triton.jit
def store_past_the_end(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0))


@triton.jit
def load_past_the_end(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at), mask=at < n)


@triton.jit
def two_lanes_one_element(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at // 2, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def every_program_adds(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + at, mask=at < n, other=0.0), 0)
    tl.store(y, tl.load(y) + total)


@triton.jit
def uses_masked_lanes(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0), tl.sum(tl.load(x + at, mask=at < n), 0))


@triton.jit
def off_by_four_bytes(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(tl.multiple_of(x + 1, 16) + at))


@triton.jit
def reload_without_barrier(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))
    tl.store(y + BLOCK + at, tl.load(y + BLOCK - 1 - at))


@triton.jit
def store_a_byte(y, SHARE: tl.constexpr):
    tl.store(y + tl.program_id(0) // SHARE, tl.program_id(0).to(tl.uint8))


@triton.jit
def first_waits_for_second(x, y, n, BLOCK: tl.constexpr):
    if tl.program_id(0) == 0:
        while tl.atomic_add(y, 0) == 0:
            pass
    else:
        tl.atomic_xchg(y, 1)


@triton.jit
def inclusive_scan(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.cumsum(tl.load(x + at), 0))


def launch(kernel: Any, session: Any, n: int = 1000, block: int = 256) -> torch.Tensor:
    x, y = torch.randn(n), torch.zeros(n)
    with np.errstate(all="ignore"), session as watch:
        kernel[(4,)](x, y, n, BLOCK=block)
    return watch.faults, x, y, watch


@pytest.mark.parametrize("rung", [guard, emulate])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_sound_kernel_has_no_fault_and_its_bytes_are_counted(rung: Any, seed: int | None) -> None:
    faults, x, y, watch = launch(add_one, rung(seed=seed))
    assert not faults
    assert torch.equal(y, x + 1)
    assert watch.touched_bytes == 2 * 4000 + 2 * (x.data_ptr() % 32 != 0) * 32


@pytest.mark.parametrize("rung", [guard, emulate])
@pytest.mark.parametrize(
    ("kernel", "seen"),
    [
        (store_past_the_end, "out-of-bounds"),
        (load_past_the_end, "out-of-bounds"),
        (two_lanes_one_element, "two lanes"),
        (every_program_adds, "race"),
    ],
)
def test_both_rungs_see(rung: Any, kernel: Any, seen: str) -> None:
    faults = launch(kernel, rung())[0]
    assert any(seen in fault for fault in faults), faults


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("enter", [guard, emulate])
def test_bytes_race_where_they_are_shared_alone(enter: Any, share: int) -> None:
    with enter() as session:
        store_a_byte[(8,)](torch.zeros(8, dtype=torch.uint8), SHARE=share)
    assert any("race" in fault for fault in session.faults) is (share == 2)


def test_pairs_of_16_bit_integers_do_not_carry_into_each_other() -> None:
    add = Instruction(None, False, ("add", "s16x2"), ("%r1", "%r2", "%r3"), 0, "")
    lowered = alu.lower(add)
    assert lowered is not None
    a, b = (np.array([x], np.uint32) for x in (0x0001FFFF, 0x7FFF0001))
    assert lowered[0](a, b).tolist() == [0x80000000]


def test_interpreter_poisons_lanes_that_are_masked_off() -> None:
    assert launch(uses_masked_lanes, guard())[2][3].isnan()


@pytest.mark.parametrize(
    ("kernel", "seen"), [(off_by_four_bytes, "misaligned"), (reload_without_barrier, "race")]
)
def test_emulator_sees(kernel: Any, seen: str) -> None:
    faults = launch(kernel, emulate(), 1024, 512)[0]
    assert any(seen in fault for fault in faults), faults


@pytest.mark.parametrize(("blocks", "hangs"), [(1, True), (2, False)])
def test_emulator_notices_a_wait_on_a_block_that_is_not_resident(blocks: int, hangs: bool) -> None:
    flag = torch.zeros(1, dtype=torch.int32)
    with emulate(blocks=blocks) as session:
        first_waits_for_second[(2,)](flag, flag, 1, BLOCK=1)
    assert any("livelock" in fault for fault in session.faults) == hangs


def test_emulator_sees_a_dropped_barrier_and_a_deadlock() -> None:
    compiled = compile_kernel(
        inclusive_scan, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"BLOCK": 1024}
    )
    ptx = compiled.asm["ptx"]
    x = torch.arange(1024, dtype=torch.float32)

    def run(text: str) -> tuple[list[tuple[str, int]], torch.Tensor]:
        y = torch.zeros(1024)
        report = Emulator(text).run(
            (1,), [x, y, 1024], ["x", "y", "n"], shared_bytes=compiled.metadata.shared
        )
        return list(report.faults), y

    faults, y = run(ptx)
    assert not faults
    assert torch.equal(y, x.cumsum(0))
    head, _, tail = ptx.partition("bar.sync")
    faults, _ = run(f"{head}bar.warp.sync{tail}")
    assert any("shared race" in kind for kind, _ in faults)
    some = "setp.lt.u32 %q, %tid.x, 32;\n@%q bra SOME;\nbar.sync 0;\nSOME:\nbar.sync"
    faults, _ = run(f"{head}{some}{tail}".replace(".reg .pred", ".reg .pred %q;\n.reg .pred", 1))
    assert any("divergence" in kind or "deadlock" in kind for kind, _ in faults)


def test_tensors_reached_by_address_must_be_shown() -> None:
    secret = torch.arange(64, dtype=torch.float32)
    table = torch.tensor([secret.data_ptr()])
    for rung in (guard, emulate):
        for shown in (False, True):
            out = torch.zeros(64)
            with np.errstate(all="ignore"), rung() as watch:
                if shown:
                    watch.show(secret=secret)
                through_a_table[(1,)](table, out, BLOCK=64)
            assert bool(watch.faults) != shown
            assert torch.equal(out, secret) == shown


@triton.jit
def through_a_table(table, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    pointer = tl.load(table).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(out + at, tl.load(pointer + at))


def test_views_of_one_storage_may_overlap() -> None:
    room = torch.arange(512, dtype=torch.float32)
    for rung in (guard, emulate):
        with np.errstate(all="ignore"), rung() as watch:
            add_one[(1,)](room[:300], room[256:], 256, BLOCK=256)
        assert not watch.faults
        assert room[256] == 1
        assert room[511] == 256
        room = torch.arange(512, dtype=torch.float32)


@pytest.mark.parametrize("aligned", [True, False])
def test_wide_accesses_are_counted(aligned: bool) -> None:
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32"}
    names = ["x", "y", "n"] if aligned else ["x", "y"]
    counts = cost(compile_kernel(add_one, signature, {"BLOCK": 1024}, aligned=names), 90).counts
    assert (counts["ld128"], counts["st128"]) == ((2, 2) if aligned else (0, 0))
