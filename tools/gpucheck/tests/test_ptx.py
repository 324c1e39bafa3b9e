"""Reading PTX, and what its instructions compute: each against values worked out by hand."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import gpucheck
import numpy as np
import pytest
import torch
from gpucheck import alu
from gpucheck.emulator import Emulator
from gpucheck.offline import occupancy
from gpucheck.parse import Instruction, parse, split_operands

HEAD = """
.visible .entry toy(
    .param .u64 .ptr .global .align 1 toy_param_0,
    .param .u32 toy_param_1
)
.reqntid 32
{
    .reg .pred %p<2>;
    .reg .b32 %r<8>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [toy_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
"""
TAIL = "    st.global.b32 [%rd3], %r3;\n    ret;\n}\n"


def run(body: str, blocks: int = 1) -> list[int]:
    """What 32 lanes store of %r3; %r1 is the lane."""
    out = torch.zeros(32, dtype=torch.int32)
    report = Emulator(HEAD + body + TAIL).run((blocks,), [out, 0], ["out", "n"])
    assert not report.faults
    return out.tolist()


def instruction(text: str) -> Instruction:
    name, _, operands = text.partition(" ")
    return Instruction(None, False, tuple(name.split(".")), tuple(split_operands(operands)), 0, "")


@pytest.mark.parametrize(
    ("text", "sources", "want"),
    [
        ("shl.b32 d, a, b", (0x80000001, 1), 2),
        ("shl.b32 d, a, b", (1, 32), 0),
        ("shr.u32 d, a, b", (0x80000000, 40), 0),
        ("shr.s32 d, a, b", (-8, 40), -1),
        ("shf.l.wrap.b32 d, a, b, c", (0x80000000, 1, 33), 3),
        ("shf.r.clamp.b32 d, a, b, c", (5, 7, 32), 7),
        ("bfe.u32 d, a, b, c", (0xABCD1234, 8, 8), 0x12),
        ("bfe.s32 d, a, b, c", (0x0000F000, 12, 4), 0xFFFFFFFF),
        ("bfi.b32 d, a, b, c, e", (0x5, 0xFFFF0000, 4, 4), 0xFFFF0050),
        ("prmt.b32 d, a, b, c", (0x33221100, 0x77665544, 0x7520), 0x77552200),
        ("prmt.b32 d, a, b, c", (0x00000080, 0, 0x8888), 0xFFFFFFFF),
        ("lop3.b32 d, a, b, c, 0x96", (0b1100, 0b1010, 0b1111), 0b1001),
        ("popc.b32 d, a", (0xF0F0,), 8),
        ("clz.b32 d, a", (0,), 32),
        ("bfind.u32 d, a", (0,), 0xFFFFFFFF),
        ("brev.b32 d, a", (1,), 0x80000000),
        ("mul.hi.u32 d, a, b", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
        ("mul.wide.s32 d, a, b", (-2, 0x7FFFFFFF), -0xFFFFFFFE),
        ("mad.lo.s32 d, a, b, c", (3, -5, 7), -8),
        ("div.s32 d, a, b", (-7, 2), -3),
        ("rem.s32 d, a, b", (-7, 2), -1),
        ("cvt.rzi.s32.f32 d, a", (-2.75,), -2),
        ("cvt.rni.s32.f32 d, a", (2.5,), 2),
        ("cvt.rzi.s32.f32 d, a", (float("nan"),), 0),
        ("cvt.rzi.u32.f32 d, a", (1e20,), 0xFFFFFFFF),
        ("cvt.rn.bf16.f32 d, a", (1.00390625,), 0x3F80),
        ("cvt.sat.u8.s32 d, a", (-3,), 0),
        ("min.f32 d, a, b", (float("nan"), 2.0), 2.0),
        ("fma.rn.f32 d, a, b, c", (1 + 2.0**-12, 1 + 2.0**-12, -1.0), 2.0**-11 + 2.0**-24),
        ("add.f32 d, a, b", (1.0, 2.0**-24), 1.0),
        ("add.s16x2 d, a, b", (0x0001FFFF, 0x7FFF0001), 0x80000000),
        ("selp.b32 d, a, b, p", (1, 2, False), 2),
    ],
)  # fmt: skip
def test_an_instruction(text: str, sources: tuple[Any, ...], want: Any) -> None:
    lowered = alu.lower(instruction(text))
    assert lowered is not None
    function, kinds = lowered
    with np.errstate(all="ignore"):
        given = [
            np.array([value]).astype(alu.NUMPY[kind])
            for value, kind in zip(sources, kinds, strict=True)
        ]
        got = function(*given)
    assert got[0] == np.array([want]).astype(got.dtype)[0]


@pytest.mark.parametrize(
    ("how", "pair", "want"),
    [
        ("setp.lt.f32", (1.0, np.nan), False),
        ("setp.ltu.f32", (1.0, np.nan), True),
        ("setp.num.f32", (1.0, np.nan), False),
        ("setp.lt.u32", (1, 0xFFFFFFFF), True),
        ("setp.lt.s32", (1, -1), False),
    ],
)
def test_a_comparison(how: str, pair: tuple[Any, Any], want: bool) -> None:
    ins = instruction(f"{how} p, a, b")
    a, b = (np.array([x]).astype(alu.NUMPY[ins.types[-1]]) for x in pair)
    assert alu.compare(ins)(a, b)[0] == want


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", [i ^ 1 for i in range(32)]),
        ("shfl.sync.up.b32 %r3, %r1, 2, 0, -1;", [0, 1, *range(30)]),
        ("shfl.sync.down.b32 %r3, %r1, 30, 31, -1;", [i + 30 if i < 2 else i for i in range(32)]),
        ("shfl.sync.idx.b32 %r3, %r1, 5, 31, -1;", [5] * 32),
        ("redux.sync.max.s32 %r3, %r1, -1;", [31] * 32),
        ("setp.gt.u32 %p1, %r1, 29;\nvote.sync.ballot.b32 %r3, %p1, -1;", [-(1 << 30)] * 32),
        ("setp.gt.u32 %p1, %r1, 29;\n@%p1 mov.u32 %r3, 7;", [0] * 30 + [7, 7]),
        ("{\n.reg .b32 t;\nadd.s32 t, %r1, 1;\nmov.b32 %r3, t;\n}", list(range(1, 33))),
        ("mov.u32 %r3, 0;\nL:\nadd.s32 %r3, %r3, 2;\nsetp.lt.u32 %p1, %r3, %r1;\n@%p1 bra L;",
         [max(2, i + i % 2) for i in range(32)]),
    ],
    ids=["bfly", "up", "down", "idx", "redux", "ballot", "predicate", "scope", "loop"],
)  # fmt: skip
def test_lanes_of_a_warp(body: str, want: list[int]) -> None:
    assert run(body) == want


def test_an_atomic_returns_what_was_there() -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    ptx = HEAD.replace("add.s64 %rd3, %rd1, %rd2;", "atom.global.add.u32 %r3, [%rd1], 1;")
    report = Emulator(ptx + "ret;\n}\n").run((3,), [counter, 0], ["out", "n"])
    assert not report.faults
    assert int(counter) == 96


def test_kernels_are_read() -> None:
    program = parse(HEAD + TAIL)
    assert (program.name, program.threads) == ("toy", (32, 1, 1))
    assert program.params == [("toy_param_0", "u64"), ("toy_param_1", "u32")]
    assert [ins.name for ins in program.code] == ["ld", "mov", "mul", "add", "st", "ret"]
    assert split_operands("{%a, %b}, [%c + 4], 0f00000000") == [
        "{%a, %b}",
        "[%c + 4]",
        "0f00000000",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "expected an .entry"), (HEAD.replace(".reqntid 32", "") + TAIL, "expected .reqntid")],
)
def test_what_is_no_kernel_is_refused(text: str, why: str) -> None:
    with pytest.raises(SyntaxError, match=why):
        parse(text)


@pytest.mark.parametrize(
    "body", ["wgmma.fence.sync;", "mov.u32 %r3, %smid;", "add.cc.u32 %r3, %r1, 1;"]
)
def test_what_is_not_emulated_is_named(body: str) -> None:
    with pytest.raises(NotImplementedError, match=r"wgmma|smid|add\.cc"):
        run(body)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "want"),
    [(32, 0, 256, 1.0), (64, 0, 128, 0.5), (121, 0, 32, 0.25), (16, 100_000, 128, 0.125)],
)
def test_occupancy(registers: int, shared: int, threads: int, want: float) -> None:
    assert occupancy(registers, shared, threads, 90) == want


def test_the_tool_stands_alone() -> None:
    """It imports nothing of the project whose kernels it checks."""
    for file in Path(gpucheck.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(("fedmap_sparse", "ladder")) for name in names), file
