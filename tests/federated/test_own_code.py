"""What a caller's own code gives a round: checked like a message, and no failure outlives it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ambient import OWN, not_under
from torch import Tensor

import fedmap_sparse as fs
from fedmap_sparse.errors import RoundFailed
from fedmap_sparse.federated import FedMapClient, FedMapServer
from fedmap_sparse.federated.aggregation import Aggregator
from fedmap_sparse.federated.server_optim import FedAdam, FedAvgM, ServerOptimizer
from fedmap_sparse.schedule import OneShot

from .rounds import answer, bits, client_of, same, server_of

NAN, INF = float("nan"), float("inf")


class Own(Aggregator, ServerOptimizer):
    """An aggregator or a server optimizer that applies a function to the first vector."""

    kind, state_names, least = "own", ("kept",), 1

    def __init__(self, change: Any) -> None:
        object.__setattr__(self, "change", change)

    def __call__(self, vectors: list[Tensor], weights: list[int], start: Tensor) -> Tensor:
        return self.change(vectors[0], {})

    def step(self, model: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        return self.change(mean, state)


def put(place: int, value: float) -> Any:
    return lambda v, _: v.index_fill(0, torch.tensor([place]), value)


UNSOUND = {
    "NaN": put(3, NAN),
    "none": lambda v, _: None,
    "an array": lambda v, _: v.numpy(),
    "a list": lambda v, _: v.tolist(),
    "too short": lambda v, _: v[1:],
    "float64": lambda v, _: v.double(),
    "without memory": lambda v, _: v.to("meta"),
    "sparse": lambda v, _: v.to_sparse(),
}
UNSOUND_MEANS = {**UNSOUND, "infinite": put(3, INF), "NaN in a buffer": put(-11, NAN)}
UNSOUND_STATES = {
    **UNSOUND,
    "a state that is gone": lambda v, s: (s.clear(), v)[1],
    "a state more": lambda v, s: (s.update(more=v), v)[1],
    "a state too short": lambda v, s: (s.update(kept=v[1:]), v)[1],
    "a state of NaN": lambda v, s: (s.update(kept=v * NAN), v)[1],
}


@not_under("meta", reason=OWN)
@pytest.mark.parametrize("case", UNSOUND_MEANS)
def test_an_aggregators_unsound_vector_fails_the_round_alone(case: str) -> None:
    server = server_of(aggregator=Own(UNSOUND_MEANS[case]))
    server.begin_round()
    updates, before = [(0, answer(server, client_of()))], bits(server.params)
    with pytest.raises(RoundFailed, match="round 0: aggregator: expected"):
        server.aggregate(updates)
    assert same(bits(server.params), before)
    server.aggregator = None
    assert server.aggregate(updates).accepted == (0,)
    server.begin_round()


@not_under("meta", reason=OWN)
@pytest.mark.parametrize("case", UNSOUND_STATES)
def test_a_server_optimizers_unsound_step_fails_the_round_alone(case: str) -> None:
    server = server_of(server_optimizer=Own(UNSOUND_STATES[case]))
    server.begin_round()
    updates, before = [(0, answer(server, client_of()))], bits(server.params)
    with pytest.raises(RoundFailed, match=r"server_optimizer|expected numbers after the server"):
        server.aggregate(updates)
    assert same(bits(server.params), before)
    assert server.round == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vectors_of_other_strides_with_autograd_and_beyond_the_range_land(
    dtype: torch.dtype,
) -> None:
    for change in (
        lambda v, _: torch.stack([v, v], 1)[:, 0],
        lambda v, _: v.clone().requires_grad_() * 1,
        lambda v, _: torch.full_like(v, 1e6),
    ):
        server = server_of(model_dtype=dtype, aggregator=Own(change))
        server.begin_round()
        server.aggregate([(0, answer(server, client_of(dtype)))])
        server.begin_round()
        client_of(dtype).receive(server.broadcast())
        assert not server.params.values.requires_grad
        assert torch.isfinite(server.params.module.mean).all()  # type: ignore[arg-type]


def test_what_is_written_into_padding_reaches_nobody() -> None:
    server, client = server_of(aggregator=Own(lambda v, _: v - 0.0 + 1)), client_of()
    with torch.no_grad():
        server.params.values.add_(1.0)  # noise for privacy, say
    for r in range(2):
        server.begin_round()
        client.receive(server.broadcast(client.have))
        with torch.no_grad():
            client.params.values.fill_(-0.0 if r else 0.5)
        if r:
            server.apply_mean(client.update_array() + 1, 1, 1)
        else:
            assert server.aggregate([(0, client.update(3))]).accepted == (0,)
    server.begin_round()
    client.receive(server.broadcast(client.have))


@pytest.mark.parametrize("kind", [torch.int64, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_are_ranked_as_finely_as_they_are(kind: torch.dtype, sign: int) -> None:
    order = torch.randperm(340)

    def criterion(values: Tensor, mask: fs.Mask, layout: fs.FlatLayout) -> Tensor:
        values.zero_()
        mask.words.zero_()  # copies: the server's are its own
        return (sign * 2**40 + order).to(kind)

    server = server_of(OneShot(0.5, 0), criterion=criterion)
    server.begin_round()
    kept = server.mask.to_bool()[server.layout.initial_mask().to_bool()]
    assert torch.equal(kept, order >= 340 - server.mask.nnz)


@pytest.mark.parametrize("cast", [Tensor.to_sparse, lambda t: t.to(torch.complex64)])
def test_scores_that_cannot_be_ranked_are_refused(cast: Any) -> None:
    server = server_of(OneShot(0.5, 0), criterion=lambda v, *_: cast(v))
    with pytest.raises(TypeError, match="criterion: expected a dense tensor of real scores"):
        server.begin_round()


class Keeps:
    target = 0.5

    def __init__(self, count: Any) -> None:
        self.count = count

    def keep(self, at_round: int, eligible: int) -> Any:
        return self.count


@pytest.mark.parametrize("count", [-1, 5.0, NAN, INF, True, None, "5", torch.tensor(5)])
def test_a_schedule_that_says_no_count_is_refused(count: Any) -> None:
    server = server_of(Keeps(count))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule: expected an int of at least 0"):
        server.begin_round()
    server.schedule = Keeps(np.int64(7))  # type: ignore[assignment]
    server.begin_round()
    assert server.mask.nnz == 7


@pytest.mark.parametrize("lr", [True, "0.1", 10**400, 1j, [1], NAN, -1.0, INF])
def test_a_learning_rate_that_is_no_number_is_refused(lr: Any) -> None:
    server = server_of(lr=lambda _: lr)
    with pytest.raises((TypeError, ValueError), match="lr: expected a finite number"):
        server.begin_round()
    for make in (FedAvgM, FedAdam):
        with pytest.raises((TypeError, ValueError), match="lr: expected"):
            make(lr=lr)


def test_a_server_optimizers_numbers_are_numbers_in_float32() -> None:
    for options in ({"lr": 1e300}, {"tau": 5e-324}, {"lr": 1e-60}):
        with pytest.raises(ValueError, match=r"(lr|tau): expected 1.4013e-45 to 3.4028e\+38"):
            FedAdam(**options)


@pytest.mark.parametrize("samples", [True, 1.5, "3", None, torch.tensor(3), 2**53 + 1, 10**400])
def test_samples_that_are_no_count_are_refused(samples: Any) -> None:
    server, client = server_of(), client_of(dtype="int8")
    server.begin_round()
    client.receive(server.broadcast())
    with pytest.raises((TypeError, ValueError), match="num_samples: expected"):
        client.update(samples)
    with pytest.raises((TypeError, ValueError), match="num_samples: expected"):
        server.apply_mean(client.update_array(), samples, 1)
    for loss in ("x", [1.0], 1j, torch.ones(2)):
        with pytest.raises(TypeError, match="loss: expected a number"):
            client.update(1, loss)  # type: ignore[arg-type]
    assert server.aggregate([(0, client.update(1, 10**400))]).loss is None


@pytest.mark.parametrize("clients", [True, 0, 10**12, "ab", ["a", "a"], [], 2.0, None])
def test_clients_of_a_mean_are_named_or_counted(clients: Any) -> None:
    server, client = server_of(), client_of()
    server.begin_round()
    client.receive(server.broadcast())
    with pytest.raises((TypeError, ValueError), match="clients: expected"):
        server.apply_mean(client.update_array(), 3, clients)
    with pytest.raises(ValueError, match="array: expected elements in memory"):
        server.apply_mean(client.update_array().to("meta"), 3, 1)
    assert server.apply_mean(client.update_array(), 3, np.int64(2)).accepted == (0, 1)


def keyed(client: Any) -> tuple[FedMapServer, Any]:
    key = bytes(range(32))
    return server_of(keys={client: key}), client_of(key=key, client_id=client)


@pytest.mark.parametrize("client", [np.int64(7), np.uint8(7), np.str_("seven")])
def test_numpys_ids_are_pythons(client: Any) -> None:
    server, owner = keyed(client)
    server.begin_round()
    owner.receive(server.broadcast(client=client))
    data = owner.update(1)
    assert server.aggregate([(client.item(), data), (client, data)]).accepted == (client.item(),)
    server = server_of()
    server.begin_round()
    updates = [(c, answer(server, client_of())) for c in (client, client.item() * 2)]
    weights = {i: 2 for i, _ in updates}
    assert server.aggregate(updates, weights=weights).num_samples == 4


@pytest.mark.parametrize("client", [True, -1, 1 << 64, "x" * 70_000, "\ud800", 1.5])
def test_an_id_that_no_envelope_carries_is_refused_at_once(client: Any) -> None:
    for make in (keyed, lambda c: client_of(key=bytes(32), client_id=c)):
        with pytest.raises((TypeError, ValueError)):
            make(client)


@pytest.mark.parametrize("end", ["abort_round", "load_state_dict"])
def test_a_thread_hears_that_the_round_ended_without_its_update(end: str) -> None:
    server = server_of()
    server.begin_round()
    update, state = answer(server, client_of()), server.state_dict()
    stream = server._streaming("add")  # where a thread in `add` is when it checks its update
    getattr(server, end)(*([state] if end == "load_state_dict" else []))
    assert stream.offer(0, update) == "expected an update before the round ended"


@not_under("inference", reason="every call would be in the mode that made the memory")
def test_memory_of_inference_mode_is_refused_before_anything_is_written() -> None:
    server, client = server_of(OneShot(0.5, 0)), client_of()
    with torch.inference_mode():
        client.params.module.mean = torch.zeros(3)
    server.begin_round()
    before = bits(client.params)
    with pytest.raises(fs.FormatError, match="mean: expected a buffer that may be written"):
        client.receive(server.broadcast())
    assert same(bits(client.params), before)
    with torch.inference_mode():
        flat = [fs.flatten(torch.nn.Linear(8, 8)) for _ in range(2)]
    server = FedMapServer(flat[0], OneShot(0.5, 0))
    other = FedMapServer(fs.flatten(torch.nn.Linear(8, 8)), OneShot(0.5, 0))
    other.begin_round()
    before = [p.values.clone() for p in flat]
    for write in (server.begin_round, lambda: FedMapClient(flat[1]).receive(other.broadcast())):
        with pytest.raises(RuntimeError, match="inference tensor"):
            write()
    for p, values in zip(flat, before, strict=True):
        assert torch.equal(p.values, values)
        assert p.mask.nnz == server.mask.nnz == p.layout.eligible
