"""The command as a process of its own: Ctrl-C while it imports, its streams, locale and folders."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmap_sparse import cli

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

ROOT = Path(__file__).parent.parent.parent
RUN = ["run", "dataset=digits", "model=mlp", "clients=2", "rounds=2", "batch_size=400", "threads=1"]
COMMAND = shlex.join([sys.executable, "-m", "fedmap_sparse"])

# Python runs a module of this name before anything else.
INTERRUPT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("INTERRUPT_AT"):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""

TELL = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch._dynamo", "fedmap_sparse.experiments.training"):
            with open(os.environ["IMPORTS"], "a") as file:
                file.write(f"{name}\\n")

sys.meta_path.insert(0, Finder())
"""


def start(
    command: str, cwd: Path, before: Callable[[], None] | None = None, **environment: str
) -> "subprocess.CompletedProcess[bytes]":
    """What a shell does with `command`."""
    paths = [environment.pop("FIRST", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    # Where the tests ignore SIGINT, as jobs in the background do, the child would too.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            check=False,
            timeout=120,
            preexec_fn=before,
        )
    finally:
        signal.signal(signal.SIGINT, handler)


def one_line(done: "subprocess.CompletedProcess[bytes]", code: int) -> str:
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert text.count("\n") == 1, text
    assert text[:-1].isprintable()
    return text


@pytest.mark.parametrize(
    "module",
    [
        "numpy",
        "torch",
        "torch.nn.functional",
        "fedmap_sparse.cli",
        "safetensors.torch",
        "matplotlib",
    ],
)
def test_ctrl_c_while_it_imports(module: str, tmp_path: Path) -> None:
    if module == "matplotlib":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)
    out = tmp_path / "run"
    words = shlex.join([*RUN, "--out", str(out)])
    done = start(f"exec {COMMAND} {words}", tmp_path, FIRST=str(tmp_path), INTERRUPT_AT=module)
    told = shlex.split(one_line(done, 130).partition(" with: ")[2])
    assert told[0] == "fedmap-sparse"
    assert out.exists() is (module == "matplotlib")
    assert cli.main(told[1:]) == 0
    assert (out / "summary.json").exists()


@pytest.mark.parametrize(("words", "unbuffered"), [("info", ""), ("--version", "1")])
@pytest.mark.parametrize(
    ("to", "reason"),
    [(">&-", "it was closed"), ("| head -0", "Broken pipe"), (">/dev/full", "No space left")],
)
def test_an_output_that_takes_nothing(
    to: str, reason: str, words: str, unbuffered: str, tmp_path: Path
) -> None:
    # argparse prints the version, and drops what it cannot write.
    # The sleep lets `head` leave first. Without pipefail, the first command writes its code.
    sleep = "sleep 0.5; " if to[0] == "|" else ""
    command = f"{{ {sleep}{COMMAND} {words}; echo $? >code; }} {to}"
    done = start(command, tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert reason in one_line(done, done.returncode)
    assert (tmp_path / "code").read_text() == "3\n"


def test_neither_a_run_nor_its_workers_import_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TELL)
    where = {"FIRST": str(tmp_path), "IMPORTS": str(tmp_path / "imports")}
    done = start(f"{COMMAND} {shlex.join(RUN)} processes=2", tmp_path, **where)
    assert done.returncode == 0, done.stderr.decode()
    # By the run and two workers; the compiler's import takes 2 to 4 s.
    imports = (tmp_path / "imports").read_text().split()
    assert imports == ["fedmap_sparse.experiments.training"] * 3


def test_a_run_whose_reader_leaves_goes_on(tmp_path: Path) -> None:
    run = shlex.join([*RUN, "--out", "x"])
    done = start(f"{{ {COMMAND} {run}; echo $? >code; }} | head -1", tmp_path)
    assert (tmp_path / "code").read_text() == "3\n"
    told = one_line(done, 0)
    assert told.endswith("; go on with: fedmap-sparse run --resume --out x\n")
    assert cli.main(["run", "--resume", "--out", str(tmp_path / "x")]) == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_get_no_file_of_the_run(closed: str, tmp_path: Path) -> None:
    done = start(f"{COMMAND} {shlex.join([*RUN, '--out', 'x'])} {closed}", tmp_path)
    assert done.returncode == 0
    if closed == ">&-":
        assert "results go to the run's folder alone" in one_line(done, 0)
    else:
        assert done.stderr == b""
    assert cli.main(["inspect", str(tmp_path / "x" / "broadcast.fedmap")]) == 0


@pytest.mark.parametrize(
    "locale",
    [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"}],
    ids=["C", "ascii"],
)
def test_paths_with_unicode_in_a_locale_without(locale: dict[str, str], tmp_path: Path) -> None:
    name = "ünï — 試"
    run = shlex.join([*RUN, "--out", name])
    done = start(f"{COMMAND} {run}", tmp_path, **locale)
    assert (done.returncode, done.stderr) == (0, b"")
    done = start(f"{COMMAND} inspect '{name}/none'", tmp_path, **locale)
    assert ("\\xfcn\\xef" if len(locale) == 2 else name) in one_line(done, 2)
    assert (tmp_path / name / "summary.json").exists()


def test_a_file_system_that_cannot_name_a_path(tmp_path: Path) -> None:
    """Python takes file names as ASCII where both of its remedies are off."""
    ascii_only = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = start(f"{COMMAND} {shlex.join([*RUN, '--out', 'ünï'])}", tmp_path, **ascii_only)
    assert "out: expected text in UTF-8" in one_line(done, 2)
    done = start(f"{COMMAND} {shlex.join([*RUN, '--out', 'plain'])}", tmp_path, **ascii_only)
    assert done.returncode == 0, done.stderr


def obey_permissions() -> None:
    """In the child: root gives up the right to write and read where permissions forbid it."""
    drop, right_to_write, right_to_read = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, ..._SEARCH
    for right in (right_to_write, right_to_read):
        assert ctypes.CDLL(None).prctl(drop, right, 0, 0, 0) == 0


@pytest.mark.parametrize("how", ["", "--resume", "--overwrite"])
def test_a_read_only_folder(how: str, tmp_path: Path) -> None:
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root and not sys.platform.startswith("linux"):
        pytest.skip("root may write everywhere, and only Linux has capabilities to give up")
    before = obey_permissions if root else None
    out = tmp_path / "run"
    assert cli.main([*RUN, "baseline=false", "--out", str(out)]) == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    words = f"run {how} --out run" if how == "--resume" else f"{shlex.join(RUN)} {how} --out run"
    out.chmod(0o555)
    for path in out.iterdir():
        path.chmod(0o444)
    try:
        done = start(f"{COMMAND} {words}", tmp_path, before)
        assert "run: cannot be written: Permission denied" in one_line(done, 2)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    finally:
        out.chmod(0o755)


def test_a_current_folder_that_was_removed(tmp_path: Path) -> None:
    run = shlex.join([*RUN, "--out", str(tmp_path / "x")])
    for words in ("info", run):
        done = start(f"mkdir gone; cd gone; rmdir ../gone; exec {COMMAND} {words}", tmp_path)
        assert "the current folder cannot be read: No such file" in one_line(done, 2)
    assert not (tmp_path / "x").exists()
