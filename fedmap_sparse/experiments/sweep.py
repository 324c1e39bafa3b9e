"""Many runs from one file: a grid of options, over seeds, in a pool of processes."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedmap_sparse._files import write_atomically
from fedmap_sparse._text import shown
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import compare, options, pool, results
from fedmap_sparse.experiments.config import Config, build, folder_of
from fedmap_sparse.experiments.report import cautions

#: Options that say where a run goes: the sweep says it.
_OURS = ("name", "out", "seed", "seeds")
_LONGEST = 200


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        name: of its folder within the sweep's, and in messages.
        values: its options as given, for `config.build`.
    """

    name: str
    values: dict[str, Any]


@dataclass
class Plan:
    """What a sweep will run.

    Attributes:
        folder: the sweep's own.
        jobs: in order.
        bad: name to reason of runs whose options cannot be.
    """

    folder: Path
    jobs: list[Job] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)


def read_seeds(given: Any) -> list[int]:
    """Seeds from "0,1,2" or a list.

    Raises:
        ConfigError: anything else, none, or one twice.
    """
    words = given.split(",") if isinstance(given, str) else given
    try:
        if not isinstance(words, list) or any(type(w) not in (int, str) for w in words):
            raise ValueError
        seeds = [int(word) for word in words]
    except ValueError:
        raise ConfigError(f"seeds: expected integers as in 0,1,2, got {shown(given)}") from None
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: expected at least one and none twice, got {shown(given)}")
    return seeds


def read_file(path: Path) -> dict[str, Any]:
    """A sweep's TOML file: options, `seeds`, a table [grid] and tables [[runs]].

    Raises:
        ConfigError: it cannot be read or is no TOML.
    """
    return options.read_file(path, tables=("grid", "runs"))


def plan(values: Mapping[str, Any]) -> Plan:
    """Every run of a sweep: each of `runs` with each point of `grid` and each seed.

    Where several runs have the same dense arm, it becomes one run of its own.

    Raises:
        ConfigError: what is no form of a sweep, or an option that is unknown.
    """
    common = {k: v for k, v in values.items() if k not in ("grid", "runs", "seeds")}
    seeds = read_seeds(values["seeds"]) if "seeds" in values else None
    if seeds is not None and "seed" in common:
        raise ConfigError("seed, seeds: expected one of them, got both")
    grid, variants = _grid(values.get("grid", {})), _variants(values.get("runs", [{}]))
    for names in (common, grid, *variants):
        options.check_names(Config, names)
    made = Plan(folder_of(common))
    for variant, *point in itertools.product(variants, *grid.values()):
        own = {**variant, **dict(zip(grid, point, strict=True))}
        for seed in [None] if seeds is None else seeds:
            with_seed = own if seed is None else {**own, "seed": seed}
            _add(made, _name(with_seed), {**common, **with_seed})
    made.jobs = _sharing(made.jobs, made.folder)
    return made


def _grid(given: Any) -> dict[str, list[Any]]:
    if not isinstance(given, dict):
        raise ConfigError(f"grid: expected a table of lists, got {shown(given)}")
    for key, choices in given.items():
        if key in _OURS:
            raise ConfigError(f"grid: {key} is none of a grid's; seeds = [...] stands above it")
        if not isinstance(choices, list) or not choices:
            raise ConfigError(f"grid.{key}: expected a list of values, got {shown(choices)}")
    return given


