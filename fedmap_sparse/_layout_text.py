"""Layouts as text: for people (what is pruned, what differs) and for other processes (JSON)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmap_sparse.layout import FlatLayout

_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_DISTRIBUTED = "module."


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without the prefixes of wrappers; the names themselves where two would be one."""
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    while plain and all(short.startswith(_DISTRIBUTED) for short in plain.values()):
        plain = {name: short.removeprefix(_DISTRIBUTED) for name, short in plain.items()}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in plain}


def names_of(layout: FlatLayout) -> dict[str, str]:
    """Every name of a layout, and what it is without the prefixes of wrappers."""
    every = [*layout.names, *(e.name for e in layout.entries), *(n for n, _ in layout.aliases)]
    return plain_names([*every, *(b.name for b in layout.buffers)])


def describe(layout: FlatLayout) -> str:
    """See `FlatLayout.describe`."""
    total = sum(e.numel for e in layout.entries)
    rows = []
    reasons = layout.reasons or ("",) * len(layout.entries)
    for e, reason in zip(layout.entries, reasons, strict=True):
        verdict = "pruned" if e.offset < layout.prunable_numel else "kept"
        rows.append((verdict, e.name, str(list(e.shape)), reason))
    rows += [("tied", other, "", f"shares the memory of {name}") for other, name in layout.aliases]
    rows += [("buffer", b.name, str(list(b.shape)), b.kind) for b in layout.buffers]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = ["  ".join((*map(str.ljust, row[:3], widths), row[3])).rstrip() for row in rows]
    head = (
        f"{layout.eligible} of {total} weights can be pruned, in {len(layout.prunable_entries)} of "
        f"{len(layout.entries)} tensors"
    )
    return "\n".join([head, *lines])


def difference(ours: FlatLayout, other: FlatLayout) -> str:
    """See `FlatLayout.difference`."""
    if ours.digest() == other.digest():
        return ""
    a, b = _lines(ours), _lines(other)
    for name, wanted in a.items():
        if name not in b:
            return f"{name}: expected {wanted}, got no tensor of this name"
        if b[name] != wanted:
            return f"{name}: expected {wanted}, got {b[name]}"
    for name, got in b.items():
        if name not in a:
            return f"{name}: expected no tensor of this name, got {got}"
    pairs = zip(a, b, strict=True)
    first = next(((mine, theirs) for mine, theirs in pairs if mine != theirs), ("", ""))
    return f"expected {first[0]} before {first[1]}: the same tensors in another order"


def _lines(layout: FlatLayout) -> dict[str, str]:
    plain = names_of(layout)
    found = {}
    for e in layout.entries:
        part = "prunable" if e.offset < layout.prunable_numel else "not prunable"
        found[plain[e.name]] = f"a parameter of shape {list(e.shape)}, {part}"
    dims = dict(layout.permuted)
    for alias, name in layout.aliases:
        how = f" permuted by {list(dims[alias])}" if alias in dims else ""
        found[plain[alias]] = f"a tensor tied to {plain[name]}{how}"
    for b in layout.buffers:
        found[plain[b.name]] = f"a buffer of shape {list(b.shape)} ({b.kind})"
    return found


