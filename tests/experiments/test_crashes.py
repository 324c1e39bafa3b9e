"""A few of the hits of `make test-crash`, the same ones each time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the operating system has no fork")
def test_runs_that_are_hit_go_on_to_the_same_bits() -> None:
    script = Path(__file__).with_name("crashes.py")
    done = subprocess.run(
        [sys.executable, str(script), "8", "1"],
        cwd=script.parent.parent.parent,
        env={**os.environ, "PYTHONPATH": str(script.parent.parent.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("8 hits; ")