def _variants(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given or not all(isinstance(v, dict) for v in given):
        raise ConfigError(f"runs: expected tables [[runs]], got {shown(given)}")
    for variant in given:
        for key in _OURS:
            if key in variant:
                raise ConfigError(f"runs: {key} stands above the tables, for all of them")
    return given


def _name(own: Mapping[str, Any]) -> str:
    """A folder's name that tells a run from the others of its sweep."""
    words = [f"{key}={options.toml(value)}" for key, value in own.items()]
    name = re.sub(r"[^\w.,=+-]", "_", ",".join(words).replace('"', ""))
    return name or "run"


def _add(made: Plan, name: str, values: dict[str, Any]) -> None:
    if len(name) > _LONGEST or name in made.bad or any(job.name == name for job in made.jobs):
        raise ConfigError(
            f"{shown(name)}: expected names of runs that differ, of at most {_LONGEST} characters"
        )
    values = {**values, "out": str(made.folder / name)}
    try:
        build(values)
    except ConfigError as error:
        made.bad[name] = str(error)
    else:
        made.jobs.append(Job(name, values))


def _sharing(jobs: list[Job], folder: Path) -> list[Job]:
    """The jobs with each dense arm that several of them have as a job of its own, at the front."""
    keys = {job.name: _dense_key(build(job.values)) for job in jobs}
    counts = Counter(keys[job.name] for job in jobs if build(job.values).has_dense_arm)
    own = {keys[job.name] for job in jobs if build(job.values).arm == "dense"}
    dense: dict[str, Job] = {}
    found = []
    for job in jobs:
        key = keys[job.name]
        if build(job.values).has_dense_arm and (counts[key] > 1 or key in own):
            if key not in own and key not in dense:
                dense[key] = _dense_job(job, folder)
            job = replace(job, values={**job.values, "baseline": False})
        found.append(job)
    return [*dense.values(), *found]


def _dense_key(config: Config) -> str:
    place = ("name", "out", "baseline", "tensorboard")
    chosen = {k: v for k, v in config.to_dict().items() if k not in place}
    return json.dumps(results.dense_options(chosen), sort_keys=True)


def _dense_job(job: Job, folder: Path) -> Job:
    words = [w for w in job.name.split(",") if w.partition("=")[0] not in results.PRUNING]
    name = ",".join(["dense", *(w for w in words if "=" in w)])
    values = results.dense_options(job.values)
    return Job(name, {**values, "schedule": "dense", "out": str(folder / name)})


def run(
    made: Plan,
    *,
    processes: int | None = None,
    overwrite: bool = False,
    rounds: bool = False,
    tell: Callable[[str], None] = print,
) -> dict[str, str]:
    """Run what is not finished, then compare; runs that were stopped go on.

    Args:
        processes: how many at a time, at most; None: as many as there are cores for.
        overwrite: start every run anew.
        rounds: tell each round, too.
        tell: takes lines for the user.

    Returns:
        Name to reason of each run that failed, those of `made.bad` first. comparison.json in the
        sweep's folder has the results.

    Raises:
        ConfigError: fewer than one process.
        OSError: comparison.json cannot be written.
    """
    if processes is not None and processes < 1:
        raise ConfigError(f"jobs: expected at least 1, got {processes}")
    waiting = [job for job in made.jobs if overwrite or not _finished(job)]
    done = len(made.jobs) - len(waiting)
    known = f", {done} of them finished before" if done else ""
    processes, threads = share(made.jobs, processes)
    tell(
        f"{made.folder}: {len(made.jobs)} runs{known}; {processes} at a time with {threads} "
        f"{'thread' if threads == 1 else 'threads'} each"
    )
    notes = Counter(note for job in waiting for note in cautions(build(job.values)))
    for note, runs in notes.items():
        tell(f"{note} ({runs} {'run' if runs == 1 else 'runs'})")
    failed = dict(made.bad)
    for name, reason in failed.items():
        tell(f"{name}: not run: {reason}")
    failed |= pool.work(
        [(job.name, job.values) for job in waiting],
        processes=processes,
        threads=threads,
        overwrite=overwrite,
        rounds=rounds,
        tell=tell,
    )
    found, left_out = results.find([made.folder]) if made.folder.is_dir() else ([], [])
    if found:
        tables = compare.compared(results.together(found))
        text = json.dumps(compare.to_dict(tables, left_out), indent=2) + "\n"
        write_atomically(made.folder / "comparison.json", text.encode())
        for line in compare.lines(tables, left_out):
            tell(line)
    return failed


def share(jobs: Sequence[Job], processes: int | None) -> tuple[int, int]:
    """How many processes at a time, and threads for each: together the cores of this process.

    It depends on all runs of the sweep, finished or not, so that those run later have as many
    threads as those before. A sweep whose options name `threads` has that many in each.
    """
    cores = available_cores()
    given = [job.values["threads"] for job in jobs if job.values.get("threads")]
    if processes is None:
        processes = max(1, min(len(jobs), cores // max(given, default=1)))
    return processes, max(given, default=max(1, cores // processes))


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _finished(job: Job) -> bool:
    """Whether its folder holds the result of these options."""
    try:
        found = results.read(Path(job.values["out"])).config.to_dict()
    except ConfigError:
        return False
    wanted = build(job.values).to_dict()
    ignored = ("name", "out", "threads", "processes", "tensorboard")
    return all(found.get(k) == wanted.get(k) for k in found.keys() | wanted if k not in ignored)
