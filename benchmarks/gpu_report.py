"""Write benchmarks/GPU.md: what is known of the Triton kernels without having timed them.

python benchmarks/gpu_report.py             the report, from the emulator and the compiler
python benchmarks/gpu_report.py --budgets   and the table that tests/gpu_free holds them to
python benchmarks/gpu_report.py --accesses "deposit 0.5"   what each access of one op asks for, only
python benchmarks/gpu_report.py --run DIR   what tools/measure_gpu.py wrote there, in place of the
    last run: benchmarks/results/CARD, the page's first section, the README's picture and paragraph
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests" / "gpu_free")]

import gpu_page  # noqa: E402  # beside this file
import gpu_picture  # noqa: E402  # likewise
from ladder import measure  # noqa: E402  # tests are no package
from ladder.catalogue import workloads  # noqa: E402  # likewise

ARCHS = (80, 90, 100)
SIZE = 131072
_CODE = "Shared memory (bytes), occupancy, and 16-byte loads and stores on sm_90."


def traffic_table() -> list[str]:
    lines = [
        "| op | launches | floor, B/element | touched | × floor | asked for / touched |",
        "|---|---|---|---|---|---|",
    ]
    for workload in workloads(SIZE):
        moved = measure.traffic(workload)
        if moved.faults:
            raise RuntimeError(f"{workload.name}: {moved.faults}")
        cells = [
            workload.name,
            str(moved.launches),
            f"{workload.floor:.3f}",
            f"{moved.touched:.3f}",
            f"{moved.touched / workload.floor:.2f}",
            f"{moved.requested / moved.touched:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def code_table(codes: list[measure.Code]) -> list[str]:
    lines = [
        "| op: kernel | registers, sm_80 90 100 | shared | occupancy | wide accesses | barriers |",
        "|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, str], dict[int, measure.Code]] = defaultdict(dict)
    for code in codes:
        rows[code.workload, code.kernel][code.arch] = code
    for (workload, kernel), by_arch in rows.items():
        cost = by_arch[90].cost
        registers = " / ".join(str(by_arch[a].cost.registers) for a in ARCHS if a in by_arch)
        cells = [
            f"{workload}: `{kernel}`",
            registers,
            str(cost.shared),
            f"{cost.occupancy:.2f}",
            f"{cost.counts['ld128']}, {cost.counts['st128']}",
            str(cost.counts["barriers"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def publish(run: Path, note: str) -> None:
    """A measured run everywhere that shows one."""
    found = gpu_page.read(run)
    card = gpu_page.card(found)
    folder = gpu_page.keep(found, ROOT / "benchmarks" / "results")
    part = gpu_page.section(found, note)
    for name in ("GPU.head.md", "GPU.md"):
        page = ROOT / "benchmarks" / name
        page.write_text(gpu_page.put(page.read_text(), part))
    (ROOT / "docs" / "images" / "gpu.svg").write_text(gpu_picture.picture(found, card))
    readme = ROOT / "README.md"
    readme.write_text(gpu_picture.put(readme.read_text(), gpu_picture.paragraph(found, card)))
    print(f"written: {folder}, benchmarks/GPU.md, docs/images/gpu.svg, README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budgets", action="store_true", help="write tests/gpu_free/budgets.csv")
    parser.add_argument("--accesses", metavar="OP", help="print what an op's accesses ask for")
    parser.add_argument("--run", metavar="DIR", type=Path, help="put a measured run into the page")
    parser.add_argument("--note", default="", help="with --run: a sentence on that run")
    arguments = parser.parse_args()
    if arguments.run:
        publish(arguments.run, arguments.note)
        return
    if arguments.accesses:
        (workload,) = [w for w in workloads(SIZE) if w.name == arguments.accesses]
        print("\n".join(measure.accesses(workload)))
        return
    codes = [c for w in workloads(65536) for a in ARCHS for c in measure.machine_code(w, a)]
    if arguments.budgets:
        measure.write_budgets(codes)
    spilled = [code.key for code in codes if code.cost.spills]
    text = (Path(__file__).parent / "GPU.head.md").read_text()
    parts = [
        text.rstrip(),
        f"## Bytes\n\n{SIZE:,} elements, compiled for sm_90 and run in the emulator.",
        "\n".join(traffic_table()),
        f"## Machine code\n\n{_CODE}\nSpills: {spilled or 'none, in any kernel on any of them'}.",
        "\n".join(code_table(codes)),
    ]
    (Path(__file__).parent / "GPU.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
