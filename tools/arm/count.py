"""Instructions per element of each kernel at each level of 64-bit ARM, counted under QEMU.

A count is no time: it says nothing of memory, latencies or how many instructions a core starts at
once. It is exact, and the same on every machine. Usage, after `make test-arm` or by itself:

    python tools/arm/count.py [KERNEL ...]     prints a Markdown table
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "selfcheck" / "aarch64-linux-gnu"
CPU = os.environ.get("FEDMAP_ARM_CPU", "cortex-a53")
QEMU = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", CPU]


def build_plugin(folder: Path) -> Path:
    """The plugin, for the first version of QEMU's interface that this QEMU takes."""
    plugin = folder / "count.so"
    for api in range(1, 8):
        source = ROOT / "tools" / "arm" / "count_plugin.c"
        command = ["gcc", "-shared", "-fPIC", "-O2", f"-DAPI={api}", str(source), "-o", str(plugin)]
        subprocess.run(command, check=True)
        if subprocess.run(counted(plugin, []), capture_output=True, check=False).returncode == 0:
            return plugin
    sys.exit("count.py: this QEMU takes no plugin of interface 1 to 7")


def counted(plugin: Path, arguments: list[str]) -> list[str]:
    return [*QEMU, "-plugin", str(plugin), str(BUILD / "kernels"), *arguments]


def executed(plugin: Path, kernel: str, level: str, times: int) -> tuple[int, int]:
    """Instructions of the whole program, and elements of one run of the kernel."""
    done = subprocess.run(
        counted(plugin, [kernel, level, str(times)]), capture_output=True, text=True, check=True
    )
    count = re.search(r"executed (\d+)", done.stderr)
    assert count, done.stderr
    return int(count[1]), int(done.stdout)


def per_element(plugin: Path, kernel: str, level: str) -> float:
    """Two more runs cost what two runs cost; what the program does once cancels."""
    one, elements = executed(plugin, kernel, level, 1)
    three, _ = executed(plugin, kernel, level, 3)
    return (three - one) / (2 * elements)


def main() -> None:
    make = ["make", "-s", "-C", str(ROOT / "tests" / "native" / "selfcheck")]
    variables = ["CXX=aarch64-linux-gnu-g++", f"OUT={BUILD}", str(BUILD / "kernels")]
    subprocess.run([*make, *variables], check=True)
    names = subprocess.run([*QEMU, str(BUILD / "kernels")], capture_output=True, text=True).stdout
    wanted = sys.argv[1:] or names.splitlines()
    print("| kernel | scalar | neon | neon / scalar |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        plugin = build_plugin(Path(folder))
        for kernel in wanted:
            scalar, neon = (per_element(plugin, kernel, level) for level in ("scalar", "neon"))
            print(f"| {kernel} | {scalar:.3f} | {neon:.3f} | {neon / scalar:.2f} |", flush=True)


if __name__ == "__main__":
    main()
