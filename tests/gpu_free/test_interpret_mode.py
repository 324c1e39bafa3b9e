"""`TRITON_INTERPRET=1`, as a user without a GPU would set it: CPU tensors, backend="triton"."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import torch
import fedmap_sparse as fs
from ladder import contracts

assert fs.backends()["triton"] == "available"
show = lambda **tensors: None
for dtype in contracts.FLOATS:
    contracts.pack(3001, 0.3, dtype, "cpu", show)
    contracts.masked_sgd(0.3, dtype, "cpu", show)
contracts.masked_adamw(0.3, torch.float32, "cpu", show, amsgrad=True)
contracts.deposit(3001, 0.3, "cpu", show)
contracts.accumulate(1001, torch.float32, "cpu", show, aligned=True)
contracts.quantize(1001, 256, "cpu", show, feedback=True)
contracts.select(torch.randn(5000), 700, None, show)
"""


def test_every_op_runs_interpreted() -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "tools"), str(root / "tests" / "gpu_free"), str(root)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
