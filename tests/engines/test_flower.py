"""Flower: rounds through a Grid in one process give the bits of the in-process engine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.engines.in_process import InProcessEngine

pytest.importorskip("flwr", reason="Flower is not installed: pip install fedmap-sparse[flower]")


from flower_grid import LocalGrid
from flower_setup import NODES, batch, network, one_thread  # noqa: F401  # a fixture
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.clientapp import ClientApp

from fedmap_sparse.engines.flower import (
    ContextState,
    FedMap,
    FileState,
    fedmap_evaluate,
    fedmap_train,
)
from fedmap_sparse.engines.flower.codec import message_of, record_of

ROUNDS = 4


def train(name: Any, client: Any, message: Any) -> tuple[int, float]:
    for step in range(2):
        x, y = batch(message.round, name, step)
        loss = nn.functional.cross_entropy(client.params.module(x), y)
        loss.backward()
        client.optimizer.step()
        client.optimizer.zero_grad()
    return 10 + name, loss.item()


def evaluate(name: Any, client: Any) -> tuple[int, dict[str, float]]:
    client.params.module.eval()
    with torch.no_grad():
        x, y = batch(name)
        loss = nn.functional.cross_entropy(client.params.module(x), y)
    client.params.module.train()
    return 5 + name, {"loss": loss.item()}


def make_server(**options: Any) -> fs.FedMapServer:
    schedule = fs.schedule.Iterative(0.9, start=1, end=3)
    return fs.FedMapServer(fs.flatten(network()), schedule, lr=0.05, **options)


def make_client(**options: Any) -> fs.FedMapClient:
    return fs.FedMapClient(
        fs.flatten(network()),
        optimizer=lambda p, m, lr: fs.optim.MaskedSGD(p, m, lr=lr or 0.1, momentum=0.9),
        **options,
    )


def make_app(state: Any = None, **options: Any) -> ClientApp:
    app = ClientApp()

    @app.train()
    def on_train(message: Any, context: Any) -> Any:
        name = context.node_config["partition-id"]
        client = make_client(**options)
        return fedmap_train(message, context, client, lambda c, m: train(name, c, m), state=state)

    @app.evaluate()
    def on_evaluate(message: Any, context: Any) -> Any:
        name = context.node_config["partition-id"]
        client = make_client(**options)
        return fedmap_evaluate(
            message, context, client, lambda c, m: evaluate(name, c), state=state
        )

    return app


def fingerprint(server: fs.FedMapServer) -> tuple[bytes, bytes]:
    state = server.params.to_state_dict()
    return b"".join(t.numpy().tobytes() for t in state.values()), server.mask.digest()


def alone(rounds: int = ROUNDS, missing: dict[int, int] | None = None, **options: Any) -> Any:
    """The in-process engine's model; `missing`: round to the client that takes no part in it."""
    server = make_server()
    clients = {name: make_client(**options) for name in NODES.values()}
    for number in range(rounds):
        there = {n: c for n, c in clients.items() if (missing or {}).get(number) != n}
        InProcessEngine(server, there, train).round()
    return fingerprint(server)


def run(grid: LocalGrid, rounds: int = ROUNDS, **options: Any) -> FedMap:
    options = {"order": "partition-id", "min_nodes": 2, "timeout": 0.3, **options}
    strategy = FedMap(options.pop("server", None) or make_server(), **options)
    strategy.start(grid, strategy.arrays, num_rounds=rounds - strategy.server.round)
    return strategy


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("shuffle", [0, 1, 2])
def test_bits_are_those_of_the_in_process_engine(dtype: str, shuffle: int) -> None:
    strategy = run(LocalGrid(make_app(dtype=dtype), NODES, shuffle=shuffle))
    assert fingerprint(strategy.server) == alone(dtype=dtype)
    assert strategy.server.epoch == 3
    assert [len(r.accepted) for r in strategy.results] == [3] * ROUNDS


def test_a_node_that_lost_its_state_is_sent_the_mask_within_the_round() -> None:
    grid = LocalGrid(make_app(), NODES)

    def forget(exchange: int) -> None:
        if exchange == 2:
            grid.connect(12, 1)

    grid.before = forget
    strategy = run(grid)
    assert fingerprint(strategy.server) == alone()
    assert grid.exchanges == ROUNDS + 1
    assert [len(r.accepted) for r in strategy.results] == [3] * ROUNDS


