"""A page that stands alone: pictures and sortable tables in one HTML file that loads nothing.

It can be mailed, archived and opened from a disk. What comes from a file is escaped, and of a text
at most 300 characters are shown. `drawing` makes the pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from importlib.util import find_spec

from fedmap_sparse import _command
from fedmap_sparse._text import printable

NEEDS = ("matplotlib", "jinja2")


@dataclass(frozen=True)
class Picture:
    """A title, words below it, and the SVG element."""

    title: str
    words: str
    svg: str


@dataclass(frozen=True)
class Cell:
    """What is shown, and what it is sorted by."""

    text: str
    key: float | str


@dataclass(frozen=True)
class Table:
    """A table with a sortable head; the first row says which columns hold numbers."""

    title: str
    head: list[str]
    rows: list[list[Cell]]


@dataclass
class Section:
    """A part of a page; `name` is its own within the page."""

    name: str
    title: str
    facts: list[tuple[str, str]]
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def require(what: str) -> None:
    """Raise RuntimeError, one line that begins with `what`, unless what draws a page is there."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"{what}: {' and '.join(missing)} not installed; `pip install fedmap-sparse[plots]`"
        )


def load() -> None:
    """Import what draws, while Ctrl-C waits: C extensions turn it into an ImportError."""
    # matplotlib says on stderr that it builds its cache of fonts, or has no folder for it.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with _command.held():
        import jinja2  # noqa: F401

        from fedmap_sparse.page import drawing  # noqa: F401


def render(title: str, sections: Sequence[Section]) -> str:
    """The page, as HTML of UTF-8."""
    load()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("fedmap_sparse.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return found.get_template("page.html").render(title=title, sections=sections)


def alone(picture: Picture) -> str:
    """One picture as a file of its own: SVG in the page's colours, light and dark."""
    colours = files("fedmap_sparse.page").joinpath("colours.css").read_text(encoding="utf-8")
    style = f"{colours}svg {{ color: var(--ink); font-family: system-ui, sans-serif; }}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head, _, body = picture.svg.partition(">")
    head = head.replace("<svg", f"<svg {names}").replace(' aria-hidden="true"', ' role="img"')
    return f"{head}><title>{escape(picture.title)}</title><style>{style}</style>{body.rstrip()}\n"


def clean(value: object) -> str:
    """As text that fits a cell."""
    found = printable(str(value))
    return found if len(found) <= 300 else f"{found[:299]}…"


def text(value: str) -> Cell:
    """A cell that is sorted as text."""
    return Cell(clean(value), clean(value))


def sort_key(value: float) -> float:
    """A number to sort by; 0 for what is none."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e30 else 0.0


def number(value: float) -> Cell:
    """A number of four digits."""
    return Cell(f"{value:.4g}", sort_key(value))
