"""Flower's SecAgg+ over packed vectors: its own workflow and mod, messages cut into objects."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.experiments import models

pytest.importorskip("flwr", reason="Flower is not installed: pip install fedmap-sparse[flower]")

from flower_grid import LocalGrid
from flower_setup import batch, network, one_thread  # noqa: F401  # a fixture
from flwr.app import Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.server import LegacyContext, ServerConfig
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow

from fedmap_sparse.engines.flower import FedMap, SecureFedMap, fedmap_secure_train, fedmap_train

#: Node ids as Flower draws them: 64 bits, in no order of the partitions.
NODES = {2**63 + 7: 0, 12: 1, 2**40: 2, 99: 3, 7: 4}
CLIP, STEPS, MOST = 0.5, 2**22, 20
#: The exchanges of a round: keys, shares of them, masked vectors, unmasking.
STAGES = 4
VECTORS, UNMASK = 2, 3


class Federation:
    """Five nodes; what each trained is kept here, which a server never has.

    Attributes:
        plain: (round, partition) to (update_array, samples).
        after: the model's vector after each round.
    """

    def __init__(self, make: Callable[[], nn.Module], schedule: fs.schedule.Schedule) -> None:
        self.make = make
        self.server = fs.FedMapServer(fs.flatten(make()), schedule, lr=0.05)
        self.plain: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
        self.after: list[torch.Tensor] = []
        apply = self.server.apply_mean

        def applied(mean: torch.Tensor, *args: Any) -> Any:
            done = apply(mean, *args)
            self.after.append(vector(self.server))
            return done

        self.server.apply_mean = applied  # type: ignore[method-assign]
        self.grid = LocalGrid(self.app(fedmap_secure_train, mods=[secaggplus_mod]), NODES)

    def app(self, answer: Callable[..., Message], **options: Any) -> ClientApp:
        app = ClientApp(**options)

        @app.train()
        def on_train(message: Message, context: Context) -> Message:
            name = int(context.node_config["partition-id"])
            client = fs.FedMapClient(fs.flatten(self.make()))
            return answer(message, context, client, lambda c, m: self.train(name, c, m))

        return app

    def train(self, name: int, client: fs.FedMapClient, message: Any) -> tuple[int, float]:
        rng = torch.Generator().manual_seed(100 * message.round + name)
        with torch.no_grad():
            for p in client.params.parameters:
                p.add_(0.05 * torch.randn(p.shape, generator=rng))
        client.params.zero_pruned()
        self.plain[message.round, name] = client.update_array(), 10 + name
        return 10 + name, 1.0

    def run(self, rounds: int = 1) -> SecureFedMap:
        strategy = SecureFedMap(self.server, min_nodes=len(NODES))
        bare = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        context = LegacyContext(bare, config=ServerConfig(num_rounds=rounds), strategy=strategy)
        secure = SecAggPlusWorkflow(
            len(NODES), 3, max_weight=MOST, clipping_range=CLIP, quantization_range=STEPS
        )
        DefaultWorkflow(fit_workflow=secure)(self.grid, context)
        return strategy

    def mean(self, number: int, left: set[int]) -> torch.Tensor:
        """By samples, in the clear."""
        found = [self.plain[number, name] for name in left]
        return sum(n * v.double() for v, n in found) / sum(n for _, n in found)


def vector(server: fs.FedMapServer) -> torch.Tensor:
    params = server.params
    floats = [b.flatten() for b in params.buffers.values() if b.is_floating_point()]
    packed = fs.ops.pack(params.prunable.detach(), server.mask)
    return torch.cat([packed, params.tail.detach(), *floats]).double()


def small(schedule: fs.schedule.Schedule | None = None) -> Federation:
    return Federation(network, schedule or fs.schedule.Iterative(0.9, start=1, end=3))


def off(federation: Federation, number: int, left: set[int]) -> float:
    """The largest distance from the plain mean, in steps of the quantisation."""
    share = sum(10 + name for name in left) / len(left) / MOST
    step = 2 * CLIP / STEPS / share
    rounding = 2.0**-23
    error = (federation.after[number] - federation.mean(number, left)).abs().max()
    return float((error - rounding) / step)


def test_the_mean_is_the_plain_one_within_a_step() -> None:
    federation = small()
    strategy = federation.run(4)
    assert federation.server.mask.nnz < 0.11 * federation.server.mask.numel
    for number in range(4):
        assert off(federation, number, {0, 1, 2, 3, 4}) <= 1
        assert strategy.results[number].num_samples == 60
    pruned = federation.server.params.prunable[(~federation.server.mask).to_bool()]
    assert not bool(pruned.view(torch.int32).any())  # +0.0, all of them


@pytest.mark.parametrize("stage", [VECTORS, UNMASK])
def test_a_node_drops_out_in_mid_protocol(stage: int) -> None:
    """Its masks are taken off again. Once its vector is in, it counts."""
    federation = small()
    federation.grid.silent = lambda exchange, node: exchange == STAGES + stage and node == 12
    strategy = federation.run(3)
    left = {0, 2, 3, 4} if stage == VECTORS else {0, 1, 2, 3, 4}
    assert off(federation, 1, left) <= 1
    assert off(federation, 2, {0, 1, 2, 3, 4}) <= 1
    assert [len(r.accepted) for r in strategy.results] == [5, len(left), 5]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_node_that_drops_out_before_the_vectors_costs_a_round(stage: int) -> None:
    """Flower's workflow halts then: it asks the others for shares that they never got."""
    federation = small()
    federation.grid.silent = lambda exchange, node: exchange == STAGES + stage and node == 12
    strategy = federation.run(3)
    assert [r.round for r in strategy.results] == [0, 1]
    assert off(federation, 1, {0, 1, 2, 3, 4}) <= 1


