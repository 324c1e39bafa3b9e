"""Options, files and streams with hostile contents: one line, a documented code, no harm."""

import io
import os
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse import cli
from fedmap_sparse._text import printable, shown
from fedmap_sparse.experiments import data, npz

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

TINY = ["dataset=digits", "model=mlp", "clients=2", "rounds=1", "batch_size=400", "threads=1"]
DIGITS = "9" * 400


def refused(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    """The one printable line of a command that fails."""
    capsys.readouterr()
    assert cli.main(words) == code
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text[:-1].isprintable()
    assert len(text) < 9000
    return text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (f"seed={2**64}", "seed: expected at least 0 and at most 18446744073709551615"),
        (f"seed={DIGITS}", "seed: expected at least 0"),
        (f"clients={DIGITS}", "clients: expected at most 2^63 - 1"),
        (f"rounds={DIGITS}", "rounds: expected at most 2^63 - 1"),
        (f"batch_size={DIGITS}", "batch_size: expected at most 2^63 - 1"),
        (f"batch_size=-{DIGITS}", "batch_size: expected at least 1"),
        (f"threads={DIGITS}", "threads: expected at least 1 and at most 1024"),
        (f"lr={DIGITS}", "lr: expected above 0, got inf"),
        (f"rounds={'9' * 5000}", "rounds: expected an integer"),
        ("alpha=1e308 partition=dirichlet", "partition=dirichlet: alpha=1e+308 is beyond"),
        ("device=meta", "device: expected one that torch has here, got 'meta'"),
        ("device=mps:7", "device: expected one that torch has here"),
        ("device=xla", "device: expected one that torch has here"),
        ("device=privateuseone", "device: expected one that torch has here"),
        ("name=\x1b[2Jx", "name: expected letters, digits"),
        ("\x1b[2Jx=1", "unknown option '\\x1b[2Jx'"),
        ("dataset=a\x00b.npz", "dataset: expected text in UTF-8 without NUL"),
        ("dataset=\udcff.npz", "dataset: expected text in UTF-8 without NUL"),
        ("out=a\x00b", "out: expected text in UTF-8 without NUL"),
        (f"out={'long' * 2000}", "cannot be written: File name too long"),
        ("out=/dev/null/x", "/dev/null/x: cannot be written: Not a directory"),
        ("out=/dev/null", "/dev/null: expected a folder, got a file"),
        ("data=/dev/zero dataset=fashion-mnist", "no train-images-idx3-ubyte"),
        ("dataset=/dev/zero.npz", "no file /dev/zero.npz"),
    ],
    ids=lambda value: printable(value[:25]),
)
def test_impossible_options(
    word: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = [w for w in TINY if f"{w.split('=')[0]}=" not in word]
    assert message in refused(capsys, ["run", *words, *word.split(" ")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "word", ["batch_size=9223372036854775807", "device=cpu:0", "lr_decay=1e-300"]
)
def test_extreme_options_that_are_possible(word: str, tmp_path: Path) -> None:
    words = [w for w in TINY if not w.startswith("batch_size")]
    assert cli.main(["run", *words, word, "--out", str(tmp_path / "ünï — 試")]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\n[a.b]\nc = 1", "expected `key = value` lines alone, got a table [a]"),
        ("a.b.c = 1", "expected `key = value` lines alone, got a table [a]"),
        ("rounds = " + "[" * 3000, "not TOML"),
        ("rounds = {a = {b = 1}}", "expected `key = value` lines alone"),
        (f"rounds = {'9' * 5000}", "not TOML"),
        (f"rounds = 0x{'f' * 5000}", "rounds: expected at most 2^63 - 1, got an integer of 20,000"),
        (f"lr = {DIGITS}", "lr: expected a number, got 99"),
        (f"lr = 1{'0' * 300}", "RUNS"),
        ("lr = inf", "lr: expected above 0, got inf"),
        ("rounds = [1, 2]", "rounds: expected an integer, got [1, 2]"),
        ("rounds = 1979-05-27", "rounds: expected an integer, got datetime.date(1979, 5, 27)"),
        ('out = "a\\u0000b"', "out: expected text in UTF-8 without NUL, got 'a\\x00b'"),
        ('"a\\u001b[2Jb" = 1', "unknown option 'a\\x1b[2Jb'"),
        ('["\\u001b[2J"]', "got a table [\\x1b[2J]"),
        (b"\xff\xfe", "not TOML: 'utf-8' codec"),
        (b"#" * (1 << 21), "expected at most 1,048,576 bytes, got 2,097,152"),
    ],
    ids=range(16),
)
def test_hostile_config_files(
    text: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    if message == "RUNS":  # a large rate diverges: that is a failed round
        words = ["run", str(path), *TINY, f"out={tmp_path / 'x'}"]
        assert "usable updates, got 0" in refused(capsys, words, 1)
    else:
        assert message in refused(capsys, ["run", str(path)])


def no_file(path: Path) -> None:
    pass


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(4 << 30)


def sparse_with_magic(path: Path) -> None:
    header = b"\x89FEDMAP\n" + struct.pack("<HH", 1, 128)
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(4 << 30)


def longer(path: Path) -> None:
    params = fs.flatten(nn.Linear(4, 4))
    path.write_bytes(fs.encode(params, params.mask))
    with path.open("ab") as stream:
        stream.truncate(4 << 30)


STRANGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (no_file, "No such file"),
    "folder": (Path.mkdir, "expected an ordinary file, got a folder"),
    "pipe": (os.mkfifo, "expected an ordinary file, got a pipe"),
    "device": (
        lambda path: path.symlink_to("/dev/zero"),
        "expected an ordinary file, got a device",
    ),
    "terminal": (lambda path: path.symlink_to("/dev/tty"), "cannot be read"),
    "loop": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "empty": (Path.touch, "expected a header of 128 bytes, got 0"),
    "4 GB of nothing": (sparse, "expected the magic"),
    "4 GB with a magic": (sparse_with_magic, "header: expected CRC"),
    "4 GB after a message": (longer, "bytes, got 4294967296"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_inspect_refuses_what_is_no_message_at_once(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = STRANGE[kind]
    path = tmp_path / "m.fedmap"
    make(path)
    start = time.monotonic()
    assert message in refused(capsys, ["inspect", str(path)])
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "4 GB of nothing"])
@pytest.mark.parametrize("use", ["config", "npz", "checkpoint"])
def test_other_files_are_looked_at_first_too(
    kind: str, use: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = {"config": "a.toml", "npz": "a.npz", "checkpoint": "checkpoint.safetensors"}[use]
    path = tmp_path / name
    STRANGE[kind][0](path)
    words = {
        "config": ["run", str(path)],
        "npz": ["run", f"dataset={path}", "--show-partition"],
        "checkpoint": ["run", "--resume", "--out", str(tmp_path)],
    }[use]
    start = time.monotonic()
    assert name in refused(capsys, words)
    assert time.monotonic() - start < 5.0


def test_inspect_escapes_what_a_sender_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = fs.flatten(nn.Linear(4, 4))
    meta = {"\x1b[2Jkey": "\x1b]0;title\x07", "a\nround 9": 1, "b=1, c": "\u202egnp", "fine": 2}
    path = tmp_path / "m.fedmap"
    path.write_bytes(fs.encode(params, params.mask, meta=meta))
    assert cli.main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert all(text.isprintable() for text in lines)
    assert not any(text.startswith("round 9") for text in lines)
    text = "\n".join(lines)
    assert r"'\x1b[2Jkey'='\x1b]0;title\x07'" in text
    assert r"'b=1, c'='\u202egnp'" in text
    assert "fine=2" in text
    assert str(fs.codec.inspect(path.read_bytes())) == text.rstrip("\n")


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\u202e", "\udcff", "ünï"])
def test_file_names_are_escaped(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, ["inspect", str(tmp_path / name)])
    refused(capsys, ["run", str(tmp_path / f"{name}.toml")])
    refused(capsys, ["run", f"dataset={tmp_path / name}.npz"])


def test_long_and_deep_values_are_shown_short() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, 10**5000, deep, b"\x00" * 10**6, "\x1b" * 100):
        assert len(shown(value)) < 400
        assert shown(value).isprintable()


# .npz files


def npy(shape: str, descr: str = "|u1", body: bytes = b"") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(1099511627776,)"), "needs 1,099,511,627,776 bytes; the file has 0"),
        (npy("(9223372036854775807, 9223372036854775807)"), "the file has 0"),
        (npy("(-1, -4)", body=b"1234"), "has the shape [-1, -4]"),
        (npy("(10,)", body=b"123"), "needs 10 bytes; the file has 3"),
        (npy("(1,)", descr="|O"), "x_train holds Python objects, not numbers"),
        (npy("(" + "1," * 5000 + ")"), "cannot be read as .npz"),
        (npy("(1).__class__"), "cannot be read as .npz"),
        (npy("[[" * 500), "cannot be read as .npz"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "version (9, 0)"),
        (b"", "cannot be read as .npz"),
        (b"not an array", "cannot be read as .npz"),
    ],
    ids=range(11),
)
def test_npz_headers_are_checked_before_arrays_are_read(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", content)
    with pytest.raises(fs.errors.DataError) as caught:
        data.load(str(path))
    assert message in str(caught.value)


def test_a_zip_bomb_is_refused_by_its_declared_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", npy(f"({1 << 24},)", body=bytes(1 << 24)))
    monkeypatch.setattr(npz, "_HARMLESS", 1 << 20)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # nothing may be read
    with pytest.raises(fs.errors.DataError, match="taken for a zip bomb"):
        data.load(str(path))
    monkeypatch.setattr(npz, "_memory", lambda: 1 << 20)
    with pytest.raises(fs.errors.DataError, match="this machine has 1,048,576 of memory"):
        data.load(str(path))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_read(method: int, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = {"x_train": np.zeros((4, 4, 4)), "y_train": np.arange(4) % 2}
    arrays |= {"x_test": np.zeros((2, 4, 4)), "y_test": np.arange(2)}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.save(stream, array)
    assert data.load(str(path)).classes == 2


# Streams


class Ascii(io.TextIOWrapper):
    """Standard output in an ASCII locale."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


def test_an_ascii_terminal_gets_escapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stream = Ascii()
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["run", *TINY, "baseline=false", "--out", str(tmp_path / "ünï")]) == 0
    stream.seek(0)
    assert "everything is in" in (text := stream.read())
    assert "\\xfcn\\xef" in text


@pytest.mark.parametrize("words", [["info"], ["run", *TINY, "--show-partition"], ["run", *TINY]])
@pytest.mark.parametrize("kind", ["full", "no reader"])
def test_output_that_cannot_be_written(
    kind: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if kind == "full":
        stream = Path("/dev/full").open("w")  # noqa: SIM115  # a stream that fails
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(words) == 3
    monkeypatch.undo()
    stream.close()
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    reason = {"full": "No space left on device", "no reader": "Broken pipe"}[kind]
    assert f"standard output cannot be written: {reason}" in text
    if words[-1] == TINY[-1]:
        assert text.endswith("; go on with: fedmap-sparse run --resume --out runs/fedmap\n")
        monkeypatch.chdir(tmp_path)
        assert cli.main(["run", "--resume", "--out", "runs/fedmap"]) == 0


def test_memory_that_runs_out_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def huge(*_: object) -> torch.Tensor:
        return torch.empty(1 << 60)

    monkeypatch.setattr(data, "_digits", huge)
    assert "out of memory: " in refused(capsys, ["run", *TINY, f"out={tmp_path / 'x'}"], 3)


def test_a_folder_that_is_removed_under_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from fedmap_sparse.experiments import journal

    def vanish(*_: object) -> None:
        shutil.rmtree(tmp_path / "x")

    monkeypatch.setattr(journal.Journal, "start", vanish)
    words = ["run", *TINY, f"out={tmp_path / 'x'}"]
    text = refused(capsys, words, 3)
    assert "checkpoint.safetensors: No such file or directory" in text or "broadcast" in text
    assert f"go on with: fedmap-sparse {' '.join(words)}" in text  # no folder, so from the start
