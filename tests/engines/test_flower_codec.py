"""Flower's own FedAvg with the codec, and what travels in its records."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmap_sparse.engines.records import decode_arrays, encode_arrays
from fedmap_sparse.errors import FormatError

pytest.importorskip("flwr", reason="Flower is not installed: pip install fedmap-sparse[flower]")


from flower_grid import LocalGrid, over_the_wire
from flower_setup import NODES, batch, network, one_thread  # noqa: F401  # a fixture
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod, message_size_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

from fedmap_sparse.engines.flower import CodecGrid, CodecMod
from fedmap_sparse.engines.flower.codec import STYPE, message_of, record_of

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


@pytest.mark.parametrize(
    "arrays",
    [
        {"message": Array("uint8", (3,), "fedmap_sparse/2", b"abc")},
        {"message": Array(np.zeros(3, np.uint8))},
        {},
        {f"message{n}": Array("uint8", (3,), STYPE, b"abc") for n in range(2)},
    ],
    ids=["another stype", "numpy", "none", "two"],
)
def test_only_one_array_of_our_stype_is_a_message(arrays: dict[str, Array]) -> None:
    with pytest.raises(ValueError, match=f"expected one array of stype {STYPE}"):
        message_of(ArrayRecord(arrays))


def test_flower_does_not_read_a_message_as_weights() -> None:
    with pytest.raises(TypeError, match="Unsupported serialization type"):
        record_of(b"abc")["message"].numpy()


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