def test_a_node_that_lost_its_mask_is_out_for_one_round() -> None:
    federation = small()

    def forget(exchange: int) -> None:
        if exchange == 3 * STAGES:
            federation.grid.connect(12, 1)

    federation.grid.before = forget
    strategy = federation.run(5)
    assert [len(r.accepted) for r in strategy.results] == [5, 5, 5, 4, 5]
    assert off(federation, 3, {0, 2, 3, 4}) <= 1
    assert off(federation, 4, {0, 1, 2, 3, 4}) <= 1


def test_a_round_with_too_few_left_changes_nothing_and_is_repeated() -> None:
    federation = small()
    federation.grid.silent = lambda exchange, node: exchange == VECTORS and node in (12, 99, 7)
    before = vector(federation.server)
    strategy = federation.run(1)
    assert (federation.server.round, strategy.results) == (0, [])
    assert torch.equal(vector(federation.server), before)
    federation.grid.silent = lambda exchange, node: False
    federation.run(1)
    assert federation.server.round == 1
    assert off(federation, 0, {0, 1, 2, 3, 4}) <= 1


def test_a_mean_that_the_server_refuses_leaves_the_round_open() -> None:
    federation = small()
    federation.server.min_updates = 6
    assert federation.run(1).results == []
    assert federation.server.round == 0
    federation.server.min_updates = 1
    assert len(federation.run(1).results) == 1


def test_the_server_is_sent_masked_vectors_alone() -> None:
    federation = small()
    seen = []

    def look(exchange: int, node: int, reply: Message) -> None:
        if exchange == VECTORS:
            assert not reply.content.array_records["fitres.parameters"]
            masked = reply.content.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
            seen.append(bytes_to_ndarray(masked[1]))

    federation.grid.tamper = look
    federation.run(1)
    assert len(seen) == len(NODES)
    for masked in seen:  # uniform over 32 bits, as no quantised difference is
        assert float(np.std(masked)) == pytest.approx(2**32 / 12**0.5, rel=0.1)


def test_too_few_nodes_is_an_error_that_says_so() -> None:
    strategy = SecureFedMap(small().server, min_nodes=9, timeout=0)
    from flwr.server.client_manager import SimpleClientManager

    with pytest.raises(TimeoutError, match="at least 9 nodes in 0 s, got 0"):
        strategy.configure_fit(1, strategy.initialize_parameters(SimpleClientManager()),
                               SimpleClientManager())  # fmt: skip


def test_bytes_beside_dense_and_beside_the_coded_update(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of all objects that one node sends in a round."""

    def mlp() -> nn.Module:
        torch.manual_seed(0)
        return models.build("mlp", (1, 8, 8), 10)

    pruned = fs.schedule.OneShot(target=0.9, at=0)
    sizes = []
    for schedule in (fs.schedule.Dense(), pruned):
        federation = Federation(mlp, schedule)
        federation.run(1)
        sizes.append(federation.grid.up // len(NODES))
    federation = Federation(mlp, pruned)
    grid = LocalGrid(federation.app(fedmap_train), NODES)
    strategy = FedMap(federation.server, min_nodes=len(NODES))
    strategy.start(grid, strategy.arrays, num_rounds=1)
    coded = grid.up // len(NODES)
    with capsys.disabled():
        print(f"\n  SecAgg+ dense {sizes[0]} B, packed {sizes[1]} B; coded update {coded} B")
    numbers = federation.server.mask.nnz + federation.server.layout.tail_numel
    assert 8 * numbers < sizes[1] < 8 * numbers + 8000
    assert sizes[1] < 0.12 * sizes[0]
    assert coded < sizes[1] / 2
