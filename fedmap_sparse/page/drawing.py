"""Pictures: SVG to stand inside a page, whose style sheet gives the colours.

Drawn as wide as a phone, so that a page only ever makes them larger. Text stays text. The `name` of
a picture has to be its own within the page: references inside it begin with it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmap_sparse._text import printable

#: What stands in the SVG for a colour of the page, and what replaces it there.
INK, GRID, OURS, THEIRS, MARK, BACK = (f"#00000{k}" for k in range(1, 7))
#: Of curves and of a round's phases, in order.
LINES = tuple(f"#0000{16 + k:02x}" for k in range(6))
COLOURS = {
    INK: "currentColor",
    GRID: "var(--grid)",
    OURS: "var(--ours)",
    THEIRS: "var(--theirs)",
    MARK: "var(--mark)",
    BACK: "var(--back)",
    **{colour: f"var(--line{k})" for k, colour in enumerate(LINES)},
}
#: Behind a text, so that no line of the grid crosses it.
GROUND: Any = {"facecolor": BACK, "edgecolor": "none", "pad": 0.5}
MARKERS = "os^Dv*"
WIDTH = 5.0  # inches, of 72 CSS pixels here
ROW = 0.42
LONGEST = 44

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedmap-sparse",  # the same records give the same bytes
    "text.parse_math": False,
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def short(text: str) -> str:
    """As text for a picture, which has no room for more."""
    text = printable(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def beside(axes: Axes, at: float, x: float, text: str) -> None:
    """Words to the right of a bar's end."""
    axes.annotate(
        text, (x, at), xytext=(5, 0), textcoords="offset points", va="center", bbox=GROUND
    )


def bars(
    name: str,
    labels: Sequence[str],
    draw: Callable[[Axes], None],
    legend: Mapping[str, str] | None = None,
    legend_columns: int = 3,
) -> str:
    """Horizontal bars, each below its label: on a phone there is no room beside them."""
    top = 0.14 + 0.24 * -(-len(legend) // legend_columns) if legend else 0.12
    height = ROW * len(labels) + 0.5 + top
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((0.02, 0.5 / height, 0.96, (height - 0.5 - top) / height))
        draw(axes)
        axes.set_ylim(len(labels) - 0.6, -0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        place = axes.get_yaxis_transform()
        for at, text in enumerate(labels):
            axes.text(0, at - 0.45, short(text), transform=place, va="center", bbox=GROUND)
        for words, colour in (legend or {}).items():
            axes.barh(0, 0, color=colour, label=words)
        if legend:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1),
                ncols=legend_columns,
                borderaxespad=0,
                borderpad=0.2,
            )
        return svg(figure, name)


def plot(name: str, draw: Callable[[Axes], None], *, entries: int, legend_columns: int = 2) -> str:
    """Axes below a legend of so many entries."""
    height = 3.1 + 0.24 * -(-entries // legend_columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((0.13, 0.55 / height, 0.84, 2.2 / height))
        draw(axes)
        if entries:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(-0.12, 1.12),
                ncols=legend_columns,
                borderaxespad=0,
            )
        return svg(figure, name)


def svg(figure: Figure, name: str) -> str:
    """The element alone: no declaration, no metadata, and no `id` but what it refers to."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    opening, _, body = text[text.index("<svg") :].partition(">")
    box = re.search(r'viewBox="[^"]*"', opening)
    used = list(dict.fromkeys(re.findall(r'(?:"#|url\(#)([^")]+)', body)))
    body = re.sub("<[^>]*>", lambda tag: _tag(tag.group(), name, used), body)
    body = re.sub(r"\s*\n\s*", " ", body)
    head = f'<svg {box.group() if box else ""} style="font-size: 11px; fill: currentColor"'
    return f'{head} aria-hidden="true">{body}'


def _tag(text: str, name: str, used: Sequence[str]) -> str:
    """The page's font and colours, two decimals, and each `id` as the picture's name and a number.

    What the root says is not repeated: thousands of tags would be half of a page.
    """
    known = {old: f"{name}-{n}" for n, old in enumerate(used)}
    text = re.sub(r' id="([^"]*)"', lambda id_: id_.group() if id_[1] in known else "", text)
    text = re.sub(r'(\bid="|"#|url\(#)([^")]+)', lambda ref: ref[1] + known[ref[2]], text)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub("#0000[01][0-9a-f]", lambda c: COLOURS.get(c.group(), c.group()), text)
    if text.startswith("<text"):
        text = re.sub(r"(font-size: 11px|text-anchor: start|fill: currentColor)(; )?", "", text)
        text = text.replace(' style=""', "")
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", text)
