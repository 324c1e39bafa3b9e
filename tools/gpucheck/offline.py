"""What a compiled kernel costs, from its machine code: registers, spills, accesses, barriers."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Threads, blocks, registers and KiB of shared memory of one multiprocessor.
_LIMITS = {80: (2048, 32, 65536, 163), 90: (2048, 32, 65536, 227), 100: (2048, 32, 65536, 227)}

_COUNTED = {
    "ld128": r"\bLDG\.E\S*\.128",
    "ld64": r"\bLDG\.E\S*\.64",
    "ld": r"\bLDG\.",
    "st128": r"\bSTG\.E\S*\.128",
    "st64": r"\bSTG\.E\S*\.64",
    "st": r"\bSTG\.",
    "atomics": r"\b(ATOMG?|RED|REDG)\.",
    "barriers": r"\bBAR\.",
    "shuffles": r"\bSHFL",
}


@dataclass(frozen=True)
class Cost:
    """One kernel on one architecture."""

    registers: int
    spills: int
    shared: int
    occupancy: float
    instructions: int
    #: Instructions by class: ld128, ld64, ld (all), st128, st64, st, atomics, barriers, shuffles.
    counts: Mapping[str, int]


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int | str = 90,
    *,
    aligned: Sequence[str] | None = None,
    num_warps: int = 4,
) -> Any:
    """Compile without a driver.

    `signature` gives the type of each argument that is no constexpr ("*fp32", "i32"); `aligned`
    those known to be multiples of 16 (default: the pointers, as for fresh tensors). A string for
    `arch` is an AMD one.
    """
    kinds = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    if aligned is None:
        aligned = [name for name, kind in kinds.items() if kind.startswith("*")]
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={place[name]: value for name, value in constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    if isinstance(arch, str):
        return triton.compile(source, target=GPUTarget("hip", arch, 64), options=options)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([_BIN / name, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def _spills(ptx: str, arch: int) -> int:
    """Bytes of spill loads and stores, which only ptxas tells: assemble again as triton does."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [
                get_ptxas(arch).path,
                "-v",
                "--regAllocOptLevel=2",
                "--fmad=false",
                f"--gpu-name={sm_arch_from_capability(arch)}",
                source,
                "-o",
                source.with_suffix(".o"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    found: Any = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    return int(found[1]) + int(found[2])


def occupancy(registers: int, shared: int, threads: int, arch: int) -> float:
    """Share of a multiprocessor's threads that can be resident."""
    max_threads, max_blocks, file, kib = _LIMITS[arch]
    per_block = -(-max(registers, 1) // 8) * 8 * threads
    blocks = min(
        max_blocks, max_threads // threads, file // per_block, kib * 1024 // (shared + 1024)
    )
    return blocks * threads / max_threads


def cost(compiled: Any, arch: int) -> Cost:
    """The cost of a compiled kernel (from `compile_kernel`, or from a launch)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = _tool("cuobjdump", "-sass", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    lines = [
        re.sub(r"/\*.*?\*/", "", line).strip()
        for line in listing.splitlines()
        if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)
    ]
    code = [line for line in lines if line and not line.startswith("NOP")]
    metadata = compiled.metadata
    return Cost(
        registers,
        _spills(compiled.asm["ptx"], arch),
        metadata.shared,
        occupancy(registers, metadata.shared, 32 * metadata.num_warps, arch),
        len(code),
        {name: sum(bool(re.search(rx, line)) for line in code) for name, rx in _COUNTED.items()},
    )
