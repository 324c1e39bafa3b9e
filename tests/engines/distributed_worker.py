"""The checks of test_distributed.py, on ranks of its own: FOLDER. Writes a result per check."""

import multiprocessing
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}

import torch
import torch.distributed as dist
from distributed_rounds import refused_setups, round_that_fails, rounds
from distributed_training import (
    ALL_REDUCE_CHECKS,
    DDP_CHECKS,
    Check,
    fsdp,
    fsdp_refuses,
    masks_that_differ,
)

GROUPS: dict[str, dict[str, Check]] = {
    "ddp": DDP_CHECKS,
    "all_reduce": ALL_REDUCE_CHECKS,
    "masks": {"that_differ": masks_that_differ},
    "fsdp": {"shards": fsdp, "refuses": fsdp_refuses},
    "ranks": {
        "float32": partial(rounds, "float32"),
        "int8": partial(rounds, "int8"),
        "fails": round_that_fails,
        "setups": refused_setups,
    },
}


def chosen(world: int) -> dict[str, Check]:
    """Checks by name. With four ranks gloo's order of summation is its own: exact ones only."""
    every = {f"{g}/{name}": check for g, checks in GROUPS.items() for name, check in checks.items()}
    if world == 2:
        return every
    few = ("ddp/exact", "all_reduce/5000_of_which_700_float32", "masks/", "ranks/float32")
    return {name: check for name, check in every.items() if name.startswith(few)}


def rank_main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{world}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for name, check in chosen(world).items():
        try:
            results[name] = check()
        except Exception:
            results[name] = {traceback.format_exc(): False}
    torch.save(results, folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> int:
    """2 ranks, then 4. They are forked, before any thread is there: one import of torch for all."""
    failed = 0
    for world in (2, 4):
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=rank_main, args=(r, world, folder), daemon=True)
            for r in range(world)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
            failed += rank.exitcode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
