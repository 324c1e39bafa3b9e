"""What the commands over experiments do: `fedmap-sparse run`, `sweep`, `compare`, `report`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmap_sparse._files import write_atomically
from fedmap_sparse._text import say, shown
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import compare as comparison
from fedmap_sparse.experiments import options, partition, runner, sweep
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.data import load
from fedmap_sparse.experiments.folder import RunFolder


def given(words: Sequence[str], *, out: str | None, data: str | None) -> dict[str, Any]:
    """The options of a command line: CONFIG.toml, if it is the first word, under key=value words.

    Raises:
        ConfigError: a file or a word that holds no options, or an unknown one; `seeds` may stand
            beside them.
    """
    rest = list(words)
    values: dict[str, Any] = {}
    if rest and "=" not in rest[0]:
        path = Path(rest.pop(0))
        if path.suffix != ".toml":
            raise ConfigError(f"expected CONFIG.toml or key=value, got {shown(str(path))}")
        values = options.read_file(path)
    values |= options.read_words(Config, rest)
    values |= {k: v for k, v in (("out", out), ("data", data)) if v is not None}
    options.check_names(Config, {k: v for k, v in values.items() if k != "seeds"})
    return values


def resumed(folder: RunFolder, over: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the run in a folder, with those of the command line on top.

    Raises:
        ConfigError: no run to go on with, or one with parts that came from Python.
    """
    found = folder.find()
    if found.python:
        raise ConfigError(
            f"{folder.path}: the run has {found.python} from Python; go on with it there, "
            "by run(..., resume=True)"
        )
    if found.options is None and over.keys() <= {"name", "out"}:
        raise ConfigError(
            f"--resume: no run in {folder.path}; to start one, name its options too, "
            "as key=value or CONFIG.toml"
        )
    return {**(found.options or {}), **over, "out": str(folder.path)}


def show_partition(config: Config) -> None:
    """Each client's classes, as a table on standard output."""
    dataset = load(config.dataset or "", config.data)
    parts = runner.partition(config, dataset)
    counts = partition.class_counts(parts, dataset.train.labels.numpy(), dataset.classes)
    say(*partition.format_class_counts(counts).split("\n"))


def run_sweep(
    file: Path,
    words: Sequence[str],
    *,
    out: str | None,
    data: str | None,
    jobs: int | None,
    overwrite: bool,
) -> int:
    """A sweep from its file, with key=value words over the file's options: the exit code.

    Raises:
        ConfigError: a file that is no sweep.
    """
    values = {"name": file.stem, **sweep.read_file(file)}
    over = options.read_words(Config, words)
    inside = set(values.get("grid", {})).union(*values.get("runs", []))
    if both := sorted(over.keys() & inside):
        raise ConfigError(f"{both[0]}: {file} has a choice of it; it cannot be set from outside")
    values |= over
    values |= {k: v for k, v in (("out", out), ("data", data)) if v is not None}
    return _ran(values, jobs=jobs, overwrite=overwrite, rounds=False)


def run_seeds(values: Mapping[str, Any], *, overwrite: bool) -> int:
    """One experiment with several seeds, each in a sub-folder: the exit code.

    Raises:
        ConfigError: as `run`.
    """
    return _ran(values, jobs=None, overwrite=overwrite, rounds=True)


def _ran(values: Mapping[str, Any], *, jobs: int | None, overwrite: bool, rounds: bool) -> int:
    made = sweep.plan(values)
    failed = sweep.run(made, processes=jobs, overwrite=overwrite, rounds=rounds, tell=say)
    whole = len(made.jobs) + len(made.bad)
    say("", f"{whole - len(failed)} of {whole} runs are done; everything is in {made.folder}")
    if failed:
        say("failed:", *(f"  {name}: {reason}" for name, reason in failed.items()))
    return 1 if failed else 0


def compare(paths: Sequence[Path], out: Path | None) -> int:
    """Runs side by side on standard output, and as JSON in a file if one is named.

    Raises:
        ConfigError: no finished run, or a path that is no folder.
    """
    lines, found = comparison.compare(paths)
    if out is not None:
        write_atomically(out, (json.dumps(found, indent=2) + "\n").encode())
    say(*lines[1:])
    return 0


def report(folder: Path, out: Path | None) -> int:
    """The page of the runs in a folder, in the folder or in the file that is named.

    Raises:
        ConfigError: no finished run in it, or a package that is missing.
    """
    from fedmap_sparse.experiments import page

    target = folder / "report.html" if out is None else out
    try:
        notes = page.write(folder, target)
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    say(*(f"left out: {note}" for note in notes), f"{target} is the page; it needs no network")
    return 0