def test_a_silent_node_is_left_out_of_its_round_and_the_next() -> None:
    grid = LocalGrid(make_app(), NODES)
    asked: list[list[int]] = []
    grid.silent = lambda exchange, node: exchange == 1 and node == 12
    send = grid.send_and_receive

    def spy(messages: Any, **options: Any) -> Any:
        messages = list(messages)
        if messages:
            asked.append(sorted(NODES[m.metadata.dst_node_id] for m in messages))
        return send(messages, **options)

    grid.send_and_receive = spy  # type: ignore[method-assign]
    strategy = run(grid)
    assert asked == [[0, 1, 2], [0, 1, 2], [0, 2], [0, 1, 2]]
    assert fingerprint(strategy.server) == alone(missing={1: 1, 2: 1})


def test_what_went_wrong_is_counted() -> None:
    grid = LocalGrid(make_app(), NODES)
    grid.silent = lambda exchange, node: exchange == 1 and node == 12

    def tamper(exchange: int, node: int, reply: Message) -> None:
        if exchange == 0 and node == 12:
            data = np.zeros(4, np.float32)
            reply.content["arrays"] = ArrayRecord({"w": Array(data)})
        if exchange == 1 and node == 2**40:
            good = message_of(reply.content["arrays"])
            reply.content["arrays"] = record_of(good[:-1])

    grid.tamper = tamper
    server = make_server()
    strategy = FedMap(server, order="partition-id", min_nodes=2)
    result = strategy.start(grid, strategy.arrays, num_rounds=2)
    metrics = [result.train_metrics_clientapp[r] for r in (1, 2)]
    assert [(m["accepted"], m["refused"], m["silent"]) for m in metrics] == [(2, 1, 0), (1, 1, 1)]
    assert metrics[1]["nnz"] == server.mask.nnz
    assert metrics[1]["uplink-bytes"] == strategy.results[1].uplink_bytes
    assert list(strategy.results[1].refused) == [2]


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content.pop("config"),
        lambda content: content.pop("arrays"),
        lambda content: content.update({"config": MetricRecord({"have": 1})}),
        lambda content: content.update({"config": ConfigRecord({"have": "text"})}),
        lambda content: content.update({"arrays": ConfigRecord({"have": b""})}),
        lambda content: content["config"].update({"partition-id": "zero"}),
        lambda content: content["config"].update({"partition-id": -1}),
        lambda content: content["config"].pop("partition-id"),
        lambda content: content["config"].update({"partition-id": 0}),  # another node's
        lambda content: content["config"].update({"needs-mask": True}),
        lambda content: content["config"].update({"have": b"unknown"}) or content.pop("arrays"),
    ],
)
def test_one_node_cannot_end_a_round(harm: Any) -> None:
    grid = LocalGrid(make_app(), NODES)

    def tamper(exchange: int, node: int, reply: Message) -> None:
        if node == 2**40 and exchange > 0:
            harm(reply.content)

    grid.tamper = tamper
    strategy = run(grid)
    assert fingerprint(strategy.server) == alone(missing={1: 2, 2: 2, 3: 2})


def test_a_restarted_node_is_known_by_its_partition() -> None:
    """It has a new id and no state; its old id is still listed for a while."""
    grid = LocalGrid(make_app(), NODES)
    old = 12
    grid.silent = lambda exchange, node: exchange >= 1 and node == old

    def restart(exchange: int) -> None:
        if exchange == 1:
            grid.connect(99, 1)
        if exchange == 3:
            grid.contexts.pop(old)

    grid.before = restart
    strategy = run(grid)
    assert fingerprint(strategy.server) == alone(missing={1: 1})


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, dtype: str) -> None:
    def part(rounds: int, nodes: dict[int, int]) -> FedMap:
        app = make_app(FileState(tmp_path / "clients"), dtype=dtype)
        return run(LocalGrid(app, nodes), rounds, checkpoint=tmp_path / "server")

    part(2, NODES)
    # SuperLink, SuperNodes and the server have started anew: other node ids, empty contexts.
    strategy = part(ROUNDS, {5: 0, 2**50: 1, 77: 2})
    assert fingerprint(strategy.server) == alone(dtype=dtype)
    assert len(strategy.results) == 2


