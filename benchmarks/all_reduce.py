"""Where packing stops to pay: an all-reduce of survivors beside one of the whole tensor.

    torchrun --standalone --nproc-per-node 2 benchmarks/all_reduce.py

Milliseconds of both over gloo for a range of densities: the median of turns, and the least. It is
what the constant `DENSE_ABOVE` of `fedmap_sparse.engines.distributed` comes from. Under a minute.
"""

import statistics
import sys
import time

import torch
import torch.distributed as dist

import fedmap_sparse as fs
from fedmap_sparse.engines.distributed import packed_all_reduce

NUMEL = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
DENSITIES = (0.01, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TURNS = 25


def seconds(values: torch.Tensor, mask: fs.Mask, dense_above: float) -> float:
    dist.barrier()
    start = time.perf_counter()
    packed_all_reduce(values, mask, dense_above=dense_above)
    took = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)  # a step waits for the last rank
    return took.item()


torch.set_num_threads(1)  # the ranks share the cores
dist.init_process_group("gloo")
rng = torch.Generator().manual_seed(0)
scores = torch.randn(NUMEL, generator=rng)  # the same on every rank, and so the masks
source = torch.randn(NUMEL, generator=torch.Generator().manual_seed(dist.get_rank()))
for density in DENSITIES:
    mask = fs.ops.magnitude_mask(scores, round(density * NUMEL))
    found: dict[str, list[float]] = {"packed": [], "whole": []}
    for _ in range(TURNS):
        for name, dense_above in (("packed", 1.0), ("whole", 0.0)):
            found[name].append(seconds(source.clone(), mask, dense_above))
    if dist.get_rank() == 0:
        said = [
            f"{name} {1e3 * statistics.median(times):5.1f} ms (least {1e3 * min(times):5.1f})"
            for name, times in found.items()
        ]
        print(f"density {density:.2f}: {', '.join(said)}", flush=True)
dist.destroy_process_group()
