"""`graphs=true`: what a replay repeats, with a stand-in for CUDA graphs that calls it again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedmap_sparse as fs
from fedmap_sparse.engines.in_process import InProcessEngine
from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.errors import ConfigError
from fedmap_sparse.experiments import runner
from fedmap_sparse.experiments.config import Config, build
from fedmap_sparse.experiments.data import Split
from fedmap_sparse.experiments.replay import WARM_UP
from fedmap_sparse.experiments.training import LocalTraining, make_client
from fedmap_sparse.schedule import Iterative

SIZES = (40, 37, 5)  # with batches of 8: none odd, one odd, none of 8
ROUNDS = 4
WITHOUT = "graphs=true goes without: a client's own state is not in the graph"


class StandIn:
    """As a CUDA graph it does what it was given at each replay, and nothing when it is captured.

    A step within is the one that a graph would have: `captured.record`.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.captures = self.replays = 0
        self._patch = patch

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            with self._patch.context() as inside:
                inside.setattr("fedmap_sparse.optim.optimizer.capturing", lambda device: True)
                work()

        return replay


class Normed(nn.Module):
    """With buffers, and with what draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, 30), nn.BatchNorm1d(30)
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.drop(self.norm(self.first(x)).relu()))
        return found


def options(**more: Any) -> Config:
    base: dict[str, Any] = {"clients": len(SIZES), "batch_size": 8, "local_epochs": 2}
    return build({**base, "weight_decay": 0.01, "lr_decay": 0.5, **more})


def federation(
    config: Config, graphs: StandIn | None
) -> tuple[InProcessEngine, LocalTraining, Callable[[], Tensor]]:
    torch.manual_seed(1)
    server = fs.FedMapServer(
        fs.flatten(Normed()), Iterative(target=0.6, start=1, end=2, every=1),
        lr=config.learning_rate,
    )  # fmt: skip
    drawn = {i: Split(torch.randn(n, 12), torch.randint(4, (n,))) for i, n in enumerate(SIZES)}
    local = fs.flatten(Normed())
    train = LocalTraining(config, drawn, Phases(), graphs)
    clients: dict[Any, Any] = {i: make_client(config, local) for i in drawn}
    engine = InProcessEngine(server, clients, train, seed=config.seed)
    return engine, train, lambda: server.params.values.detach().clone()


@pytest.mark.parametrize(
    ("optimizer", "exact"), [({"momentum": 0.9}, True), ({"momentum": 0.0}, True),
                             ({"optimizer": "adamw"}, False)],
)  # fmt: skip
def test_replayed_rounds_are_those_of_launched_steps(
    optimizer: dict[str, Any], exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn(monkeypatch)
    plain, _, plain_values = federation(options(**optimizer), None)
    ours, train, values = federation(options(graphs=True, device="cuda", **optimizer), stand_in)
    masks = set()
    for _ in range(ROUNDS):
        expected, found = plain.round(), ours.round()
        masks.add(ours.server.mask.digest())
        if exact:
            assert torch.equal(values(), plain_values())
            assert found.result.loss == expected.result.loss
        else:  # a replay multiplies the powers of the betas, a launched step takes them anew
            torch.testing.assert_close(values(), plain_values(), rtol=1e-5, atol=1e-6)
    assert len(masks) == 3
    assert stand_in.captures == len(masks)
    # Of 10 + 2 × 4 full batches a round each client launches its first, and each mask WARM_UP more.
    assert stand_in.replays == ROUNDS * (10 + 8 - 2) - len(masks) * WARM_UP
    assert set(train._phases) == {"train"}


@pytest.mark.parametrize("method", ["fedmap", "feddst", "stc", "snip"])
def test_runs_of_every_kind_of_method(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn(monkeypatch)
    monkeypatch.setattr("fedmap_sparse.experiments.training.CudaGraphs", lambda device: stand_in)
    monkeypatch.setattr(runner, "_device", lambda name: torch.device("cpu"))
    common = {"dataset": "digits", "model": "mlp", "clients": 3, "rounds": 3, "batch_size": 50}
    common |= {"method": method, "processes": 1, "device": "cuda", "baseline": False}
    replayed, launched = (
        runner.run(build({**common, "graphs": graphs, "out": str(tmp_path / str(graphs))}))
        for graphs in (True, False)
    )
    (ours,), (theirs,) = replayed.values(), launched.values()
    for name in ("accuracy", "loss", "survivors", "uplink_bytes"):
        assert ours[name] == theirs[name], name
    assert stand_in.replays


def test_a_step_that_cannot_be_captured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(StandIn):
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    engine, _, _ = federation(options(graphs=True, device="cuda"), Refusing(monkeypatch))
    with pytest.raises(ConfigError) as caught:
        engine.round()
    assert str(caught.value) == (
        "graphs: a step of Normed cannot be captured in a CUDA graph, graphs=false trains it: "
        "operation not permitted when stream is capturing"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "graphs: expected device=cuda beside it, for CUDA graphs, got device=cpu"),
        ({"device": "cuda:1", "prox_mu": 0.1}, f"prox_mu: {WITHOUT}, got 0.1"),
        ({"device": "cuda", "keep_optimizer": True}, f"keep_optimizer: {WITHOUT}, got true"),
    ],
)
def test_what_graphs_do_not_go_with(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"graphs": True, **more})
    assert str(caught.value) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [fs.optim.MaskedSGD, fs.optim.MaskedAdamW])
def test_an_optimizer_that_restarts_is_a_new_one_in_its_memory(
    make: Callable[..., Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    one, two = (fs.flatten(nn.Linear(40, 9).to(dtype)) for _ in range(2))
    more = {"momentum": 0.9, "dampening": 0.5} if make is fs.optim.MaskedSGD else {}
    ours = make(one, fs.ops.prune_(one.prunable, 100, within=one.mask), lr=0.1, **more)
    drawn = [torch.randn(p.shape, dtype=dtype) for p in one.parameters]

    def steps(flat: fs.FlatParameters, optimizer: Any) -> None:
        for n in range(3):
            for p, g in zip(flat.parameters, drawn, strict=True):
                p.grad = g * (n + 1)
            optimizer.step()

    steps(one, ours)
    held = {name: t.data_ptr() for name, t in ours._packed.tensors.items()}
    assert ours.state[one.parameters[0]]
    laid_out = ours.laid_out
    ours.restart()
    assert not ours.state[one.parameters[0]]
    with torch.no_grad():
        two.values.copy_(one.values)
    theirs = make(two, one.mask, lr=0.1, **more)
    steps(one, ours)
    steps(two, theirs)
    assert torch.equal(one.values, two.values)
    assert {name: t.data_ptr() for name, t in ours._packed.tensors.items()} == held
    assert ours.laid_out == laid_out
    ours.set_mask(fs.ops.prune_(one.prunable, 50, within=one.mask))
    assert ours.laid_out == laid_out + 1
