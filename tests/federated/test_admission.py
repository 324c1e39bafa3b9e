"""What may enter the model: finite numbers, and no client decides for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fedmap_sparse as fs
from fedmap_sparse import codec
from fedmap_sparse.errors import RoundFailed
from fedmap_sparse.federated import FedMapClient, FedMapServer
from fedmap_sparse.federated.server_optim import FedAdam, FedAvgM
from fedmap_sparse.schedule import OneShot

from .rounds import answer, bits, client_of, model, same, server_of

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def forged(server: FedMapServer, change: Callable[[Any], None], **options: Any) -> bytes:
    """An update whose sender wrote what it liked into its own model."""
    client = client_of(**options)
    client.receive(server.broadcast())
    with torch.no_grad():
        change(client.params.module)
    return client.update(10)


def put(name: str, value: float) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        module.get_parameter(name).view(-1)[3] = value

    return change


LANDINGS = {
    "float32 infinity": ({}, "a.weight", float("inf"), "a.weight"),
    "float32 NaN in the tail": ({}, "a.bias", float("nan"), "a.bias"),
    "float16 model": ({"model_dtype": F16}, "b.weight", 1e6, "b.weight"),
    "float16 model, tail": ({"model_dtype": F16}, "a.bias", -7e4, "a.bias"),
    "bfloat16 model": ({"model_dtype": BF16}, "b.weight", 3.4e38, "b.weight"),
    "float16 broadcast": ({"dtype": "float16"}, "a.weight", 66_000.0, "a.weight"),
    "bfloat16 broadcast": ({"dtype": "bfloat16"}, "a.bias", 3.4e38, "a.bias"),
    "int8 broadcast": ({"dtype": "int8"}, "a.weight", torch.finfo(F32).max, "a.weight"),
    "FedAdam's second moment": ({"server_optimizer": FedAdam()}, "b.weight", 3.4e38, "b.weight"),
    "FedAvgM's velocity": ({"server_optimizer": FedAvgM(lr=10.0)}, "b.weight", 1e38, "b.weight"),
}


@pytest.mark.parametrize("case", LANDINGS)
@pytest.mark.parametrize("coding", ["entropy", "raw"])
def test_an_update_that_would_break_the_model_is_refused_by_name(case: str, coding: str) -> None:
    options, name, value, says = LANDINGS[case]
    server, plain = server_of(**options), server_of(**options)
    for s in (server, plain):
        s.begin_round()
    good = [(i, answer(server, client_of(), i)) for i in range(2)]
    bad = forged(server, put(name, value), coding=coding)
    result = server.aggregate([*good, (9, bad)])
    plain.aggregate(good)
    assert result.accepted == (0, 1)
    assert says in result.refused[9]
    assert same(bits(server.params), bits(plain.params))
    server.begin_round()  # and the next one begins
    assert torch.isfinite(server.params.values).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_difference_that_sums_to_infinity_is_refused(dtype: str) -> None:
    server = server_of()
    with torch.no_grad():
        server.params.module.a.weight[0, 0] = 3e38
    server.begin_round()
    client = client_of(dtype=dtype, delta=True)
    client.receive(server.broadcast())
    base = codec.decode(server.broadcast(), server.layout)
    with torch.no_grad():
        client.params.module.a.weight[0, 0] = -3e38
        packed = fs.ops.pack(client.params.prunable, server.mask).neg()
    # The difference 3e38 is finite; what it makes of the base is not.
    header = codec.compose(
        server.layout,
        server.mask,
        packed,
        client.params.tail,
        client.params.buffers,
        num_samples=1,
        answers=base.broadcast_digest,
        dtype=dtype,
    )
    forged_header = replace(header.header, base=base.broadcast_digest)
    data = codec.container.join(forged_header, tuple(header.sections.values()))
    good = answer(server, client_of(), 1)
    result = server.aggregate([(0, good), (1, data)])
    assert result.accepted == (0,)
    assert "a.weight" in result.refused[1]


def test_an_int8_scale_that_decodes_to_infinity_is_refused() -> None:
    server = server_of()
    server.begin_round()
    client = client_of(dtype="int8")
    client.receive(server.broadcast())
    sent = codec.decode(server.broadcast(), server.layout)
    good = codec.decode(client.update(3), server.layout)
    codes = torch.full((server.mask.nnz,), 127, dtype=torch.int8)
    scales = torch.full((-(-server.mask.nnz // 256),), 3e38)
    bad = codec.compose(
        server.layout,
        server.mask,
        codec.Quantized(codes, scales, 256),
        good.tail,
        client.params.buffers,
        num_samples=3,
        answers=sent.broadcast_digest,
    )
    result = server.aggregate([(0, client.update(3)), (1, bad.encode())])
    assert result.accepted == (0,)
    assert "a.weight: expected finite values" in result.refused[1]


def test_several_within_range_stop_at_its_edge_and_the_round_goes_on() -> None:
    server = server_of(model_dtype=F16, server_optimizer=FedAvgM(lr=1.0, momentum=0.9))
    for r in range(4):  # a momentum that overshoots
        server.begin_round()
        updates = []
        for i in range(2):
            client = client_of(F16)
            client.receive(server.broadcast())
            with torch.no_grad():
                client.params.module.a.weight[0, 0] = 30_000.0
            updates.append((i, client.update(1)))
        assert server.aggregate(updates).accepted == (0, 1), r
        assert torch.isfinite(server.params.values).all()


BUFFERS = {
    "float infinite": ("mean", float("inf")),
    "float NaN": ("mean", float("nan")),
    "constant changed": ("causal", 0.0),
    "counter at the type's edge": ("steps", (1 << 63) - 1),
    "counter at the other edge": ("steps", -(1 << 63)),
    "int32 at its edge": ("codes", (1 << 31) - 1),
}


@pytest.mark.parametrize("case", BUFFERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_buffer_that_breaks_its_rule_is_refused(case: str, first: bool) -> None:
    name, value = BUFFERS[case]
    server, plain = server_of(), server_of()
    for s in (server, plain):
        s.begin_round()
    place = 5 if name == "causal" else -1
    bad = forged(server, lambda m: m.get_buffer(name).view(-1).__setitem__(place, value))
    hostile = -1 if first else 9
    good = [(i, answer(server, client_of(), i)) for i in range(2)]
    result = server.aggregate([*good, (hostile, bad)])
    plain.aggregate(good)
    assert result.accepted == (0, 1)
    assert result.refused[hostile].startswith(name)
    assert same(bits(server.params), bits(plain.params))


@pytest.mark.parametrize(("dtype", "value"), [(F16, 1e6), (BF16, 3.4e38)])
def test_a_buffer_lands_in_the_dtype_that_the_model_has(dtype: torch.dtype, value: float) -> None:
    server = server_of(model_dtype=dtype)
    server.begin_round()
    bad = forged(server, lambda m: m.mean.fill_(value))
    result = server.aggregate([(0, answer(server, client_of())), (1, bad)])
    assert result.accepted == (0,)
    assert "mean" in result.refused[1]
    assert torch.isfinite(server.params.module.mean).all()


def test_a_float64_buffer_cannot_overflow_with_its_samples() -> None:
    def net() -> torch.nn.Module:
        m = torch.nn.Linear(4, 4)
        m.register_buffer("wide", torch.zeros(2, dtype=torch.float64))
        return m

    server = FedMapServer(fs.flatten(net()), fs.schedule.Dense())
    server.begin_round()
    updates = []
    for i, value in enumerate([1.0, 1.7e308]):
        client = FedMapClient(fs.flatten(net()))
        client.receive(server.broadcast())
        client.params.module.wide.fill_(value)
        updates.append((i, client.update(1 << 30)))
    result = server.aggregate(updates)
    assert result.accepted == (0,)
    assert server.params.module.wide.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("flags", [(0, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1)])
def test_a_boolean_flips_with_the_majority_in_any_order(flags: tuple[int, ...]) -> None:
    server = server_of()
    server.begin_round()
    updates = []
    for i, flag in enumerate(flags):
        client = client_of()
        client.receive(server.broadcast())
        client.params.module.ready[0] = bool(flag)
        updates.append((i, client.update(5)))
    result = server.aggregate(updates)
    assert result.refused == {}
    assert server.params.module.ready.tolist() == [2 * sum(flags) > len(flags), True]


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [((7,), 7), ((5, 9), 5), ((3, 9, 2**39), 9), ((0, 0, 4), 0), ((-8, 6), 6), ((4, 4, 9, 9), 4)],
)
def test_an_integer_becomes_the_median(counts: tuple[int, ...], wanted: int) -> None:
    server = server_of()
    server.begin_round()
    updates = []
    for i, count in enumerate(counts):
        client = client_of()
        client.receive(server.broadcast())
        client.params.module.steps.fill_(count)
        updates.append((i, client.update(5)))
    assert server.aggregate(updates).refused == {}
    assert server.params.module.steps.item() == wanted


def weighed(server: FedMapServer, samples: list[int], stream: bool = False, **options: Any) -> Any:
    """A round in which the last client's bias is 1 and the others' 0: the result, and the bias."""
    server.begin_round()
    updates = []
    for i, n in enumerate(samples):
        client = client_of()
        client.receive(server.broadcast())
        with torch.no_grad():
            client.params.module.a.bias.fill_(float(i == len(samples) - 1))
        updates.append((i, client.update(n)))
    if stream:
        for client_id, data in updates:
            assert server.add(client_id, data, **options) is None
        result = server.close_round()
    else:
        result = server.aggregate(updates, **options)
    return result, server.params.module.a.bias[0].item()


@pytest.mark.parametrize("stream", [False, True])
def test_a_claim_of_samples_cannot_own_the_mean(stream: bool) -> None:
    result, bias = weighed(server_of(), [600, 500, 2**53], stream)
    assert result.capped == {2: 2**53}
    assert bias == pytest.approx(6000 / 7100)
    result, bias = weighed(server_of(max_samples=600), [600, 500, 2**53], stream)
    assert bias == pytest.approx(600 / 1700)
    server = server_of()
    weighed(server, [100, 100, 100])
    server.abort_round()
    _, bias = weighed(server, [2**53, 100, 2**53], stream)
    assert bias < 0.93


def test_weights_may_come_from_the_caller() -> None:
    result, bias = weighed(server_of(), [600, 500, 2**53], weights={0: 1, 1: 1, 2: 2})
    assert (bias, result.num_samples, result.capped) == (0.5, 4, {})
    _, bias = weighed(server_of(), [600, 500, 2**53], stream=True, weight=3)
    assert bias == pytest.approx(1 / 3)
    server = server_of()
    server.begin_round()
    update = answer(server, client_of())
    for weights in ({}, {0: 0}, {0: 1.5}, {0: True}, {0: 2**54}):
        with pytest.raises(ValueError, match="weights: expected"):
            server.aggregate([(0, update)], weights=weights)  # type: ignore[arg-type]
    assert server.aggregate([(0, update)]).accepted == (0,)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_never_reaches_the_result(loss: float) -> None:
    server = server_of()
    server.begin_round()
    client = client_of()
    sent = client.receive(server.broadcast())
    bad = codec.encode(
        client.params,
        server.mask,
        num_samples=9,
        answers=sent.broadcast_digest,
        meta={"loss": loss},
    )
    result = server.aggregate([(0, client.update(3, 0.25)), (1, bad), (2, client.update(3, loss))])
    assert result.accepted == (0, 1, 2)
    assert result.loss == 0.25
    server.begin_round()
    sent = client.receive(server.broadcast(client.have))
    huge = codec.encode(
        client.params, server.mask, num_samples=9, answers=sent.broadcast_digest,
        meta={"loss": 1.7e308},
    )  # fmt: skip
    assert server.aggregate([(i, huge) for i in range(3)]).loss == pytest.approx(1.7e308)


def released() -> memoryview:
    view = memoryview(bytes(512))
    view.release()
    return view


class Unmeasured(bytes):
    def __len__(self) -> int:
        raise RuntimeError("a length that the sender's code computes")


STRANGERS: dict[str, Any] = {
    "none": None, "text": "text", "number": 7, "empty": b"", "list": [1, 2],
    "strided": memoryview(bytes(512))[::2], "object": object(), "released": released(),
    "array": torch.zeros(512).numpy(), "numbers": memoryview(torch.zeros(64).numpy()),
    "subclass": Unmeasured(512),
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_strangers_mistake_is_its_own_refusal(kind: str) -> None:
    data = STRANGERS[kind]
    for stream in (False, True):
        server = server_of()
        server.begin_round()
        good = answer(server, client_of())
        if stream:
            assert server.add(1, data) is not None
            assert server.add(0, good) is None
            result = server.close_round()
        else:
            result = server.aggregate([(1, data), (0, good), (1, data)])
        assert result.accepted == (0,)
        assert result.refused.keys() == {1}


@pytest.mark.parametrize("have", ["text", 5, [1], bytearray(16), torch.zeros(2).numpy(), b"?"])
def test_a_claim_to_have_what_is_no_digest_gets_the_whole_mask(have: Any) -> None:
    server = server_of(OneShot(0.5, 0))
    server.begin_round()
    assert server.broadcast(have) == server.broadcast()
    assert server.snapshot(have) == server.snapshot()


def test_accepted_and_refused_are_disjoint() -> None:
    server = server_of()
    server.begin_round()
    good = answer(server, client_of())
    assert server.add(0, b"?") is not None
    assert server.add(0, good) is None
    assert server.add(0, b"?") is not None
    assert server.add(0, good) is not None
    result = server.close_round()
    assert (result.accepted, result.refused) == ((0,), {})


def test_after_a_failed_round_state_is_taken_and_the_bytes_sent_again() -> None:
    for dtype in ("float32", "bfloat16", "int8"):
        server = server_of(OneShot(0.5, 0), dtype=dtype, min_updates=2)
        server.begin_round()
        updates = [(i, answer(server, client_of(), i)) for i in range(2)]
        with pytest.raises(RoundFailed):
            server.aggregate(updates[:1])
        saved = server.to_bytes()
        again = server_of(OneShot(0.5, 0), dtype=dtype, min_updates=2)
        again.from_bytes(saved)
        again.begin_round()
        assert again.broadcast() == server.broadcast()
        for s in (server, again):
            assert s.aggregate(updates).accepted == (0, 1)
        assert same(bits(server.params), bits(again.params))


def test_a_server_starts_only_from_weights_that_it_can_send() -> None:
    m = model()
    with torch.no_grad():
        m.a.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"a\.weight: expected finite weights within 65504"):
        FedMapServer(fs.flatten(m), fs.schedule.Dense(), dtype="float16")
    m.mean.fill_(float("nan"))
    with pytest.raises(ValueError, match="mean: expected numbers, got NaN"):
        FedMapServer(fs.flatten(m), fs.schedule.Dense())
