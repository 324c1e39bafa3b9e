"""Every file that the package writes is the old one or the new one."""

import ast
import os
from pathlib import Path

import pytest

from fedmap_sparse._files import write_atomically

PACKAGE = Path(__file__).parent.parent / "fedmap_sparse"


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_before(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"before")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match=f"No space left.*{path}"):
        write_atomically(path, b"after")
    monkeypatch.undo()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_before_can_be_kept(tmp_path: Path) -> None:
    path, kept = tmp_path / "file", tmp_path / "kept"
    for data in (b"one", b"two", b"three"):
        write_atomically(path, data, keep=kept)
    assert (path.read_bytes(), kept.read_bytes()) == (b"three", b"two")


def test_files_are_renamed_in_one_place() -> None:
    """Who writes by other means can leave half a file."""
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("fsync", "write_bytes", "rename")
    }
    assert found == {"_files.py"}