def test_a_server_that_dies_before_it_aggregates_repeats_the_round(tmp_path: Path) -> None:
    """The nodes have trained and saved: the error of an int8 update that was lost is not spent."""
    app = make_app(FileState(tmp_path / "clients"), dtype="int8")
    grid = LocalGrid(app, NODES)

    def die(exchange: int, node: int, reply: Message) -> None:
        if exchange == 2 and NODES[node] == 2:
            raise KeyboardInterrupt

    grid.tamper = die
    with pytest.raises(KeyboardInterrupt):
        run(grid, checkpoint=tmp_path / "server")
    strategy = run(LocalGrid(app, {5: 0, 2**50: 1, 77: 2}), checkpoint=tmp_path / "server")
    assert len(strategy.results) == 2
    assert fingerprint(strategy.server) == alone(dtype="int8")


def test_the_state_of_another_federation_is_not_used(tmp_path: Path) -> None:
    state = FileState(tmp_path)
    for _ in range(2):
        strategy = run(LocalGrid(make_app(state, dtype="int8"), NODES))
        assert fingerprint(strategy.server) == alone(dtype="int8")


def test_a_damaged_state_is_left_aside(tmp_path: Path) -> None:
    grid = LocalGrid(make_app(FileState(tmp_path)), NODES)

    def damage(exchange: int) -> None:
        if exchange == 2:
            path = tmp_path / "client-1"
            path.write_bytes(path.read_bytes()[:-3])

    grid.before = damage
    assert fingerprint(run(grid).server) == alone()


def test_evaluation_is_per_client_and_changes_nothing() -> None:
    strategy = FedMap(make_server(), order="partition-id", fraction_evaluate=1.0)
    grid = LocalGrid(make_app(dtype="int8"), NODES)
    result = strategy.start(grid, strategy.arrays, num_rounds=ROUNDS)
    assert fingerprint(strategy.server) == alone(dtype="int8")
    client = make_client()
    client.receive(strategy.server.snapshot())
    found = [evaluate(name, client) for name in NODES.values()]
    mean = sum(n * m["loss"] for n, m in found) / sum(n for n, _ in found)
    metrics = result.evaluate_metrics_clientapp[ROUNDS]
    assert metrics["loss"] == pytest.approx(mean, rel=1e-6)
    assert metrics["num-examples"] == sum(n for n, _ in found)


def test_a_failed_round_is_repeated() -> None:
    grid = LocalGrid(make_app(), NODES)
    grid.silent = lambda exchange, node: exchange == 1
    strategy = FedMap(make_server(), order="partition-id", min_nodes=3)
    result = strategy.start(grid, strategy.arrays, num_rounds=ROUNDS + 1)
    assert result.train_metrics_clientapp[2]["accepted"] == 0
    assert fingerprint(strategy.server) == alone()


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_nodes_are_drawn_by_seed_and_round(fraction: float) -> None:
    nodes = {1000 + n: n for n in range(8)}
    accepted = []
    for _ in range(2):
        strategy = run(LocalGrid(make_app(), nodes), fraction_train=fraction, seed=5)
        accepted.append([r.accepted for r in strategy.results])
    assert accepted[0] == accepted[1]
    assert {len(a) for a in accepted[0]} == {max(2, round(8 * fraction))}
    assert len(set(accepted[0])) > 1 or fraction == 1.0


def test_too_few_nodes_is_an_error_that_says_so() -> None:
    with pytest.raises(TimeoutError, match=r"at least 4 nodes in 0.3 s, got 3"):
        run(LocalGrid(make_app(), NODES), min_nodes=4)


def test_contexts_keep_the_state_small() -> None:
    grid = LocalGrid(make_app(), NODES)
    run(grid)
    state = ContextState()
    record = grid.contexts[12].state.config_records["fedmap_sparse"]
    data = state.load(grid.contexts[12], record["federation"])
    assert data is not None
    assert state.load(grid.contexts[12], "another") is None
    assert len(data) < 600  # 810 prunable parameters: 102 bytes of mask and the names of fields
