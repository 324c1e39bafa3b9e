"""Fixtures and settings for every test."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from fedmap_sparse._backends import native

# What several test files share is a module beside them.
sys.path.insert(0, str(Path(__file__).parent))

if _ambient := os.environ.get("FEDMAP_SPARSE_AMBIENT"):
    import ambient

    ambient.install(_ambient)

# No deadline: the first example pays for compilation. No database: a run depends on the code alone.
settings.register_profile("fedmap_sparse", deadline=None, database=None, derandomize=True)
settings.load_profile("fedmap_sparse")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # third parties draw from it
    torch.manual_seed(0)


@pytest.fixture(params=native.isa_levels() if native else ["extension not built"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each ISA level of this machine in turn, forced."""
    if native is None:
        pytest.skip("fedmap_sparse._native is not built")
    before = native.isa()
    native.set_isa(request.param)
    assert native.isa() == request.param
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each thread count in turn, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
