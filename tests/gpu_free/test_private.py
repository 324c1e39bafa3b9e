"""The cut to a norm, noise and fixed-point integers on every rung."""

from __future__ import annotations

from typing import Any

import pytest
from ladder import WHOLE, private

SIZES = (1, 5001, 20000) if WHOLE else (5001,)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("share", [0.4, 1.5])
def test_clip(rung: Any, n: int, share: float) -> None:
    private.clip(n, "cpu", rung.show, share=share)


def test_clip_refuses(rung: Any) -> None:
    private.clip_refuses("cpu", rung.show)


@pytest.mark.parametrize("n", SIZES)
def test_noise(rung: Any, n: int) -> None:
    private.noise(n, "cpu", rung.show)


@pytest.mark.parametrize("n", SIZES)
def test_fixed(rung: Any, n: int) -> None:
    private.fixed(n, "cpu", rung.show)
