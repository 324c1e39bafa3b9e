"""The README's picture and paragraph of the GPU, from what `tools/measure_gpu.py` measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpu_tables import MARK, Json, copy_rate, three

BEGIN, END = "<!-- figures of a GPU -->", "<!-- end of the figures -->"
#: What is shown: words, the workload, and the bench's op and density, which has peers.
SHOWN: tuple[tuple[str, str, str, float], ...] = (
    ("select a tenth, with the mask", "select float32", "select", 0.1),
    ("pack a tenth", "pack float32 0.1", "pack", 0.1),
    ("unpack a tenth", "unpack float32 0.1", "unpack", 0.1),
    ("masked SGD, a tenth", "masked_sgd float32 0.1", "masked_sgd", 0.1),
    ("masked AdamW, a tenth", "masked_adamw float32 0.1", "masked_adamw", 0.1),
    ("masked AdamW, a half", "masked_adamw float32 0.5", "masked_adamw", 0.5),
    ("mean of 10 vectors", "weighted_mean 10 float32", "accumulate", 0.5),
    ("cast to bfloat16, overflows counted", "cast float32 bfloat16", "cast_bfloat16", 1.0),
    ("int8 with error feedback", "quantize_int8 feedback", "quantize_int8", 1.0),
)


@dataclass(frozen=True)
class Row:
    """One op's microseconds beside its floor's and its fastest peer's, if it has one."""

    words: str
    op: str
    us: float
    floor: float | None
    peer: tuple[str, float] | None


def rows(found: dict[str, Json]) -> list[Row]:
    """From the bench's record where there is one: ours, its floor and peers in turns."""
    records = {(r["op"], r["density"]): r for r in found.get("peers", {}).get("records", [])}
    work = found.get("baseline", {}).get("workloads", {})
    rate, made = copy_rate(found.get("machine", {})), []
    for words, name, op, density in SHOWN:
        if record := records.get((op, density)):
            others = [(peer, 1e6 * one["median_s"]) for peer, one in record["peers"].items()]
            best = min(others, key=lambda one: one[1], default=None)
            size = f", {record['n'] * density / 1e6:.1f} M each" if op == "accumulate" else ""
            ours, floor = 1e6 * record["median_s"], 1e6 * record["floor_s"]
            made.append(Row(words + size, op, ours, floor, best))
        else:
            # CUDA C++ is what a device has by itself, where it can run.
            row = next((work[n] for n in (name + MARK, name) if "us" in work.get(n, {})), None)
            if row:
                floor = row["floor_bytes"] / rate / 1000 if rate else None
                made.append(Row(words, op, row["us"], floor, None))
    return made


def picture(found: dict[str, Json], card: str) -> str:
    """An SVG file: bars on a logarithmic axis, the floor's mark across each."""
    from fedmap_sparse import page
    from fedmap_sparse.page.drawing import MARK as LINE
    from fedmap_sparse.page.drawing import OURS, THEIRS, bars, beside

    shown = rows(found)

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        least = min(one.floor or one.us for one in shown)
        most = max(max(one.us, one.peer[1] if one.peer else 0) for one in shown)
        axes.set_xlim(0.8 * least, 40 * most)
        for at, one in enumerate(shown):
            pairs = [(one.us, OURS, f"{three(one.us)}")]
            if one.peer:
                pairs.append((one.peer[1], THEIRS, f"{one.peer[0]} {three(one.peer[1])}"))
            # The longer behind.
            for us, colour, _ in sorted(pairs, reverse=True):
                axes.barh(at, us, height=0.4, color=colour)
            if one.floor:
                axes.plot([one.floor] * 2, [at - 0.24, at + 0.24], color=LINE, linewidth=2.5)
            beside(axes, at, max(us for us, *_ in pairs), "; ".join(words for *_, words in pairs))
        ticks = [10**k * m for k in range(6) for m in (1, 3) if least <= 10**k * m <= 1.5 * most]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"microseconds on an {card.removeprefix('NVIDIA ')}, logarithmic")

    legend = {"fedmap_sparse": OURS, "the fastest peer": THEIRS, "the floor": LINE}
    drawn = bars("gpu", [one.words for one in shown], draw, legend=legend)
    return page.alone(page.Picture(f"Ops on an {card}", "", drawn))


def paragraph(found: dict[str, Json], card: str) -> str:
    """The README's, between BEGIN and END."""
    by_op: dict[str, Row] = {}
    for row in rows(found):
        by_op.setdefault(row.op, row)
    told = [_told(words, by_op[op]) for op, words in (
        ("select", "a selection with its mask"), ("pack", "packing a tenth"),
        ("masked_adamw", "a step of masked AdamW at density 0.1"),
    ) if op in by_op]  # fmt: skip
    n = found.get("baseline", {}).get("n", 0)
    lines = _wrapped(
        f"GPU kernels give the bits of the CPU. On an {card.removeprefix('NVIDIA ')}, "
        f"{n / 1e6:.1f} M float32: {', '.join(told)}. All ops, floors, peers, and the goals that "
        "were missed: [benchmarks/GPU.md](benchmarks/GPU.md)."
    )
    alt = f"Ops on an {card.removeprefix('NVIDIA ')} beside their floors and their fastest peers"
    return "\n".join([BEGIN, *lines, "", f"![{alt}](docs/images/gpu.svg)", END])


def _told(words: str, row: Row) -> str:
    peer = f" ({row.peer[0]} {three(row.peer[1])})" if row.peer else ""
    return f"{words} {three(row.us)} us{peer}"


def _wrapped(text: str, width: int = 104) -> Sequence[str]:
    import textwrap

    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def put(readme: str, part: str) -> str:
    """The README with its paragraph replaced; ValueError if it has no place for one."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md: expected {BEGIN} and {END}, found neither or one")
    return readme.split(BEGIN, 1)[0] + part + readme.split(END, 1)[1]
