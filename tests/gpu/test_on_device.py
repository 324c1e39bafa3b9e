"""What a GPU user does, on a real device: the CPU's bits, graphs, compilation, an experiment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import fedmap_sparse as fs
from fedmap_sparse import ops
from fedmap_sparse.federated import FedMapClient, FedMapServer
from fedmap_sparse.ops import masked_sgd
from fedmap_sparse.ops._segments import Segments
from fedmap_sparse.optim import MaskedAdamW, MaskedSGD
from fedmap_sparse.schedule import Iterative

pytestmark = pytest.mark.gpu
DEVICES = ("cpu", "cuda")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def equal(a: Any, b: Any) -> bool:
    """In every bit, wherever they are."""
    if isinstance(a, fs.Mask):
        return bool(a.to("cpu") == b.to("cpu") and a.digest() == b.digest())
    a, b = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [33, 2048, 1_500_001])
def test_ops_give_the_bits_of_the_cpu(n: int, dtype: torch.dtype) -> None:
    drawn = torch.randn(n, dtype=torch.float32).to(dtype)
    drawn[::7] = drawn[0]  # ties
    keep = n // 5 + 1

    def results(device: str) -> list[Any]:
        values = drawn.to(device, copy=True)
        mask = ops.magnitude_mask(values, keep)
        child = ops.prune_(values, keep // 2, within=mask)
        packed = ops.pack(values, mask)
        kept = ops.extract(child, mask)
        others = [packed, packed.flip(0), packed * 0.5]
        found = [
            mask,
            child,
            values,
            packed,
            kept,
            ops.deposit(kept, mask),
            ops.unpack(packed, mask),
        ]
        found += [ops.weighted_mean(others, [3.0, 0.7, 11.0])]
        found += [ops.cast(values, to)[0] for to in FLOATS]
        found += [fs.Mask.from_words(mask.words.clone(), n), fs.Mask.from_bool(mask.to_bool())]
        if dtype == torch.float32:
            q, scales = ops.quantize_int8(values, residual=values * 1e-3)
            found += [q, scales, ops.dequantize_int8(q, scales)]
        return found

    for at, (a, b) in enumerate(zip(results("cpu"), results("cuda"), strict=True)):
        assert equal(a, b), at


def test_kernels_that_are_compiled_run_on_the_current_stream() -> None:
    values = torch.randn(1 << 20, device="cuda")
    mask = ops.magnitude_mask(values, 1 << 18)
    before = ops.pack(values, mask)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the default stream would be done by then
        values.mul_(2)
        after = ops.pack(values, mask)
    side.synchronize()
    assert torch.equal(after, 2 * before)


def warm_up(step: Callable[[], None]) -> None:
    """Three steps on a side stream, as a capture wants them before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)


def net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.Flatten(), nn.Linear(24 * 16, 100, bias=False)
    )


def draw_gradients(flat: fs.FlatParameters, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in flat.module.parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p)


