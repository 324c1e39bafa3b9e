"""The file of a checkpoint: any tree, and nothing but one."""

from pathlib import Path

import pytest
import torch
from experiment_runs import same_tree

from fedmap_sparse.experiments import checkpoint

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


def test_checkpoints_hold_any_tree_and_share_equal_tensors(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    big = torch.arange(1000, dtype=torch.int32)
    state = {
        "a": [big, big.clone(), {"b": torch.tensor(2.5, dtype=torch.bfloat16)}],
        "n": [1, 2.5, True, None, "text", 1e-300],
        "empty": torch.empty(0),
        "floats": big.view(torch.float32),
    }
    checkpoint.save(path, state)
    same_tree(checkpoint.load(path), state)
    assert path.stat().st_size < 3 * 4000
    with pytest.raises(TypeError, match=r"x: expected plain values and tensors, got set"):
        checkpoint.save(path, {"x": {1}})
    with pytest.raises(TypeError, match="expected keys that are text or numbers"):
        checkpoint.save(path, {"x": {None: 2}})
    same_tree(checkpoint.load(path), state)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    safetensors.save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(checkpoint.CheckpointError, match="it has no checksum"):
        checkpoint.load(path)
    checkpoint.save(path, {"x": torch.zeros(3)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.load(path)
