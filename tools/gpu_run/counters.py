"""Hardware counters by ncu: one launch of each kernel, where the machine allows it."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_run.bench import Bench, Skip

_STALLS = (
    "long_scoreboard",
    "barrier",
    "membar",
    "lg_throttle",
    "short_scoreboard",
    "mio_throttle",
)
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    *(f"lts__t_sectors_op_{op}.sum" for op in ("read", "write", "red", "atom")),
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    *(f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio" for why in _STALLS),
    "launch__registers_per_thread",
    "launch__waves_per_multiprocessor",
)
#: One workload of each kind; each runs once under ncu.
WORKLOADS = (
    "select float32", "select within 0.3", "pack float32 0.1", "unpack float32 0.1", "extract 0.1",
    "deposit 0.1", "masked_sgd float32 0.1", "masked_adamw float32 0.5", "masked_adamw float32 0.1",
    "masked_adamw float32 0.01", "weighted_mean 10 float32", "cast float32 bfloat16",
    "quantize_int8 feedback", "encode_mask 0.1", "decode_mask 0.1", "encode_values float32",
    "decode_values float32",
)  # fmt: skip
_ROOT = Path(__file__).resolve().parents[2]
_CHILD = """
import sys
import torch
from ladder.catalogue import each_workload
for workload in each_workload({n}, torch.device("cuda")):
    if workload.name in {names}:
        workload.run()
torch.cuda.synchronize()
"""


def table(text: str) -> list[dict[str, Any]]:
    """ncu's CSV, one metric a line, as one record per launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        record = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        value = row["Metric Value"].replace(",", "")
        record[row["Metric Name"]] = float(value) if value.replace(".", "", 1).isdigit() else value
    return list(launches.values())


def counters(bench: Bench) -> None:
    """Tried once: many machines refuse counters, and then there is nothing to wait for."""
    ncu = shutil.which("ncu")
    if ncu is None or not bench.real:
        raise Skip("ncu is not installed" if bench.real else "counters are read on a device only")
    path = os.pathsep.join(str(_ROOT / part) for part in ("", "tools", "tests/gpu_free"))
    code = _CHILD.format(n=bench.n, names=WORKLOADS)
    done = subprocess.run(
        [ncu, "--csv", "--metrics", ",".join(METRICS), "--cache-control", "all", "--clock-control",
         "base", "--kernel-name", "regex:^(_|step)", "--target-processes", "all", sys.executable,
         "-c", code],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=max(5.0, bench.left()), check=False,
    )  # fmt: skip
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        raise Skip("the driver lets only administrators read counters")
    bench.note(n=bench.n, launches=table(done.stdout), code=done.returncode)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:] or done.stdout[-2000:])