def guess(layout: FlatLayout, digest: bytes, eligible: int) -> str:
    """Which change of `layout` would give this digest; "" if no simple one does.

    A message holds no more of its layout than the digest and the number of prunable weights, so
    likely changes are tried. O(tensors^2) small hashes, capped.
    """
    from fedmap_sparse import layout as layouts

    parameters = {e.name: e for e in layout.entries}
    verdict = {e.name: (e.offset < layout.prunable_numel, "") for e in layout.entries}
    dims = dict(layout.permuted)
    tied = {alias: (name, dims.get(alias)) for alias, name in layout.aliases}
    buffers = {b.name: b for b in layout.buffers}
    order = [n for n in layout.names if n in parameters]

    def matches(**change: Any) -> bool:
        parts: dict[str, Any] = {
            "parameters": {n: parameters[n] for n in order},
            "tied": tied,
            "buffers": buffers,
            "names": layout.names,
            "verdict": verdict,
        }
        return bool(layouts.build(**(parts | change)).digest() == digest)

    matrices = {n: (len(e.shape) > 1, "") for n, e in parameters.items()}
    if matches(verdict=matrices):
        odd = [n for n in order if matrices[n][0] is not verdict[n][0]]
        return f"{', '.join(odd)}: prunable for the sender (two or more dimensions), not here"
    if buffers and matches(buffers={}):
        return f"{', '.join(buffers)}: the sender has no buffers"
    if tied and matches(
        tied={},
        parameters={
            n: parameters.get(n) or parameters[tied[n][0]]
            for n in layout.names
            if n in parameters or n in tied
        },
        verdict=verdict | {n: verdict[of] for n, (of, _) in tied.items()},
    ):
        return f"{', '.join(tied)}: not tied for the sender; pass aliases= to from_state_dict"
    for name in order[:200]:
        pruned = verdict[name][0]
        here, there = ("prunable", "not") if pruned else ("not prunable", "prunable")
        if matches(verdict=verdict | {name: (not pruned, "")}):
            return f"{name}: {here} here, {there} for the sender"
        if len(order) > 1 and matches(parameters={n: parameters[n] for n in order if n != name}):
            return f"{name}: the sender has no tensor of this name"
    for name in list(buffers)[:200]:
        if matches(buffers={n: b for n, b in buffers.items() if n != name}):
            return f"{name}: the sender has no buffer of this name"
    if matches(parameters={n: parameters[n] for n in sorted(order)}):
        return "the sender has the same tensors in alphabetical order"
    if eligible != layout.eligible:
        return f"{eligible} prunable weights for the sender, {layout.eligible} here"
    return ""


@dataclass
class _Shaped:
    shape: tuple[int, ...]


def parse(text: str, max_numel: int, build: Callable[..., FlatLayout]) -> FlatLayout:
    """See `FlatLayout.from_json`."""
    from fedmap_sparse.layout import BufferEntry

    try:
        found = json.loads(text)
        parameters = {_text(n): _Shaped(_sizes(s)) for n, s, _ in found["parameters"]}
        verdict = {n: (_flag(p), "as read") for n, _, p in found["parameters"]}
        dims = {_text(n): _sizes(d) for n, d in found["permuted"]}
        tied = {_text(n): (_text(of), dims.get(n)) for n, of in found["aliases"]}
        buffers = {_text(n): BufferEntry(n, _sizes(s), _text(k)) for n, s, k in found["buffers"]}
        names = tuple(_text(n) for n in found["names"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"text: expected the JSON of a layout, got {error!r}") from None
    every = [*(n for n, _, _ in found["parameters"]), *(n for n, _ in found["aliases"])]
    every += [n for n, _, _ in found["buffers"]]
    if len(set(every)) != len(every) or len(set(names)) != len(names) or set(names) - set(every):
        raise ValueError("names: expected each parameter, alias and buffer once, got others")
    for alias, (of, order) in tied.items():
        if of not in parameters or (
            order is not None and sorted(order) != list(range(len(parameters[of].shape)))
        ):
            raise ValueError(f"{alias}: expected the name of a parameter and its dims, got {of!r}")
    numel = 0
    shapes = {
        **{n: t.shape for n, t in parameters.items()},
        **{n: b.shape for n, b in buffers.items()},
    }
    for name, shape in shapes.items():
        size = 1
        for n in shape:
            size *= n
        numel += size
        if numel > max_numel:
            raise ValueError(f"{name}: expected at most {max_numel} elements in all, got more")
    return build(parameters, tied, buffers, names, verdict)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r}")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 64:
        raise TypeError(f"expected a list of at most 64 sizes, got {values!r:.40}")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int) or not 0 <= v <= 1 << 53:
            raise ValueError(f"expected a size from 0 to 2^53, got {v!r}")
    return tuple(values)
