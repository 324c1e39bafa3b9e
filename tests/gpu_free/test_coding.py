"""Entropy coding and messages on every rung: the CPU's bytes, its refusals, no fault."""

from __future__ import annotations

from typing import Any

import pytest
import stored_messages
import torch
from ladder import WHOLE, coding
from ladder.contracts import FLOATS, same
from stored_messages import GOLDEN, MALFORMED

import fedmap_sparse as fs
from fedmap_sparse import _backends
from fedmap_sparse.codec import container

_BOTH = ["interpreter, shuffled 1", "ptx sm_90"]


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("steps", [8, 32] if WHOLE else [16])
def test_masks(rung: Any, gap: int, steps: int) -> None:
    with coding.small_chunks(steps, 256):
        coding.masks(coding.RUNS, gap, "cpu", rung.show, by="reference")


def test_masks_without_room(rung: Any) -> None:
    coding.masks_without_room("cpu", rung.show)
    coding.ranks(5001, "cpu", rung.show)


@pytest.mark.parametrize("rung", ["ptx sm_90"], indirect=True)
def test_chunks_of_a_gpu(rung: Any) -> None:
    coding.chunks_of_a_gpu("cpu", rung.show)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 700, 1500] if WHOLE else [700])
def test_values(rung: Any, n: int, dtype: torch.dtype) -> None:
    with coding.small_chunks(16, 512):
        coding.values(n, dtype, "cpu", rung.show, by="reference")


def test_values_far_apart(rung: Any) -> None:
    with coding.small_chunks(16, 512):
        coding.values_far_apart("cpu", rung.show, by="reference")


def test_values_refused(rung: Any) -> None:
    coding.values_refused("cpu", rung.show)


@pytest.mark.skipif(not WHOLE, reason="2 000 steps each way: run by make test-gpu-free")
@pytest.mark.parametrize("rung", _BOTH, indirect=True)
def test_chunks_of_the_format(rung: Any) -> None:
    coding.values((1 << 15) + 77, torch.float32, "cpu", rung.show)
    coding.masks(((140_000, 0.5),), 0, "cpu", rung.show)


_ROUNDS = [("float32", True), ("int8", True), ("float16", False)] if WHOLE else [("float32", True)]


@pytest.mark.parametrize("rung", _BOTH if WHOLE else _BOTH[:1], indirect=True)
@pytest.mark.parametrize(("dtype", "delta"), _ROUNDS)
def test_rounds(rung: Any, dtype: str, delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server and its clients on the backend: what they send, and the model they end with."""
    want = coding.rounds("cpu", 64, dtype, delta)
    coded = {
        section.name
        for message in want
        if isinstance(message, bytes)
        for section in fs.codec.inspect(message).sections
        if section.encoding == "rans"
    }
    assert coded >= {"MASK", "TAIL"} | ({"VALUES"} if dtype != "int8" else set())
    monkeypatch.setattr(_backends, "_forced", "triton")
    assert coding.same_rounds(coding.rounds("cpu", 64, dtype, delta), want)


@pytest.mark.parametrize("rung", _BOTH[:1], indirect=True)
def test_stored_messages(rung: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device begins before it knows the mask: the same contents, and the same refusals."""
    want = {name: stored_messages.decode(name, stored_messages.golden(name)) for name in GOLDEN}
    monkeypatch.setattr(_backends, "_forced", "triton")
    for name, message in want.items():
        got = stored_messages.decode(name, stored_messages.golden(name))
        assert same(got.mask.words, message.mask.words), name
        assert got.mask.nnz == message.mask.nnz
        assert same(got.packed, message.packed), name
    for section in container.parse(stored_messages.golden("float32-full"))[1]:
        data = bytearray(stored_messages.golden("float32-full"))
        data[section.offset] ^= 4  # a directory that contradicts itself, where there is one
        with pytest.raises(fs.FormatError, match="payload: expected CRC") as caught:
            stored_messages.decode("float32-full", bytes(data))
        assert caught.value.offset == section.offset
    for name, entry in MALFORMED.items():
        with pytest.raises(fs.FormatError) as caught:
            stored_messages.decode(entry["from"], stored_messages.malformed(name))
        assert entry["reason"] in caught.value.reason, name
        assert caught.value.offset == entry["offset"], name


@pytest.mark.parametrize("rung", _BOTH[:1], indirect=True)
@pytest.mark.parametrize(
    ("density", "dtype", "mask"), [(0.1, "float32", "rans"), (0.5, "int8", "raw")]
)
def test_a_mask_is_coded_beside_the_values(
    rung: Any, monkeypatch: pytest.MonkeyPatch, density: float, dtype: str, mask: str
) -> None:
    torch.manual_seed(0)
    params = fs.flatten(torch.nn.Linear(64, 48))
    kept = fs.Mask.from_bool(torch.rand(params.prunable.numel()) < density)

    def encode() -> bytes:
        return fs.encode(params, kept, dtype=dtype, mask_section="full", round=2)

    want = encode()
    first = fs.codec.inspect(want).sections[0]
    assert (first.name, first.encoding) == ("MASK", mask)
    monkeypatch.setattr(_backends, "_forced", "triton")
    with coding.chunks_of_a_cpu():
        assert encode() == want
    assert fs.decode(want, params.layout).mask == kept
