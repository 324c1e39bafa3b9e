"""torch.distributed over gloo: the checks of distributed_worker.py, on 2 and 4 ranks."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

WORKER = Path(__file__).with_name("distributed_worker.py")
sys.path.insert(0, str(WORKER.parent))  # it imports the modules beside it

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank found, by number of ranks: processes that meet through a file."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(WORKER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        world: [
            torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)
        ]
        for world in (2, 4)
    }


CHECKS = [(n, name) for n in (2, 4) for name in worker().chosen(n)]


@pytest.mark.parametrize(("world", "name"), CHECKS, ids=[f"{n} ranks: {c}" for n, c in CHECKS])
def test_on_every_rank(world: int, name: str, found: dict[int, list[dict[str, Any]]]) -> None:
    for rank, results in enumerate(found[world]):
        assert results[name]
        failed = [what for what, holds in results[name].items() if not holds]
        assert not failed, f"rank {rank}: {failed}"
