"""Instructions that six small kernels execute, beside those of instructions.csv: without a clock.

    python benchmarks/instructions.py [--write] [--cxx CXX]      or: make count

The kernels are compiled as in the extension, without Python and torch (tools/kernels.cpp), and run
under valgrind's callgrind at the level AVX2 on one thread: the count is the same on every x86-64
machine. It depends on the compiler, whose name and major version is the key of the table.
Needs make, valgrind and the compiler; 20 s at first, then 2. A count says nothing of memory: how
fast a kernel is, `fedmap-sparse bench` tells.

Exit code: 0; 1 where a count is beyond 3 % of the table's, above or below; 2 where nothing could be
counted. A compiler without a row is told how to get one, and no failure.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("instructions.csv")
LEVEL = "avx2"  # the highest that valgrind executes
CASES = (
    "select .1", "pack .1", "masked_sgd .1", "masked_adamw .1", "weighted_mean of 10",
    "encode_mask .1",
)  # fmt: skip
#: As setup.py compiles, and without what some distributions add by default and others do not.
FLAGS = (
    "-O3 -fPIC -fno-stack-protector -fcf-protection=none -fno-stack-clash-protection "
    "-U_FORTIFY_SOURCE"
)
#: The share by which a count may differ from the table's.
TOLERANCE = 0.03

HOW = "make count COUNT_ARGS=--write"

Counts = dict[str, float]


class CannotCount(RuntimeError):
    """Something that counting needs is missing or failed; the message says what."""


def output(command: Sequence[str | Path]) -> str:
    """What a program prints.

    Raises:
        CannotCount: it is not installed, or fails.
    """
    if shutil.which(command[0]) is None:
        raise CannotCount(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        named = " ".join(map(str, command[:2]))
        raise CannotCount(f"{named} ended with {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout


def compiler(cxx: str) -> str:
    """A compiler's name and major version, as "gcc 12"."""
    macros = output([*shlex.split(cxx), "-dM", "-E", "-x", "c++", os.devnull])
    for name, macro in (("clang", "__clang_major__"), ("gcc", "__GNUC__")):
        if found := re.search(rf"^#define {macro} (\d+)$", macros, re.MULTILINE):
            return f"{name} {found[1]}"
    raise CannotCount(f"{cxx}: expected GCC or clang, which name their version in a macro")


def build(cxx: str, folder: Path) -> Path:
    """The program of the kernels in `folder`; what is there and has not changed stays."""
    program = folder / "kernels"
    make = ["make", "-s", "-C", str(ROOT / "tests" / "native" / "selfcheck"), f"-j{os.cpu_count()}"]
    output([*make, f"CXX={cxx}", f"OUT={folder}", f"CXXFLAGS={FLAGS}", "LDFLAGS=", str(program)])
    return program


def count(program: Path) -> Counts:
    """Instructions per element of each case, in the second of two runs."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "count"
        # A file for each call of `counted`, and what is executed outside of it is not collected.
        valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={dump}"]
        inside = ["--toggle-collect=counted", "--dump-after=counted"]
        printed = output([*valgrind, *inside, program, "each", LEVEL, *CASES])
        elements = [int(line) for line in printed.split()]
        found = {}
        for at, (case, size) in enumerate(zip(CASES, elements, strict=True)):
            text = dump.with_name(f"count.{2 * at + 2}").read_text()
            total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
            if total is None or int(total[1]) == 0:
                raise CannotCount(f"callgrind counted nothing for {case}")
            found[case] = round(int(total[1]) / size, 4)
    return found


def read_table(path: Path) -> dict[str, Counts]:
    """Counts by compiler."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row.pop("compiler"): {case: float(text) for case, text in row.items()} for row in rows}


def write_row(name: str, counts: Counts, path: Path) -> None:
    """Add or replace a compiler's row; the others stay."""
    rows = read_table(path) | {name: counts}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["compiler", *CASES], lineterminator="\n")
        writer.writeheader()
        for compiler_name in sorted(rows):
            writer.writerow({"compiler": compiler_name, **rows[compiler_name]})


def judge(counts: Counts, wanted: Counts) -> tuple[list[str], bool]:
    """A line for each case, and whether all are within the tolerance."""
    lines, within = [], True
    for case, found in counts.items():
        change = found / wanted[case] - 1 if case in wanted else math.inf
        line = f"{case:<20} {found:8.4f}"
        line += f"  table {wanted[case]:8.4f}  {change:+.1%}" if case in wanted else "  no count"
        if abs(change) > TOLERANCE:
            within = False
            line += f"  {'MORE' if change > 0 else 'FEWER'}, by over {TOLERANCE:.0%}"
        lines.append(line)
    return lines, within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make the counts this compiler's row")
    parser.add_argument("--cxx", default=os.environ.get("CXX", "g++"), help="default: $CXX, or g++")
    args = parser.parse_args()
    try:
        name = compiler(args.cxx)
        if shutil.which("valgrind") is None:
            raise CannotCount("valgrind is not installed (a package of that name)")
        counts = count(build(args.cxx, ROOT / "build" / "count" / name.replace(" ", "-")))
    except CannotCount as error:
        print(f"instructions: {error}", file=sys.stderr)
        return 2
    print(f"Instructions per element, {name}, {LEVEL}, one thread:")
    if args.write:
        write_row(name, counts, TABLE)
    wanted = read_table(TABLE).get(name)
    if wanted is None:
        print(*(f"{case:<20} {found:8.4f}" for case, found in counts.items()), sep="\n")
        print(f"{name} has no row in benchmarks/{TABLE.name}: not compared. To add one: {HOW}")
        return 0
    lines, within = judge(counts, wanted)
    print(*lines, sep="\n")
    if not within:
        print(f"If that is meant, say why in the commit, and commit the new row: {HOW}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
