"""Hardware counters by ncu: one launch of each kernel, where the machine allows it."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_run.bench import Bench, Skip
from gpu_run.extras import MARK

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
#: Each runs once under ncu, after a run that compiles.
WORKLOADS = (
    f"select float32{MARK}", "pack float32 0.5", "encode_mask 0.1", "decode_mask 0.1",
    "encode_values float32", "encode_values bfloat16", "decode_values float32", "extract 0.1",
    "deposit 0.1", "masked_adamw float32 0.1", "masked_adamw float32 0.5",
)  # fmt: skip
#: A kernel of torch that comes before each workload's own, so that its launches are told apart.
SEPARATOR = "spin_kernel"
_NAMES = "workloads under ncu: "
_ROOT = Path(__file__).resolve().parents[2]
_CHILD = """
import json
import time
import torch
from gpu_run.extras import each_extra
from ladder.catalogue import each_workload
end, begun = time.monotonic() + {seconds}, []
for make in (each_extra, each_workload):
    for workload in make({n}, torch.device("cuda")):
        if time.monotonic() > end:
            break
        if workload.name not in {names}:
            continue
        workload.run()
        torch.cuda.synchronize()
        begun.append(workload.name)
        torch.cuda.profiler.start()
        torch.cuda._sleep(100)
        workload.run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
print("{heading}" + json.dumps(begun), flush=True)
"""


def table(text: str) -> list[dict[str, Any]]:
    """ncu's CSV, one metric a line, as one record per launch, with the workload that it is of."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    told = [line for line in text.splitlines() if line.startswith(_NAMES)]
    names = iter(json.loads(told[0].removeprefix(_NAMES)) if told else ())
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        record = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        value = row["Metric Value"].replace(",", "")
        record[row["Metric Name"]] = float(value) if value.replace(".", "", 1).isdigit() else value
    found, name = [], "unknown"
    for record in launches.values():
        if SEPARATOR in record["kernel"]:
            name = next(names, "unknown")
        else:
            found.append({"workload": name, **record})
    return found


def counters(bench: Bench) -> None:
    """Tried once: many machines refuse counters, and then there is nothing to wait for."""
    ncu = shutil.which("ncu")
    if ncu is None or not bench.real:
        raise Skip("ncu is not installed" if bench.real else "counters are read on a device only")
    path = os.pathsep.join(str(_ROOT / part) for part in ("", "tools", "tests/gpu_free"))
    # ncu tells its counters when its child has ended, which therefore minds the time itself.
    code = _CHILD.format(n=bench.n, names=WORKLOADS, seconds=bench.left() - 10, heading=_NAMES)
    done = subprocess.run(
        [ncu, "--csv", "--metrics", ",".join(METRICS), "--cache-control", "all", "--clock-control",
         "base", "--kernel-name", f"regex:^(_|step|select|{SEPARATOR})", "--profile-from-start",
         "off", "--target-processes", "all", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=max(5.0, bench.left()), check=False,
    )  # fmt: skip
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        raise Skip("the driver lets only administrators read counters")
    bench.note(n=bench.n, launches=table(done.stdout), code=done.returncode)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:] or done.stdout[-2000:])
