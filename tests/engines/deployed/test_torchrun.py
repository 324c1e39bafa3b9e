"""The examples for torch.distributed under torchrun, on two ranks and on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not os.environ.get("FEDMAP_SPARSE_ENGINES"), reason="slow: make test-engines runs it"
)

ROOT = Path(__file__).parents[3]


def torchrun(example: str, ranks: int) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--nproc-per-node", str(ranks), str(ROOT / "examples/distributed" / example)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_model_does_not_depend_on_the_number_of_ranks() -> None:
    models = {re.findall(r"model (\w+) from", torchrun("ranks.py", n))[0] for n in (1, 2)}
    assert len(models) == 1


def test_bytes_per_step_fall_with_the_density() -> None:
    sent = re.findall(r"([\d,]+) of ([\d,]+) bytes per step", torchrun("ddp.py", 2))
    found = [(int(a.replace(",", "")), int(b.replace(",", ""))) for a, b in sent]
    assert found[0][0] == found[0][1]
    assert found[-1][0] < 0.06 * found[-1][1]
