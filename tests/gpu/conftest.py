"""Every test starts from the same random state, also without tests/conftest.py: a borrowed machine
lacks what that imports."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_here() -> None:
    torch.manual_seed(0)
