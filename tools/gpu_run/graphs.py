"""Direct launches beside replays of a CUDA graph: where models are small, launches are the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gpu_run.bench import Bench
from gpu_run.extras import MARK
from gpu_run.waits import calls, captured

#: Calls between two looks at the clock.
_CALLS = 200
_OPS = (f"select{MARK}", "select", "pack", "masked_sgd")


def local_step(device: torch.device, by: str) -> Callable[[], Any]:
    """Forward, loss, backward and masked step of a small network, on tensors that stay in place."""
    import fedmap_sparse as fs
    from fedmap_sparse.ops import masked_sgd
    from fedmap_sparse.ops._segments import Segments

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10)).to(device)
    params = fs.flatten(net)
    mask = fs.ops.prune_(params.prunable, params.mask.nnz // 10, within=params.mask, backend=by)
    segments = Segments(
        [e.offset for e in params.layout.entries], [e.numel for e in params.layout.entries]
    )
    segments.rows[:, 3] = masked_sgd.sgd_flags(zeroed=True)
    segments.scalars[:, :2] = torch.tensor([0.01, 0.9])
    # On the device, so that a graph reads what is there when it is replayed.
    segments.scalars = segments.scalars.to(device)
    x, y = torch.randn(64, 784, device=device), torch.randint(10, (64,), device=device)
    momentum = torch.zeros(mask.nnz + params.values.numel() - mask.numel, device=device)

    def step() -> torch.Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        grads = [g.contiguous() for g in torch.autograd.grad(loss, params.parameters)]
        masked_sgd.step_segments_(
            params.values, mask, grads, segments, momentum_buffer=momentum, backend=by
        )
        return loss.detach()

    return step


def wall_us(run: Callable[[], Any], repeats: int) -> float:
    """Microseconds per call from the first to the device's end."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return round(1e6 * (time.perf_counter() - start) / repeats, 1)


def graphs(bench: Bench) -> None:
    """Of three ops and of a local step: wall time per call, directly and replayed."""
    by = "triton" if bench.real else "reference"
    n = 1 << 20 if bench.real else 5000
    found = calls(n, bench.device, by)
    work = {
        "local step": local_step(bench.device, by),
        **{name: found[name] for name in _OPS if name in found},
    }
    rows: dict[str, Any] = {}
    failed = []
    for name, run in work.items():
        if bench.left() < 1:
            bench.note(left_out=f"from {name} on: no time left")
            break
        try:
            if bench.real:
                with torch.cuda.stream(torch.cuda.Stream()):  # where autograd warms up for a graph
                    for _ in range(3):
                        run()
                torch.cuda.synchronize()
            else:
                run()
            _, replay = captured(run, bench.real)
            rows[name] = {"direct": 0.0, "replay": 0.0}
            if bench.real:
                rows[name] = {"direct": wall_us(run, _CALLS), "replay": wall_us(replay, _CALLS)}
        except Exception as error:  # the others may hold
            rows[name] = {"error": repr(error)[:300]}
            failed.append(name)
        bench.note(n=n, wall_us=rows)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")
