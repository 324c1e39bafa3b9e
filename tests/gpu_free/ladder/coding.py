"""What every device must do with payloads and messages: the CPU's bytes, and its refusals."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fedmap_sparse as fs
from fedmap_sparse.ops import _entropy_reference, _payload, entropy
from fedmap_sparse.schedule import Iterative
from ladder.contracts import Show, same, special

#: Bits and density of tensors: constant ones, one without bits, one that ends inside of a nibble.
RUNS = ((700, 0.1), (5, 0.4), (3000, 0.02), (0, 0.5), (129, 0.9), (2600, 0.3), (64, 1.0), (40, 0.0))


@contextlib.contextmanager
def small_chunks(steps: int, values: int) -> Iterator[None]:
    """Chunks that an interpreter can afford; the format's begin at 1024 steps."""
    kernels = importlib.import_module("fedmap_sparse.triton_kernels.entropy")
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (_payload, "MIN_CHUNK", steps),
            (_payload, "VALUE_CHUNK", values),
            (_entropy_reference, "VALUE_CHUNK", values),
            (entropy, "chunk_steps", lambda *_: steps),
            (kernels, "CHUNK", values),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


@contextlib.contextmanager
def chunks_of_a_cpu() -> Iterator[None]:
    """A GPU cuts masks as a CPU does, and so writes the same bytes."""
    with mock.patch.object(entropy, "GPU_CHUNK_BYTES", entropy.CHUNK_BYTES):
        yield


def chunks_of_a_gpu(device: str, show: Show) -> None:
    """A GPU's own chunks, which are shorter, and which a CPU reads too."""
    runs, bits, nnz = runs_of(((130_000, 0.1), (5000, 0.1)), 0)
    words = fs.Mask.from_bool(bits).words
    got = entropy.encode_mask(words.to(device), runs, nnz, 100_000, backend="triton")
    want = entropy.encode_mask(words, runs, nnz, 100_000, backend="cpu")
    assert got is not None
    assert want is not None
    assert got[:8].view(torch.int32).tolist() == [1024, 2]
    assert want[:8].view(torch.int32).tolist() == [4096, 1]
    assert same(entropy.decode_mask(got.cpu(), runs, bits.numel(), backend="cpu"), words)
    assert same(entropy.decode_mask(got, runs, bits.numel(), backend="triton"), words)


