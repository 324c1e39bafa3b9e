"""The entropy coder's masks in chunks of other lengths: more warps in flight, more bytes."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import torch

from gpu_run.bench import Bench

#: Steps per chunk; the format knows powers of two from 1024 on.
STEPS = (1024, 2048, 4096, 8192, 16384)


def chunks(bench: Bench) -> None:
    """Encoding and decoding the mask of the catalogue, at density 0.1."""
    from ladder import catalogue

    from fedmap_sparse.ops import _payload
    from fedmap_sparse.ops import entropy as coder

    rows: dict[str, Any] = {}
    for steps in STEPS:
        if bench.left() < 0.5:
            bench.note(left_out=f"from {steps} steps on: no time left")
            return
        with (
            mock.patch.object(_payload, "chunk_steps", lambda *_, s=steps: s),
            mock.patch.object(coder, "chunk_steps", lambda *_, s=steps: s),
        ):
            torch.manual_seed(0)  # the same mask each time
            # The first two workloads of its coding are a mask's.
            rows[str(steps)] = row = {}
            for workload in itertools.islice(catalogue._coding(bench.n, bench.device), 2):
                row["bytes"] = round((workload.floor - 0.125) * workload.numel)
                row[workload.stem] = bench.median(workload.run)
        bench.note(n=bench.n, chunks=rows)
