"""README, docs and examples: code blocks run, commands exist, links lead somewhere."""

import doctest
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
from markdown_it import MarkdownIt
from markdown_it.token import Token

from fedmap_sparse import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")}
    | {*ROOT.glob("tests/*/README.md"), *ROOT.glob("tools/*/README.md")}
    | {ROOT / "experiments" / "README.md"}
)
# Those of Flower and NVFlare run under these systems, in tests/engines/deployed.
EXAMPLES = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("examples/distributed/*.py")])
HIDDEN = re.compile(r"<!-- hidden\n(.*?)-->", re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tokens(page: Path) -> list[Token]:
    found = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    return [child for token in found for child in (token, *(token.children or ()))]


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Line and text of each block of Python, and of what a page runs without showing it."""
    blocks = []
    for token in tokens(page):
        if token.type == "fence" and token.info.split(" ")[0] in ("python", "pycon"):
            assert token.map
            blocks.append((token.map[0] + 1, token.content))
        elif token.type == "html_block" and (hidden := HIDDEN.match(token.content)):
            assert token.map
            blocks.append((token.map[0] + 1, hidden[1]))
    return blocks


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks run one after another, as a reader would paste them into one session."""
    monkeypatch.chdir(tmp_path)
    for package in re.findall(r"<!-- needs (\w+) -->", page.read_text()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    names: dict[str, object] = {"__name__": "__page__"}
    for line, text in python_blocks(page):
        if ">>> " in text:
            parsed = doctest.DocTestParser().get_doctest(text, names, name(page), str(page), line)
            runner = doctest.DocTestRunner(
                optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            out: list[str] = []
            assert runner.run(parsed, out=out.append, clear_globs=False).failed == 0, "".join(out)
            names.update(parsed.globs)
        else:
            # As many empty lines before it as stand above it, so that an error names its line.
            exec(compile("\n" * line + text, str(page), "exec"), names)


def commands(page: Path) -> list[str]:
    """Each command line of a page's shell blocks, continued lines joined, comments gone."""
    blocks = [t.content for t in tokens(page) if t.type == "fence" and t.info in ("sh", "bash")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_command(words: list[str], tmp_path: Path) -> None:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:3] == ["python", "-m", "fedmap_sparse"]:
        words = ["fedmap-sparse", *words[3:]]
    match words:
        case ["make", *targets]:
            named = {t for t in targets if "=" not in t}
            assert named <= make_targets()
        case ["python", script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file()
        case ["pip", "install", *what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            for wanted in re.findall(r"\[(.*?)\]", " ".join(what)):
                assert set(wanted.split(",")) <= set(extras["optional-dependencies"])
        case ["fedmap-sparse", "run", *options] if "--help" not in options:
            # Every option is read and checked; the last one makes it print and end.
            options = [word for word in options if word not in ("--resume", "--overwrite")]
            toml = [word for word in options if word.endswith(".toml")]
            for file in toml:
                Path(file).write_text("rounds = 2\n")
            # There is no run here to go on with.
            options = [word for word in options if word != "--resume"]
            # A partition is one seed's.
            options = [word for word in options if not word.startswith("seeds=")]
            assert cli.main(["run", *options, "--show-partition"]) == 0
        case ["fedmap-sparse", command, *_]:
            known = ("run", "sweep", "compare", "report", "bench", "inspect", "info")
            assert command in known
            with pytest.raises(SystemExit) as done:
                cli.main([command, "--help"])
            assert done.value.code == 0


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name)
def test_commands_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make's targets, files, extras and every option of `fedmap-sparse run` are there."""
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        check_command(shlex.split(line, comments=True), tmp_path)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    found = set()
    all_tokens = MarkdownIt("commonmark").parse(page.read_text())
    for before, token in itertools.pairwise(all_tokens):
        if before.type == "heading_open":
            text = "".join(
                c.content for c in token.children or () if c.type in ("text", "code_inline")
            )
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for token in tokens(page):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if not target or re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} of {name(page)} is not there"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name(file)} has no heading #{anchor}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    """By the command that its docstring names."""
    named = re.search(rf"((?:python|torchrun)[^`\n]*) {name(example)}\b", example.read_text())
    assert named, f"the docstring of {example.name} names no command that runs it"
    launcher, *options = shlex.split(named[1])
    module = ["-m", "torch.distributed.run"] if launcher == "torchrun" else ["-W", "error"]
    done = subprocess.run(
        [sys.executable, *module, *options, str(example)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_picture_of_the_architecture_names_every_op() -> None:
    picture = (ROOT / "docs/images/architecture.svg").read_text()
    named = set(re.findall(r"\w+", " ".join(re.findall(r'class="t m" x="84".*?>(.*?)<', picture))))
    ops = (ROOT / "fedmap_sparse/ops").glob("[!_]*.py")
    assert named == {p.stem for p in ops}
