"""Without tests/conftest.py, as a borrowed machine lacks what that imports: every test starts from
the same random state, and what several test files share is found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def seeded_here() -> None:
    torch.manual_seed(0)
