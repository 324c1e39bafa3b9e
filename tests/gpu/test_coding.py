"""Entropy coding and messages on a real device, at sizes that fill it: the CPU's bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import fedmap_sparse as fs

if fs.backends()["cpu"] != "available":
    pytest.skip(
        "the C++ extension, whose bytes are compared, is not built", allow_module_level=True
    )

import stored_messages
from ladder import coding
from ladder.contracts import FLOATS, same
from stored_messages import GOLDEN, MALFORMED

pytestmark = pytest.mark.gpu
_MANY = tuple((700 + 37 * i, 0.003 * (i + 1)) for i in range(300))


def show(**tensors: Any) -> None:
    """A device reaches every tensor by its address."""


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize(
    "shapes",
    [coding.RUNS, _MANY, ((10_000_000, 0.1), (12_345_679, 0.01), (3_000_003, 0.6))],
    ids=["odd", "many", "large"],
)
def test_masks(shapes: Any, gap: int) -> None:
    coding.masks(shapes, gap, "cuda", show)


def test_masks_without_room() -> None:
    coding.masks_without_room("cuda", show)
    coding.ranks(1_000_001, "cuda", show)
    coding.chunks_of_a_gpu("cuda", show)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 32768 + 77, 3_000_001])
def test_values(n: int, dtype: torch.dtype) -> None:
    coding.values(n, dtype, "cuda", show)


def test_values_far_apart() -> None:
    coding.values_far_apart("cuda", show)


def test_values_refused() -> None:
    coding.values_refused("cuda", show)


@pytest.mark.parametrize("width", [64, 4096])
@pytest.mark.parametrize(
    ("dtype", "delta"), [("float32", True), ("bfloat16", False), ("int8", True)]
)
def test_rounds(width: int, dtype: str, delta: bool) -> None:
    """A server and its clients on the device: what they send, and the model they end with."""
    want = coding.rounds("cpu", width, dtype, delta)
    assert coding.same_rounds(coding.rounds("cuda", width, dtype, delta), want)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    data = stored_messages.golden(name)
    want, got = (stored_messages.decode(name, data, device) for device in (None, "cuda"))
    assert got.mask.device.type == got.packed.device.type == got.tail.device.type == "cuda"
    assert same(got.mask.words, want.mask.words)
    assert same(got.packed, want.packed)
    assert same(got.tail, want.tail)
    with coding.chunks_of_a_cpu():
        assert got.encode() == want.encode()


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str) -> None:
    entry = MALFORMED[name]
    with pytest.raises(fs.FormatError) as caught:
        stored_messages.decode(entry["from"], stored_messages.malformed(name), "cuda")
    assert entry["reason"] in caught.value.reason
    assert caught.value.offset == entry["offset"]
