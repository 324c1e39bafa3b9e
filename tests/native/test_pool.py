"""The thread pool: forks, two callers at once, the interpreter's exit, the floating-point state."""

from __future__ import annotations

import multiprocessing
import sys
import threading

import pytest
import torch
from guards import bits, random_mask, run_native
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fedmap_sparse as fs
from fedmap_sparse import Mask
from fedmap_sparse._backends import native

pytestmark = pytest.mark.skipif(native is None, reason="fedmap_sparse._native is not built")

N = 1_000_003  # enough for several threads


@pytest.fixture(autouse=True)
def several_threads() -> None:
    torch.set_num_threads(3)


def problem(seed: int) -> tuple[Tensor, int]:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)), N // (seed + 2)


def solve(seed: int) -> tuple[bytes, Tensor]:
    values, keep = problem(seed)
    mask = fs.ops.magnitude_mask(values, keep, backend="cpu")
    return mask.digest(), fs.ops.pack(values, mask, backend="cpu")


def test_the_caller_is_one_of_the_threads() -> None:
    done = run_native("""
import ctypes
big = ctypes.create_string_buffer(4 << 20)
assert native.pool_threads() == 0
for threads in (1, 2, 1, 3, 2):
    native.stream_read(memoryview(big)[: 4 << 20], threads)
    print(native.pool_threads())
native.stream_read(memoryview(big)[:4000], 7)
print(native.pool_threads())
""")
    assert done.stdout.split() == ["0", "1", "1", "2", "2", "2"], done.stderr


def child(results: multiprocessing.SimpleQueue[tuple[bytes, int]]) -> None:
    torch.set_num_threads(3)
    results.put((solve(1)[0], native.pool_threads()))


@pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")
def test_a_forked_child_has_threads_of_its_own() -> None:
    wanted = solve(1)[0]
    context = multiprocessing.get_context("fork")
    results: multiprocessing.SimpleQueue[tuple[bytes, int]] = context.SimpleQueue()
    children = [context.Process(target=child, args=(results,)) for _ in range(3)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
        assert process.exitcode == 0
        assert results.get() == (wanted, 2)
    assert solve(1)[0] == wanted


class Packs(Dataset[Tensor]):
    def __init__(self, values: Tensor, mask: Mask) -> None:
        self.values, self.mask = values, mask

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        # Straight to the kernel: a loader's workers set torch to one thread.
        out = torch.empty(self.mask.nnz)
        threads = 2 + index % 2
        native.pack(self.values, self.mask.words, self.mask.rank, out, threads, False)
        return out


@pytest.mark.skipif(sys.platform != "linux", reason="DataLoader forks on Linux")
def test_workers_of_a_data_loader() -> None:
    values, mask = problem(0)[0], random_mask(N, 0.01)
    packed = fs.ops.pack(values, mask, backend="cpu")
    loader = DataLoader(Packs(values, mask), batch_size=None, num_workers=2, timeout=60)
    batches = list(loader)
    assert len(batches) == 6
    assert all(torch.equal(batch, packed) for batch in batches)


def test_many_callers_at_once() -> None:
    """A caller that finds the pool in use works alone; results do not differ."""
    wanted = [solve(seed) for seed in range(4)]
    failures: list[int] = []

    def work(seed: int) -> None:
        for _ in range(8):
            digest, packed = solve(seed)
            if digest != wanted[seed][0] or not torch.equal(bits(packed), bits(wanted[seed][1])):
                failures.append(seed)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
        assert not caller.is_alive()
    assert not failures


def test_the_interpreter_exits() -> None:
    """While a thread is in a kernel, and after: the pool has nothing to destroy or to wait for."""
    done = run_native("""
import ctypes
import threading
big = ctypes.create_string_buffer(16 << 20)
def work():
    while True:
        native.stream_read(big, 3)
thread = threading.Thread(target=work, daemon=True)
thread.start()
for _ in range(100):
    native.stream_read(big, 3)
print("done")
""")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_the_callers_floating_point_state_is_left_as_it_was(isa: str) -> None:
    tiny = torch.tensor([1e-40])
    values = torch.randn(N) * 1e-40
    mask = random_mask(N, 0.5)
    wanted = fs.ops.weighted_mean([values, values], [0.25, 0.5], backend="cpu")
    assert torch.set_flush_denormal(True)
    try:
        assert float(tiny * 1.0) == 0.0
        got = fs.ops.weighted_mean([values, values], [0.25, 0.5], backend="cpu")
        fs.ops.pack(values, mask, backend="cpu")
        assert float(tiny * 1.0) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(got), bits(wanted))
    assert bool(wanted.any())
