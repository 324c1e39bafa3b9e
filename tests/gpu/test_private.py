"""The cut to a norm, noise and fixed-point integers on a real device: the ladder's contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from ladder import private

pytestmark = pytest.mark.gpu


def show(**tensors: Any) -> None:
    """A device reaches every tensor by its address."""


@pytest.mark.parametrize("n", [1, 5001, 3_000_001])
def test_private(n: int) -> None:
    private.clip(n, "cuda", show)
    private.clip(n, "cuda", show, share=1.5)
    private.noise(n, "cuda", show)
    private.fixed(n, "cuda", show)


def test_clip_refuses() -> None:
    private.clip_refuses("cuda", show)
