"""Pages of `fedmap_sparse.page`: read strictly, and looked at in a headless Chromium."""

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
VOID = {"meta", "link", "br", "img"}


def needs_chromium(test: Any) -> Any:
    """Skip a test, with the reason, where Chromium cannot be started."""
    for missing, reason in (
        (CHROMIUM is None, "chromium is not installed"),
        (sys.platform != "linux", "chromium is started as on Linux"),
    ):
        test = pytest.mark.skipif(missing, reason=reason)(test)
    return test


class Reader(HTMLParser):
    """Every element closed by its own end, no name twice; keeps text, titles and references."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.elements: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data + "\n"


def references(text: str) -> list[str]:
    """Whatever in a page would be loaded from elsewhere."""
    found = re.findall("https?://.*", text)
    for name, value in Reader(text).attributes:
        if name in ("src", "href", "xlink:href", "data", "action"):
            found += [value] if not value.startswith(("#", "data:")) else []
    urls = re.findall(r"url\(([^)]*)", text) + re.findall("@import.*", text)
    return found + [url for url in urls if not url.startswith("#")]


PROBE = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message || "a resource"), true);
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
console.error = (...words) => errors.push(words.join(" "));
addEventListener("load", () => {
  const table = [...document.querySelectorAll("table")].find(
    (one) => one.parentElement.getAttribute("aria-label") === TABLE);
  const column = (at) => [...table.tBodies[0].rows].map((row) => row.cells[at].textContent);
  const click = (at) => { table.rows[0].cells[at].querySelector("button").click(); };
  const found = { columns: {} };
  for (const at of COLUMNS) {
    click(at); const up = column(at); const up_says = table.rows[0].cells[at].ariaSort;
    click(at); found.columns[at] = [up, column(at), up_says, table.rows[0].cells[at].ariaSort];
  }
  const root = document.documentElement;
  found.width = root.clientWidth; found.needs = root.scrollWidth;
  found.pictures = [...document.querySelectorAll("svg")].map((one) => one.clientHeight);
  found.back = getComputedStyle(document.body).backgroundColor;
  found.errors = errors;
  parent.document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
"""


def in_chromium(
    text: str, width: int, folder: Path, table: str, columns: Sequence[int], *options: str
) -> dict[str, Any]:
    """What the probe finds in the page, in a frame of that width.

    It sorts the first table of that title by each of the columns, up and down.
    """
    probe = PROBE.replace("TABLE", json.dumps(table)).replace("COLUMNS", str(list(columns)))
    inner = html.escape(text.replace("<head>", "<head>" + probe, 1))
    frame = folder / "frame.html"
    frame.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<pre id="found"></pre><iframe width="{width}" height="900" srcdoc="{inner}"></iframe>'
    )
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert lines == []
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr
    assert match.group(1), "the probe found nothing: its script failed"
    found: dict[str, Any] = json.loads(html.unescape(match.group(1)))
    return found
