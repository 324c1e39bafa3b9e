"""Records on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedmap_sparse.bench import growth
from fedmap_sparse.bench.case import PHASES
from fedmap_sparse.bench.runner import Record, Refused


def console() -> Any:
    try:
        from rich.console import Console
    except ImportError as error:
        raise RuntimeError(
            "bench: rich is not installed; `pip install fedmap-sparse[experiments]`"
        ) from error
    found = Console()
    return found if found.is_terminal else Console(width=120)  # in a log: not 80


def header_line(header: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    return (
        f"{header.get('device', header['machine'])}, {header['cores']} cores, {header['isa']}, "
        f"{header['threads']} threads; {versions}; commit {header['commit'][:12]}"
        f"{' with changes' if header['commit'].endswith('changes') else ''}"
    )


def table(records: list[Record]) -> Any:
    """One row a record; a column of dtypes only where they differ.

    Of a GPU the share of a copy's bandwidth takes the floor's place, and a column says what a
    caller waits who starts with an idle device.
    """
    from rich.table import Table

    mixed = len({r["dtype"] for r in records}) > 1
    cuda = any("call_s" in r for r in records)
    grid = Table(box=None, pad_edge=False)
    for name in ("op", "n", "density", *(["dtype"] if mixed else [])):
        grid.add_column(name, no_wrap=True)
    last = ["of a copy", "call"] if cuda else ["× floor"]
    for name in ("median", "p20–p80", "GB/s", *last):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("peers: median, × ours")
    for r in records:
        peers = [
            f"{name} {seconds(p['median_s'])}, ×{p['speedup']:.3g}{produced(p)}"
            for name, p in r["peers"].items()
        ]
        if "payload_bytes" in r:
            peers.insert(0, f"ours{produced(r)}")
        grid.add_row(
            r["op"],
            f"{r['n']:,}",
            f"{r['density']:g}",
            *([r["dtype"]] if mixed else []),
            seconds(r["median_s"]),
            f"{seconds(r['p20_s'])}–{seconds(r['p80_s'])}",
            f"{r['gbps']:.3g}",
            over_floor(r),
            *([seconds(r["call_s"])] if cuda else []),
            "\n".join(peers),
        )
    return grid


def round_table(records: list[Record]) -> Any:
    """One row per arm of a round: ours, then each peer with how many times ours it takes."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False)
    for name in ("round of", "density", "arm"):
        grid.add_column(name, no_wrap=True)
    for name in ("time", "bytes", "memory"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column(f"ms: {' / '.join(PHASES)}")
    for r in records:
        model = r["op"].removeprefix("round_")
        places = [model, f"{r['clients']} clients", f"{r['steps']} steps each"]
        for name, arm in (("ours", r), *r["peers"].items()):
            grid.add_row(
                places.pop(0) if places else "",
                f"{r['density']:g}" if arm is r else "",
                name,
                *(_beside(arm, r, key) for key in ("median_s", "payload_bytes", "memory_bytes")),
                " / ".join(f"{arm['phases_s'][phase] * 1e3:.3g}" for phase in PHASES),
            )
        training = seconds(r["forward_backward_s"])
        grid.add_row("", "", "forward and backward, beside", training, end_section=True)
    return grid


GROWTH_HEAD = ["growth of", "against", "from", "to", "time", "exponent", "× floor"]


def growth_table(records: list[Record], cache: int) -> Any:
    """One row a curve: its ends, its exponent, and what it takes over the floor there."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False)
    for i, name in enumerate(GROWTH_HEAD):
        grid.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for row in growth_rows(records, cache):
        grid.add_row(*row)
    return grid


def growth_rows(records: Sequence[Record], cache: int) -> list[list[str]]:
    """Cells of that table. Against n the exponent is that of what is larger than `cache` bytes."""
    rows = []
    for one in growth.series(records):
        ends, places = (one.records[0], one.records[-1]), one.values(one.axis)
        exponent = one.exponent(cache)
        rows.append(
            [
                one.name,
                one.axis,
                *(_place(one.axis, at) for at in (places[0], places[-1])),
                " → ".join(seconds(r["median_s"]) for r in ends),
                "–" if exponent is None else f"{exponent:.2f}",
                " → ".join(f"{r['median_s'] / r['floor_s']:.2f}" for r in ends),
            ]
        )
    return rows


def _place(axis: str, value: float) -> str:
    return f"{value:g}" if axis == "density" else f"{value:,.0f}"


def _beside(arm: Record, ours: Record, key: str) -> str:
    """A figure of ours; of a peer how many times ours it is."""
    if key not in arm:
        return ""
    if arm is not ours:
        return f"×{arm[key] / ours[key]:.3g}" if ours[key] else ""
    return seconds(arm[key]) if key == "median_s" else f"{arm[key] / 1e6:.3g} MB"


def over_floor(r: Record) -> str:
    """Of latencies the time beyond an empty op, of the rest the ratio to the memory's time; on a
    GPU its inverse, the share of the bandwidth that a copy of as many bytes reaches.
    """
    if "call_s" in r:
        return f"{1 / r['ratio_to_floor']:.0%}"
    if r["op"].startswith("latency_"):
        return f"+{(r['median_s'] - r['floor_s']) * 1e6:.1f} µs"
    return f"{r['ratio_to_floor']:.2f}"


def produced(r: Record) -> str:
    """The bytes that came out, where they are the point."""
    return f", {r['payload_bytes']:,} bytes" if "payload_bytes" in r else ""


def refusal(refused: Refused) -> str:
    s = refused.setting
    return f"{refused.op} n={s.n} density={s.density:g} was not timed: {refused.reason}"


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
