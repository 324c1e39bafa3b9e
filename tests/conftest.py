"""Fixtures and settings for every test."""

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

# No deadline: the first example pays for compilation. No database: a run depends on the code alone.
settings.register_profile("fedmap_sparse", deadline=None, database=None, derandomize=True)
settings.load_profile("fedmap_sparse")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # third parties draw from it
    torch.manual_seed(0)