def runs_of(shapes: Any, gap: int) -> tuple[entropy.Runs, Tensor, Tensor]:
    """(runs, bits, ones in each run); `gap` 0 begins runs at multiples of 128, as a model's."""
    start, parts, at = [], [], 0
    for n, density in shapes:
        start.append(at)
        each = n + gap if gap else -(-n // 128) * 128
        parts.append(torch.zeros(each, dtype=torch.bool))
        parts[-1][:n] = torch.rand(n) < density
        parts[-1][: 4 * (n > 1000)] = True  # a nibble whose frequency is 1 where they are rare
        at += each
    runs = entropy.Runs(torch.tensor(start), torch.tensor([n for n, _ in shapes]))
    return runs, torch.cat(parts), torch.tensor([int(p.sum()) for p in parts])


@chunks_of_a_cpu()
def masks(shapes: Any, gap: int, device: str, show: Show, by: str = "cpu") -> None:
    """Payloads as `by` writes them, and back; broken ones are refused as `by` refuses them."""
    runs, bits, nnz = runs_of(shapes, gap)
    mask = fs.Mask.from_bool(bits)
    room = 4 * mask.words.numel() + 10_000
    want = entropy.encode_mask(mask.words, runs, nnz, room, backend=by)
    assert want is not None
    words = mask.words.to(device)
    got = entropy.encode_mask(words, runs, nnz, want.numel(), backend="triton")
    assert got is not None
    assert same(got, want)
    back = entropy.decode_mask(want, runs, mask.numel, device=words.device, backend="triton")
    assert same(back, mask.words)
    broken, moved = want.clone(), want.clone()
    broken[-2] ^= 4
    directory = 8 + -(-len(shapes) // 4) * 4
    counts = moved[directory : directory + 8].view(torch.int32)
    counts += torch.tensor([1, -1], dtype=torch.int32)  # of one chunk to the one before
    for payload in (broken, moved):
        refusals = _refusals(
            lambda where, backend, p=payload: entropy.decode_mask(
                p, runs, mask.numel, device=where, backend=backend
            ),
            words.device,
            by,
        )
        assert refusals[0] == refusals[1] != ""


@chunks_of_a_cpu()
def masks_without_room(device: str, show: Show) -> None:
    """Nothing to code, one step, and capacities too small: for the states, and for the words."""
    masks(((40, 0.5),), 0, device, show)
    runs, bits, nnz = runs_of(((300, 0.0), (64, 1.0)), 0)
    words = fs.Mask.from_bool(bits).words
    want = entropy.encode_mask(words, runs, nnz, 100, backend="cpu")
    got = entropy.encode_mask(words.to(device), runs, nnz, 100, backend="triton")
    assert want is not None
    assert got is not None
    assert same(got, want)
    back = entropy.decode_mask(want.to(device), runs, bits.numel(), backend="triton")
    assert same(back, words)
    runs, bits, nnz = runs_of(((900, 0.3),), 0)
    words = fs.Mask.from_bool(bits).words
    want = entropy.encode_mask(words, runs, nnz, 10_000, backend="cpu")
    assert want is not None
    for capacity in (100, want.numel() - 9, want.numel() - 1):
        assert entropy.encode_mask(words.to(device), runs, nnz, capacity, backend="triton") is None


def ranks(n: int, device: str, show: Show) -> None:
    mask = fs.Mask.from_bool(torch.rand(n) < 0.4)
    positions = torch.cat([torch.arange(0, n, 41), torch.tensor([n])])
    kernels = importlib.import_module("fedmap_sparse.triton_kernels.entropy")
    moved = (t.to(device) for t in (mask.words, mask.rank, positions))
    assert same(kernels.ranks_at(*moved), entropy.ranks_at(mask, positions))


def values(n: int, dtype: torch.dtype, device: str, show: Show, by: str = "cpu") -> None:
    """As `masks`; with escapes where there are 20 values or more."""
    _values(special(n, dtype, "cpu"), device, by)


def values_far_apart(device: str, show: Show, by: str = "cpu") -> None:
    """Chunks whose best exponents lie far below or above those of its first values."""
    few, tiny = torch.zeros(700), 2.0 ** -(60 + torch.arange(700) % 20)
    few[3] = 1
    tiny[256:] = torch.randn(444)
    for dtype in (torch.float32, torch.bfloat16):
        for x in (few, tiny, tiny.flip(0)):
            _values(x.to(dtype), device, by)


def _values(x: Tensor, device: str, by: str) -> None:
    n, dtype = x.numel(), x.dtype
    room = 2 * x.nbytes + 1000
    want = entropy.encode_values(x, room, backend=by)
    assert want is not None
    got = entropy.encode_values(x.to(device), want.numel(), backend="triton")
    assert got is not None
    assert same(got, want)
    assert entropy.encode_values(x.to(device), want.numel() - 1, backend="triton") is None
    where = torch.empty(0, device=device).device
    assert same(entropy.decode_values(want, n, dtype, device=where, backend="triton"), x)


def values_refused(device: str, show: Show) -> None:
    """Words that do not decode, symbols beyond the top, escapes that run out or are none."""
    zeros, halves = torch.zeros(65), special(200, torch.float16, "cpu")
    plain = entropy.encode_values(zeros, 10_000, backend="cpu")
    assert plain is not None
    beyond, run_out = plain.clone(), plain.clone()
    beyond[8:40] = run_out[8:40] = 0
    beyond[8 + 2 * 3 + 1] = run_out[8 + 2 * 15 + 1] = 0x80  # every slot means this one symbol
    coded = entropy.encode_values(halves, 10_000, backend="cpu")
    assert coded is not None
    broken, impossible = coded.clone(), coded.clone()
    words_at = _payload.value_parts(200, torch.float16)[-1]
    broken[words_at] ^= 1
    impossible[_payload.open_values(coded, 200, torch.float16).escapes_at] = 77
    where = torch.empty(0, device=device).device
    for payload, like in (
        (beyond, zeros),
        (run_out, zeros),
        (broken, halves),
        (impossible, halves),
    ):
        refusals = _refusals(
            lambda device, backend, p=payload, v=like: entropy.decode_values(
                p, v.numel(), v.dtype, device=device, backend=backend
            ),
            where,
            "cpu",
        )
        assert refusals[0] == refusals[1] != ""


def _refusals(
    decode: Callable[[torch.device, str], object], device: torch.device, by: str
) -> list[str]:
    found = []
    for where, backend in ((torch.device("cpu"), by), (device, "triton")):
        try:
            decode(where, backend)
            found.append("")
        except entropy.PayloadError as error:
            found.append(str(error))
    return found


@chunks_of_a_cpu()
def rounds(device: str, width: int, dtype: str, delta: bool) -> list[Any]:
    """Every message of two rounds of a server with two clients, and the model at the end.

    Masks travel in full and as deltas; a late client needs the full one.
    """

    def params(seed: int) -> fs.FlatParameters:
        torch.manual_seed(seed)
        return fs.flatten(nn.Sequential(nn.Linear(width, 96), nn.BatchNorm1d(96)).to(device))

    server = fs.FedMapServer(params(0), Iterative(0.95, 0, 1), dtype=dtype, lr=0.1)
    clients = [fs.FedMapClient(params(i), dtype=dtype, delta=delta) for i in (1, 2, 3)]
    sent: list[Any] = []
    noise = torch.Generator().manual_seed(5)
    for r in range(2):
        server.begin_round()
        updates = []
        for i in (r, r + 1):
            message = server.broadcast(clients[i].have)
            clients[i].receive(message)
            held = clients[i].params
            change = torch.randn(held.values.numel(), generator=noise).mul_(0.01).to(device)
            with torch.no_grad():
                held.prunable.add_(change[: held.prunable.numel()])
                held.prunable.mul_(held.mask.to_bool())
                for p in held.parameters[len(held.layout.prunable_entries) :]:
                    p.add_(0.25)
            updates.append((i, clients[i].update(3 + i, 0.5)))
            sent += [message, updates[-1][1]]
        result = server.aggregate(updates)
        assert not result.refused
    return sent + [t.cpu() for t in server.params.to_state_dict().values()]


def same_rounds(got: list[Any], want: list[Any]) -> bool:
    return len(got) == len(want) and all(
        a == b if isinstance(a, bytes) else same(a, b) for a, b in zip(got, want, strict=True)
    )
