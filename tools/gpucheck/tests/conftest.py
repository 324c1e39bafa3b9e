"""Every test starts from the same random state; without triton there is nothing to test."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
