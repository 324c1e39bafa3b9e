"""ISA levels: the one that is asked for is the one that runs."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from guards import run_native

from fedmap_sparse._backends import native

pytestmark = pytest.mark.skipif(native is None, reason="fedmap_sparse._native is not built")


FAMILIES = {"x86-64": ("x86_64", "amd64"), "64-bit ARM": ("aarch64", "arm64")}
X86, ARM = ["scalar", "avx2", "avx512_core", "avx512"], ["scalar", "neon"]


def test_levels_are_ordered_and_the_highest_is_the_default() -> None:
    levels = native.isa_levels()
    assert levels in (X86[: len(levels)], ARM[: len(levels)])
    default = run_native("print(native.isa())", FEDMAP_SPARSE_ISA="")
    assert default.stdout.strip() == levels[-1]


def test_a_forced_level_runs(isa: str) -> None:
    """The probe is dispatched as every kernel is, and answers with its own level's name."""
    assert native.isa_probe() == isa
    done = run_native("print(native.isa(), native.isa_probe())", FEDMAP_SPARSE_ISA=isa)
    assert done.stdout.split() == [isa, isa]


def test_a_level_that_is_not_here_names_those_that_are() -> None:
    with pytest.raises(ValueError, match="'sse9' here; available: scalar"):
        native.set_isa("sse9")
    done = run_native("native.isa()", FEDMAP_SPARSE_ISA="sse9")
    assert "ValueError: FEDMAP_SPARSE_ISA: no ISA level 'sse9' here; available: scalar" in (
        done.stderr
    )


@pytest.mark.parametrize(("level", "family"), [("neon", "64-bit ARM"), ("avx2", "x86-64")])
def test_a_level_of_another_processor_says_so(level: str, family: str) -> None:
    if platform.machine().lower() in FAMILIES[family]:
        pytest.skip(f"{level} is a level of this processor family")
    done = run_native("native.isa()", FEDMAP_SPARSE_ISA=level)
    wanted = f"no ISA level '{level}' here; available: {' '.join(native.isa_levels())} "
    assert f"{wanted}({level} is a level of {family}, and this is " in done.stderr


def test_each_level_is_compiled_for_its_registers() -> None:
    """Functions in namespace scalar touch no ymm or zmm register, in avx2 no zmm; and some of
    those in avx2, avx512_core and avx512 do use their own."""
    if not shutil.which("objdump") or native.isa_levels() == ["scalar"]:
        pytest.skip("objdump is missing, or this is not x86-64 with AVX2")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", native.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    used: dict[str, set[str]] = {level: set() for level in X86}
    late: dict[str, set[str]] = {level: set() for level in X86}
    for function in listing.split("\n\n"):
        name = re.match(r"[0-9a-f]+ <_ZN6fedmap\d+(scalar|avx2|avx512_core|avx512)L?\d", function)
        if name:
            used[name[1]] |= set(re.findall(r"%([yz]mm)", function))
            late[name[1]] |= set(re.findall(r"\b(vpcompressw|vpexpandw|vpermb)\b", function))
    if not any(used.values()):
        pytest.skip("the extension was stripped of its symbols")
    wide = {"ymm", "zmm"}
    assert used == {"scalar": set(), "avx2": {"ymm"}, "avx512_core": wide, "avx512": wide}
    words = {"vpcompressw", "vpexpandw", "vpermb"}
    assert late == {"scalar": set(), "avx2": set(), "avx512_core": set(), "avx512": words}


def test_csrc_compiles_as_one_unit(tmp_path: Path) -> None:
    """No two files give one name two meanings: so that they can be compiled as one."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("neither g++ nor clang++ is installed")
    csrc = Path(__file__).parent.parent.parent / "csrc"
    files = sorted(csrc.glob("*/*.cpp"))
    unit = tmp_path / "unit.cpp"
    unit.write_text("".join(f'#include "{f}"\n' for f in files if f.parent.name != "bindings"))
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run(
        [*command, f"-I{csrc}", str(unit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
