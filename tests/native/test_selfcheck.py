"""The self-check of the C++ kernels: a program of `csrc` alone, without Python and torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "tests" / "native" / "selfcheck"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_every_level_agrees_with_scalar(tmp_path: Path) -> None:
    """Compiled here for this machine; `make test-arm` does the same for other processors."""
    made = subprocess.run(
        [
            "make",
            "-s",
            "-C",
            str(PROGRAM),
            f"-j{os.cpu_count()}",
            f"OUT={tmp_path}",
            "CXXFLAGS=-O1",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    done = subprocess.run([tmp_path / "selfcheck"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " 0 failures" in done.stdout
