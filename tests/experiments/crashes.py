"""Runs that are killed, starved of disk or interrupted, and go on: `python crashes.py COUNT SEED`.

torch is imported once. Each case is a fork of this process that runs the command line on digits,
over two arms of three rounds, and is hit at one event: the nth call of the operating system that
makes, writes, renames or removes a file, or a random moment. After each hit every file must be
whole, and the same run, resumed, must end with the bits of one that nothing happened to.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedmap_sparse import _command, cli
from fedmap_sparse.experiments import checkpoint, config
from fedmap_sparse.experiments.data import load

EVENTS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "ftruncate")
OPTIONS = ["dataset=digits", "model=mlp", "clients=3", "rounds=3", "batch_size=128", "threads=1"]
TIMED = {"seconds", "phases", "overhead"}


def words(out: Path) -> list[str]:
    return ["run", *OPTIONS, "--out", str(out)]


def fork(argv: list[str], before: Callable[[], None], said: Path) -> int:
    """A process that runs the command line with its output in `said`; its number."""
    child = os.fork()
    if child:
        return child
    with said.open("wb") as stream:
        os.dup2(stream.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # As the command itself starts: `_command.watch_imports` has run, and it is the command.
    signal.signal(signal.SIGINT, _command._leave)
    _command.is_command = lambda: True
    sys.argv = ["fedmap-sparse", *argv]
    before()
    code = 70
    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    os._exit(code)


def end(child: int) -> int:
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hit(number: int, strike: Callable[[str, tuple[Any, ...]], None]) -> Callable[[], None]:
    """Call `strike` at the `number`th event, and at each one after it if it returns."""
    count = 0

    def wrapped(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **rest: Any) -> Any:
            nonlocal count
            count += 1
            if count >= number:
                strike(name, args)
            return real(*args, **rest)

        return call

    def install() -> None:
        for name in EVENTS:
            setattr(os, name, wrapped(name))

    return install


def kill(name: str, args: tuple[Any, ...]) -> None:
    if name == "write":  # half of it reaches the file
        REAL_WRITE(args[0], bytes(args[1])[: len(args[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(name: str, args: tuple[Any, ...]) -> None:
    makes = name in ("mkdir", "replace", "fsync") or (name == "open" and args[1] & os.O_CREAT)
    if makes or (name == "write" and args[0] > 2):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


REAL_WRITE = os.write


def nothing() -> None:
    pass


def results(out: Path) -> dict[str, Any]:
    """All that a run leaves but its times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    found: dict[str, Any] = {
        "metrics": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "summary": {
            name: {k: v for k, v in own.items() if k not in TIMED} for name, own in summary.items()
        },
    }
    for path in sorted(out.glob("*.fedmap")) + sorted(out.glob("model*.safetensors")):
        found[path.name] = path.read_bytes()
    return found


def check_whole(out: Path) -> None:
    """Every file is absent or complete, and a checkpoint that was there still is."""
    if not out.exists():
        return
    for path in out.iterdir():
        if path.name == "config.toml":
            assert config.is_complete(tomllib.loads(path.read_text())), "a part of config.toml"
        elif path.name == "metrics.jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines())
        elif path.name == "summary.json":
            json.loads(path.read_text())
        elif path.name == "checkpoint.safetensors":
            checkpoint.load(path)
    if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text():
        saved = [out / "checkpoint.safetensors", out / "checkpoint.previous.safetensors"]
        assert any(path.exists() for path in saved), "the checkpoint is gone"


def one_line(said: Path) -> str:
    text = said.read_text()
    assert text.count("\n") == 1, text
    assert "Traceback" not in text, text
    return text


class Cases:
    """Runs cases in one folder and counts what happened."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.said = folder / "said"
        self.resumed = 0
        start = time.monotonic()
        assert end(fork(words(folder / "whole"), nothing, self.said)) == 0, self.said.read_text()
        self.seconds = time.monotonic() - start
        self.wanted = results(folder / "whole")
        self.events = self._count()

    def _count(self) -> int:
        """How many events a run has."""
        path = self.folder / "count"
        count = 0

        def strike(*_: Any) -> None:
            nonlocal count
            count += 1
            path.write_text(str(count))  # outlives the process

        assert end(fork(words(self.folder / "counted"), hit(1, strike), self.said)) == 0
        return int(path.read_text())

    def out(self) -> Path:
        out = self.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        return out

    def go_on(self, argv: list[str], out: Path) -> None:
        assert end(fork(argv, nothing, self.said)) == 0, self.said.read_text()
        found = results(out)
        for key, value in self.wanted.items():
            assert found[key] == value, f"{key} differs after resuming"
        self.resumed += 1

    def killed_at_an_event(self) -> str:
        out, number = self.out(), self.random.randint(1, self.events)
        assert end(fork(words(out), hit(number, kill), self.said)) == -signal.SIGKILL
        check_whole(out)
        self.go_on([*words(out), "--resume"], out)
        return f"killed at event {number} of {self.events}"

    def killed_at_a_moment(self) -> str:
        out = self.out()
        child = fork(words(out), nothing, self.said)
        after = self.random.uniform(0, 1.1 * self.seconds)
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        assert end(child) in (0, -signal.SIGKILL)
        check_whole(out)
        self.go_on([*words(out), "--resume"], out)
        return f"killed after {after:.2f} s"

    def disk_full(self) -> str:
        out, number = self.out(), self.random.randint(1, self.events)
        code = end(fork(words(out), hit(number, fill_disk), self.said))
        # The last events write nothing that matters, such as the number of the lock's holder.
        if code:
            assert code in (2, 3), code
            assert "No space left on device" in one_line(self.said)
        check_whole(out)
        self.go_on([*words(out), "--resume"], out)
        return f"disk full from event {number} on: exit code {code}"

    def interrupted(self) -> str:
        out = self.out()
        child = fork(words(out), nothing, self.said)
        after = self.random.uniform(0, self.seconds)
        time.sleep(after)
        os.kill(child, signal.SIGINT)
        code = end(child)
        assert code in (0, 130), (code, self.said.read_text())
        check_whole(out)
        if code == 130:  # the command that it names does what it says
            told = shlex.split(one_line(self.said).partition(" with: ")[2])
            assert told[0] == "fedmap-sparse", self.said.read_text()
            self.go_on(told[1:], out)
        return f"interrupted after {after:.2f} s: exit code {code}"


def main(count: int, seed: int) -> None:
    torch.set_num_threads(1)
    load("digits")  # what a run imports late is imported here, once
    importlib.import_module("matplotlib.backends.backend_agg")
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(Path(folder), seed)
        kinds = [
            cases.killed_at_an_event, cases.killed_at_a_moment, cases.disk_full, cases.interrupted,
        ]  # fmt: skip
        for number in range(count):
            print(kinds[number % len(kinds)](), flush=True)
        print(f"{count} hits; {cases.resumed} runs resumed, each to the same bits")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32))
