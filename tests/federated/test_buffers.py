"""A model's buffers side by side, and what a round makes of them, beside loops over each."""

from __future__ import annotations

import random
import statistics

import pytest
import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.codec import buffers as side_by_side
from fedmap_sparse.federated.buffers import BufferMeans
from fedmap_sparse.federated.global_model import check_buffers, write_buffers


class Many(nn.Module):
    """Buffers of every kind and of several shapes, one of them empty."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.register_buffer("mean", torch.tensor([[1.5, -0.0], [3.0, 4.0]]))
        self.register_buffer("none", torch.zeros(0, 4))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("table", torch.arange(6).view(2, 3))
        self.register_buffer("scale", torch.tensor(0.25))
        self.register_buffer("flag", torch.tensor([True, False, True]))


def bits(t: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("scale", lambda b: b),
        ("mean", lambda b: b.half()),
        ("scale", lambda b: b.double()),
        ("mean", lambda b: b.t()),
        ("mean", lambda b: torch.tensor(2.0).expand(2, 2)),
        ("count", lambda b: b.to(torch.int16)),
        ("table", lambda b: b.t().contiguous().t()),
    ],
    ids=["plain", "half", "double", "strides", "expanded", "int16", "int strides"],
)
def test_gathered_and_written_back_each_buffer_is_what_it_was(name, other) -> None:
    model = Many()
    setattr(model, name, other(getattr(model, name)))
    params = fs.flatten(model)
    before = {n: b.clone() for n, b in params.buffers.items()}
    flat = side_by_side.gather(params.layout, params.buffers)
    for n, b in side_by_side.split(params.layout, flat).items():
        assert b.shape == before[n].shape
        assert torch.equal(b.to(before[n].dtype), before[n])
    for b in params.buffers.values():
        if b.is_contiguous():
            b.zero_()
    check_buffers(params, flat)
    write_buffers(params, flat)
    assert {n: bits(b) for n, b in params.buffers.items()} == {
        n: bits(b) for n, b in before.items()
    }


def test_autograd_hears_of_written_buffers() -> None:
    params = fs.flatten(Many())
    x = torch.ones(2, 2, requires_grad=True)
    y = (x * params.module.get_buffer("mean")).sum()
    write_buffers(params, side_by_side.gather(params.layout, params.buffers))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("seed", range(20))
def test_integers_are_the_median_and_flags_the_majority(seed: int) -> None:
    rng = random.Random(seed)
    params = fs.flatten(Many())
    sent = side_by_side.gather(params.layout, params.buffers)
    means = BufferMeans(params.layout, sent, params.buffers)
    clients = rng.randint(1, 7)
    came = []
    for _ in range(clients):
        integers = [n + rng.choice([0, 0, 1, 5, -3]) for n in sent["int"].tolist()]
        flags = [rng.random() < 0.5 for _ in sent["bool"]]
        one = {**sent, "int": torch.tensor(integers), "bool": torch.tensor(flags)}
        means.check(one)
        means.add(one, rng.randint(1, 9))
        came.append((integers, flags))
    found = means.result()
    for i, before in enumerate(sent["int"].tolist()):
        values = [integers[i] for integers, _ in came]
        middle = statistics.median_low(values), statistics.median_high(values)
        assert found["int"][i] == min(middle, key=lambda v: abs(v - before))
    for i, before in enumerate(sent["bool"].tolist()):
        flips = sum(flags[i] != before for _, flags in came)
        assert found["bool"][i] == (before ^ (2 * flips > clients))


def test_a_negative_zero_stays_one() -> None:
    params = fs.flatten(Many())
    sent = side_by_side.gather(params.layout, params.buffers)
    means = BufferMeans(params.layout, sent, params.buffers)
    for weight in (1, 3):
        means.add(sent, weight)
    assert bits(means.result()["float"].float()) == bits(sent["float"])


@pytest.mark.parametrize(
    ("kind", "at", "value", "wrong"),
    [
        ("float", 1, float("nan"), r"mean: expected finite elements"),
        ("float", 4, float("inf"), r"scale: expected finite elements"),
        ("int", 0, 7 + (1 << 40) + 1, r"count: expected to move by at most 2\^40"),
        ("int", 3, -(1 << 41), r"table: expected to move by at most 2\^40"),
    ],
)
def test_a_refused_element_is_named_by_its_buffer(kind, at, value, wrong) -> None:
    params = fs.flatten(Many())
    sent = side_by_side.gather(params.layout, params.buffers)
    means = BufferMeans(params.layout, sent, params.buffers)
    came = {k: t.clone() for k, t in sent.items()}
    came[kind][at] = value
    with pytest.raises(ValueError, match=wrong):
        means.check(came)