OPTIMIZERS: list[Callable[..., Any]] = [
    lambda flat, mask: MaskedSGD(
        flat, mask, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    lambda flat, mask: MaskedAdamW(flat, mask, lr=0.01, amsgrad=True),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("make", OPTIMIZERS, ids=["sgd", "adamw"])
def test_optimizers_give_the_bits_of_the_cpu(make: Callable[..., Any], dtype: torch.dtype) -> None:
    """20 steps, the mask shrinking twice; pruned weights stay +0.0."""
    out = []
    for device in DEVICES:
        flat = fs.flatten(net().to(device, dtype))
        optimizer = make(flat, flat.mask)
        for step in range(20):
            if step in (5, 12):
                kept = round(flat.mask.nnz * 0.3)
                optimizer.set_mask(ops.prune_(flat.prunable, kept, within=flat.mask))
            draw_gradients(flat, step)
            optimizer.step()
        pruned = flat.prunable[~flat.mask.to_bool()]
        assert equal(pruned, torch.zeros_like(pruned))
        out.append(flat.values)
    assert equal(*out)


@pytest.mark.parametrize("how", [{}, {"dtype": "bfloat16"}, {"dtype": "int8"}])
def test_a_federation_sends_the_bytes_of_the_cpu(how: dict[str, Any]) -> None:
    """Four rounds, two of them pruning; one client on the CPU whatever the server is on."""
    out = []
    for device in DEVICES:
        server = FedMapServer(fs.flatten(net().to(device)), Iterative(0.9, 1, 6, 2), lr=0.05, **how)
        clients = [
            FedMapClient(
                fs.flatten(net().to(d)),
                optimizer=lambda p, m, lr: MaskedSGD(p, m, lr=lr, momentum=0.9),
            )
            for d in (device, "cpu")
        ]
        sent: list[bytes] = []
        for number in range(4):
            server.begin_round()
            updates = []
            for i, client in enumerate(clients):
                sent.append(server.broadcast(client.have))
                client.receive(sent[-1])
                draw_gradients(client.params, 10 * number + i)
                client.optimizer.step()
                updates.append((i, client.update(10 + i, 0.5)))
            sent += [data for _, data in updates]
            server.aggregate(updates)
        assert server.params.values.device.type == device
        assert server.mask.nnz < server.layout.eligible
        out.append(sent)
    assert [len(m) for m in out[0]] == [len(m) for m in out[1]]
    assert out[0] == out[1]


def test_a_selection_in_a_cuda_graph() -> None:
    """Selection and packing wait for nothing, so a graph replays them on new values."""
    values = torch.randn(300_000, device="cuda")
    within = ops.magnitude_mask(values, 200_000)

    def work() -> tuple[fs.Mask, Tensor]:
        mask = ops.magnitude_mask(values, 30_000, within=within)
        return mask, ops.pack(values, mask)

    work()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask, packed = work()
    for seed in (1, 2):
        drawn = torch.randn(300_000, generator=torch.Generator().manual_seed(seed))
        values.copy_(drawn)
        graph.replay()
        expected = ops.magnitude_mask(drawn, 30_000, within=within.to("cpu"))
        assert equal(mask.words, expected.words)
        assert equal(packed, ops.pack(drawn, expected))


# torch's own, of what its compiler imports.
@pytest.mark.filterwarnings(r"ignore:`torch.jit.\w+` is deprecated:DeprecationWarning")
def test_compiled_whole() -> None:
    values, grad = torch.randn(2, 5000, device="cuda").unbind()
    segments = Segments([0], [5000])
    segments.scalars[0, 0] = 0.5

    def work(x: Tensor) -> Tensor:
        mask = ops.magnitude_mask(x, 700)
        masked_sgd.step_segments_(x, mask, [grad], segments)
        return ops.pack(x, mask) * 2

    eager, compiled = values.clone(), values.clone()
    expected = work(eager)
    assert equal(torch.compile(work, fullgraph=True)(compiled), expected)
    assert equal(compiled, eager)


def test_an_experiment_learns(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from fedmap_sparse.experiments import runner
    from fedmap_sparse.experiments.config import build

    out = tmp_path / "run"
    options = {"dataset": "digits", "model": "mlp", "rounds": 20, "device": "cuda"}
    runner.run(build({**options, "baseline": False, "out": str(out)}))
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["density"] == pytest.approx(0.1, abs=1e-3)
    assert last["accuracy"] > 0.75


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_experiment_in_graphs_is_the_launched_one(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With masks that change, and a last batch of each client that no graph repeats."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from fedmap_sparse.experiments import replay, runner
    from fedmap_sparse.experiments.config import build

    captures = 0

    class Counted(replay.CudaGraphs):
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            nonlocal captures
            captures += 1
            return super().capture(work)

    monkeypatch.setattr("fedmap_sparse.experiments.training.CudaGraphs", Counted)
    options = {"dataset": "digits", "model": "mlp", "rounds": 4, "device": "cuda", "target": 0.5}
    options |= {"optimizer": optimizer, "batch_size": 10, "baseline": False}
    found = [
        runner.run(build({**options, "graphs": graphs, "out": str(tmp_path / f"{graphs}")}))
        for graphs in (False, True)
    ]
    launched, replayed = (arms["fedmap"] for arms in found)
    assert replayed["survivors"] == launched["survivors"]
    assert replayed["accuracy"] == pytest.approx(launched["accuracy"], abs=0.03)
    assert replayed["loss"] == pytest.approx(launched["loss"], rel=0.05)
    assert 1 <= captures <= options["rounds"]  # at most one for each mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_2_to_the_31_elements(dtype: torch.dtype) -> None:
    n, at = (1 << 31) + 4999, torch.tensor([5, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 31) + 4998])
    if torch.cuda.mem_get_info()[0] < 4 * n * dtype.itemsize:
        pytest.skip(f"{4 * n * dtype.itemsize >> 30} GiB of device memory are not free")
    values = torch.full((n,), 0.25, dtype=dtype, device="cuda")
    values[at.cuda()] = torch.arange(1.0, 6.0, dtype=dtype, device="cuda")
    values[3] = 0.5
    mask = ops.magnitude_mask(values, 8)  # the five, 0.5, and the first two of the ties
    kept = torch.cat([torch.tensor([0, 1, 3]), at])
    expected = torch.zeros(mask.words.numel(), dtype=torch.int64)
    expected.index_add_(0, kept >> 5, torch.ones_like(kept) << (kept & 31))
    assert torch.equal(mask.words.cpu(), expected.to(torch.int32))
    packed = ops.pack(values, mask)
    assert packed.tolist() == [0.25, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert equal(ops.pack(ops.unpack(packed, mask), mask), packed)
    segments = Segments([0], [n])
    segments.scalars[0, 0] = 1.0
    master = None if dtype == torch.float32 else packed.float()
    masked_sgd.step_segments_(values, mask, [torch.ones_like(values)], segments, master=master)
    assert ops.pack(values, mask).tolist() == [-0.75, -0.75, -0.5, 0.0, 1.0, 2.0, 3.0, 4.0]
    assert int(values.count_nonzero()) == 7


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
def test_a_training_step_in_a_cuda_graph(make: Callable[..., Any]) -> None:
    """Forward, backward and step in one graph, beside the same steps without: the learning rate is
    on the device, the mask shrinks once, and the state dict counts the replays."""
    x, y = torch.randn(64, 40, device="cuda"), torch.randn(64, 5, device="cuda")
    more = {"momentum": 0.9} if make is MaskedSGD else {}

    def start(lr: Any) -> tuple[nn.Module, fs.FlatParameters, Any, Callable[[], None]]:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)).cuda()
        flat = fs.flatten(net)
        flat.mask = ops.prune_(flat.prunable, 400, within=flat.mask)
        optimizer = make(flat, lr=lr, capturable=True, **more)

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()

        return net, flat, optimizer, step

    lr = torch.tensor(0.05, device="cuda")
    _, flat, optimizer, step = start(lr)
    _, other, plain, plain_step = start(0.05)
    for kept in (400, 150):
        if kept < flat.mask.nnz:
            for f in (flat, other):
                f.mask = ops.prune_(f.prunable, kept, within=f.mask)
        warm_up(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(3):
            plain_step()
        for number in range(5):
            now = 0.05 / (1 + number)
            lr.fill_(now)
            plain.param_groups[0]["lr"] = now
            graph.replay()
            plain_step()
        torch.testing.assert_close(flat.values, other.values, rtol=1e-4, atol=1e-5)
        assert flat.prunable[~flat.mask.to_bool()].eq(0).all()
        lr.fill_(0.05)
        plain.param_groups[0]["lr"] = 0.05
    a, b = optimizer.state_dict()["state"], plain.state_dict()["state"]
    assert [s.get("step") for s in a.values()] == [s.get("step") for s in b.values()]


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("in_graph", [False, True])
def test_a_grad_scaler_is_never_waited_for(make: Callable[..., Any], in_graph: bool) -> None:
    """Steps under a GradScaler, launched or in a graph, beside the same that the host decides on;
    two of them overflow."""
    x, y = torch.randn(64, 40, device="cuda"), torch.randn(64, 5, device="cuda")
    more = {"momentum": 0.9} if make is MaskedSGD else {}

    def start(capturable: bool) -> tuple[fs.FlatParameters, Any, Any, Tensor, Callable[[], None]]:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)).cuda()
        flat = fs.flatten(net)
        flat.mask = ops.prune_(flat.prunable, 400, within=flat.mask)
        optimizer = make(flat, lr=0.01, capturable=capturable, **more)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        factor = torch.ones((), device="cuda")

        def step() -> None:
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(net(x), y) * factor).backward()
            scaler.step(optimizer)
            scaler.update()

        return flat, optimizer, scaler, factor, step

    flat, optimizer, scaler, factor, step = start(True)
    other, plain, plain_scaler, plain_factor, plain_step = start(False)
    warm_up(step)
    for _ in range(3):
        plain_step()
    repeat = step
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        repeat = graph.replay
    for infinite in (False, True, False, True, True, False):
        for f in (factor, plain_factor):
            f.fill_(float("inf") if infinite else 1.0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            repeat()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        plain_step()
        torch.testing.assert_close(flat.values, other.values, rtol=1e-4, atol=1e-5)
        assert scaler.get_scale() == plain_scaler.get_scale()
    a, b = optimizer.state_dict()["state"], plain.state_dict()["state"]
    assert [s.get("step") for s in a.values()] == [s.get("step") for s in b.values()]
