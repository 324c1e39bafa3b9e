"""Flower: rounds through a Grid in one process give the bits of the in-process engine."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.engines.in_process import InProcessEngine
from fedmap_sparse.engines.records import decode_arrays, encode_arrays
from fedmap_sparse.errors import FormatError

pytest.importorskip("flwr", reason="Flower is not installed: pip install fedmap-sparse[flower]")


from flower_grid import LocalGrid, over_the_wire
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod, message_size_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAvg,
)

from fedmap_sparse.engines.flower import (
    CodecGrid,
    CodecMod,
    ContextState,
    FedMap,
    FileState,
    fedmap_evaluate,
    fedmap_train,
)
from fedmap_sparse.engines.flower.codec import message_of, record_of

#: Node ids as Flower draws them: 64 bits, in no order of the partitions.
NODES = {2**63 + 7: 0, 12: 1, 2**40: 2}
ROUNDS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 7))


def batch(*key: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(16, 20, generator=rng), torch.randint(7, (16,), generator=rng)


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


CHUNK = 5 * 2**20


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
def test_a_message_survives_flowers_chunks(size: int) -> None:
    data = np.random.default_rng(0).bytes(size)
    message = Message(RecordDict({"arrays": record_of(data)}), 1, "train")
    again, objects = over_the_wire(message)
    assert message_of(again.content["arrays"]) == data
    # Message, records and Array, then the chunks; about 1 kB of overhead.
    assert len(objects) == 4 + max(1, -(-size // CHUNK)) or size == 0
    assert sum(map(len, objects.values())) - size < 2000


def test_contexts_keep_the_state_small() -> None:
    grid = LocalGrid(make_app(), NODES)
    run(grid)
    state = ContextState()
    record = grid.contexts[12].state.config_records["fedmap_sparse"]
    data = state.load(grid.contexts[12], record["federation"])
    assert data is not None
    assert state.load(grid.contexts[12], "another") is None
    assert len(data) < 600  # 810 prunable parameters: 102 bytes of mask and the names of fields


# The codec around somebody's app and strategy.


def theirs(mods: list[Any]) -> ClientApp:
    """An app that knows nothing of this package."""
    app = ClientApp(mods=mods)

    @app.train()
    def on_train(message: Any, context: Any) -> Any:
        model = network()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        kept = [p != 0 for p in model.parameters()]
        name = context.node_config["partition-id"]
        x, y = batch(message.content["config"]["server-round"], name)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for p, k in zip(model.parameters(), kept):
                if p.dim() == 2:
                    p[~k] = 0.0
        metrics = MetricRecord({"num-examples": 10 + name})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def fedavg(mods: list[Any], coded: bool, private: bool = False) -> tuple[dict[str, bytes], int]:
    """(the model after three rounds, the bytes that travelled)."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # Flower's noise comes from it
    strategy: Any = FedAvg(min_train_nodes=3, min_available_nodes=3, fraction_evaluate=0.0)
    if private:
        strategy = DifferentialPrivacyClientSideFixedClipping(strategy, 0.01, 1.0, 3)
    model = network()
    torch.manual_seed(2)
    with torch.no_grad():
        model[0].weight[torch.rand(30, 20) < 0.9] = 0.0  # type: ignore[index]
    grid = LocalGrid(theirs(mods), NODES)
    seen = CodecGrid(grid) if coded else grid
    result = strategy.start(seen, ArrayRecord(model.state_dict()), num_rounds=3)
    assert result.arrays, "no update"
    return {n: a.numpy().tobytes() for n, a in result.arrays.items()}, grid.up + grid.down


def test_fedavg_gives_the_same_bits_with_the_codec() -> None:
    plain, dense = fedavg([], False)
    coded, sparse = fedavg([CodecMod()], True)
    assert coded == plain
    assert sparse < dense


@pytest.mark.parametrize("place", [0, 1])
def test_mods_that_only_look_may_stand_on_either_side(place: int) -> None:
    plain, _ = fedavg([], False)
    mods: list[Any] = [message_size_mod, message_size_mod]
    mods.insert(place, CodecMod())
    assert fedavg(mods, True)[0] == plain


def test_mods_that_change_arrays_stand_after_the_codec() -> None:
    plain, _ = fedavg([fixedclipping_mod], False, private=True)
    assert fedavg([CodecMod(), fixedclipping_mod], True, private=True)[0] == plain


def test_mods_that_change_arrays_before_the_codec_get_no_update_through() -> None:
    with pytest.raises(AssertionError, match="no update"):
        fedavg([fixedclipping_mod, CodecMod()], True, private=True)


def test_a_reply_that_cannot_be_decoded_is_an_error_reply() -> None:
    grid = LocalGrid(theirs([CodecMod()]), NODES)

    def tamper(exchange: int, node: int, reply: Message) -> None:
        if node == 12:
            reply.content["fedmap_sparse.arrays.arrays"] = ConfigRecord({"spec": "{}"})

    grid.tamper = tamper
    content = RecordDict(
        {
            "arrays": ArrayRecord(network().state_dict()),
            "config": ConfigRecord({"server-round": 1}),
        }
    )
    messages = [Message(content, node, "train") for node in NODES]
    replies = {m.metadata.src_node_id: m for m in CodecGrid(grid).send_and_receive(messages)}
    assert {n: r.has_error() for n, r in replies.items()} == {n: n == 12 for n in NODES}
    assert "arrays" in replies[12].error.reason


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "[]",
        "{}",
        '{"w": 1}',
        '{"w": [[2, 3], "<f4"], "v": [[1], "<f4"]}',
        '{"w": [[3, 2], "<f4"]}',
        '{"w": [[2, 3], "nonsense"]}',
        '{"w": [[-2, -3], "<f4"]}',
        '{"w": [[2.0, 3], "<f4"]}',
        '{"w": [[1099511627776, 1099511627776], "<f4"]}',
        "[" * 100_000,
    ],
)
def test_descriptions_that_do_not_fit_are_refused(spec: str) -> None:
    message, good = encode_arrays({"w": np.ones((2, 3), np.float32)})
    assert np.array_equal(decode_arrays(message, good)["w"], np.ones((2, 3), np.float32))
    with pytest.raises(FormatError):
        decode_arrays(message, spec)
    with pytest.raises(FormatError):
        decode_arrays(message, good, max_numel=5)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", "<i4", "|u1", "|b1"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (4, 5), (2, 0, 3)])
def test_arrays_come_back_as_they_were(dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    a = (rng.integers(-3, 4, shape) * 0.5 + 0.0).astype(dtype)
    arrays = {"w": np.ones((2, 3), np.float32), "a": a, "b": a}
    again = decode_arrays(*encode_arrays(arrays))
    for name, b in arrays.items():
        assert again[name].dtype == b.dtype
        assert again[name].tobytes() == b.tobytes()


def test_the_sign_of_a_zero_travels_only_with_the_dense_form() -> None:
    arrays = {"w": np.array([[-0.0, 0.0, -1.0]], np.float32), "b": np.array([-0.0], np.float32)}
    sparse = decode_arrays(*encode_arrays(arrays))
    assert not np.signbit(sparse["w"][0, 0])
    assert np.signbit(sparse["b"][0])
    dense = decode_arrays(*encode_arrays(arrays, sparse=False))
    assert dense["w"].tobytes() == arrays["w"].tobytes()
