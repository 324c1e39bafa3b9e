"""Bytes copied by many threads, and payloads on their way to a device."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fedmap_sparse import _transfer

N = _transfer.MANY


@pytest.mark.parametrize("size", [0, 1, N - 1, N, N + 7, 3 * N + 5])
@pytest.mark.parametrize("shift", [0, 1, 48])
def test_every_byte_is_copied_and_no_other(size: int, shift: int) -> None:
    source = torch.randint(0, 256, (size + 100,), dtype=torch.uint8)
    to = torch.zeros(size + 100, dtype=torch.uint8)
    want = to.clone()
    want[shift : shift + size] = source[50 : 50 + size]
    _transfer.copy(source[50 : 50 + size], to[shift : shift + size])
    assert torch.equal(to, want)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transfer, "native", None)
    source, to = torch.arange(N + 3).to(torch.uint8), torch.zeros(N + 3, dtype=torch.uint8)
    _transfer.copy(source, to)
    assert torch.equal(to, source)


@pytest.mark.parametrize("size", [0, 1, 4, 4097])
def test_payloads_arrive_in_multiples_of_four(size: int) -> None:
    payload = torch.randint(0, 256, (size,), dtype=torch.uint8)
    room = _transfer.to_device(payload, torch.device("cpu"))
    assert room.numel() == -(-size // 4) * 4
    assert torch.equal(room[:size], payload)


def test_pieces_go_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, in pieces of 5 bytes: torch's own memory stands in for pinned memory."""
    real, asked = torch.empty, []

    def empty(*size: int, pin_memory: bool = False, **how: object) -> torch.Tensor:
        asked.append(pin_memory)
        return real(*size, **{**how, "device": "cpu"})

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(_transfer, "_PIECE", 5)
    payload = torch.randint(0, 256, (23,), dtype=torch.uint8)
    room = _transfer.to_device(payload, torch.device("cuda"))
    assert torch.equal(room[:23], payload)
    assert asked == [False, True]


def test_numbers_of_the_host_are_read_where_they_are() -> None:
    assert _transfer.fetch(torch.tensor([3, -(1 << 62)])) == [3, -(1 << 62)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_copies_too() -> None:
    """With torch's threads in use before the fork: a child must not wait for them."""
    code = (
        "import os, signal, torch\n"
        "from fedmap_sparse import _transfer\n"
        "torch.set_num_threads(2)\n"
        "source = torch.ones(1 << 22, dtype=torch.uint8) + 1\n"
        "if not os.fork():\n"
        "    signal.alarm(20)\n"
        "    for size in (_transfer.MANY - 1, 1 << 22):\n"
        "        to = torch.from_numpy(__import__('numpy').zeros(size, 'uint8'))\n"
        "        _transfer.copy(source[:size], to)\n"
        "        assert to.numpy().min() == 2\n"
        "    os._exit(0)\n"
        "assert os.wait()[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
