"""Rounds of random federations: masks nest, counts are exact, the packed mean is the dense one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fedmap_sparse as fs
from fedmap_sparse.errors import RoundFailed
from fedmap_sparse.federated import FedMapClient, FedMapServer
from fedmap_sparse.schedule import Cubic, Dense, Iterative, OneShot, Schedule

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Odd(nn.Module):
    """Parameters of any shapes; those with two dimensions are prunable."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], frozen: bool, counter: bool) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape)))
        self.requires_grad_(not frozen)
        if counter:
            self.register_buffer("seen", torch.tensor(0))
            self.register_buffer("mean", torch.zeros(2))


SIZES = st.sampled_from([0, 1, 2, 3, 7, 20])
SHAPES = st.lists(
    st.one_of(st.tuples(SIZES, SIZES), st.tuples(SIZES), st.just(())), min_size=1, max_size=5
)
TARGETS = st.sampled_from([0.0, 0.3, 0.75, 0.9, 1.0])
SCHEDULES: st.SearchStrategy[Schedule] = st.one_of(
    st.builds(Dense),
    st.builds(OneShot, TARGETS, st.integers(0, 2)),
    st.builds(Iterative, TARGETS, st.integers(0, 1), st.integers(1, 3)),
    st.builds(Cubic, TARGETS, st.just(0), st.integers(1, 4)),
)


def dense_mean(
    clients: list[tuple[FedMapClient, int]], mask: fs.Mask, dtype: torch.dtype
) -> Tensor:
    """The weighted mean of dense models, in float64, with zeros where the mask has none."""
    total = torch.zeros(clients[0][0].params.layout.numel, dtype=torch.float64)
    kept = torch.cat([mask.to_bool(), torch.ones(total.numel() - mask.numel, dtype=torch.bool)])
    for client, samples in clients:
        values = client.params.values.detach()
        total += torch.where(kept, fs.ops.cast(values, dtype)[0].double(), 0.0) * samples
    return (total / sum(samples for _, samples in clients)).float()


@settings(max_examples=60)
@given(st.data())
def test_any_federation(data: st.DataObject) -> None:
    shapes = data.draw(SHAPES)
    frozen, counter = data.draw(st.booleans()), data.draw(st.booleans())
    model_dtype = DTYPES[data.draw(st.sampled_from(list(DTYPES)))]
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    coding = data.draw(st.sampled_from(["entropy", "raw"]))
    schedule = data.draw(SCHEDULES)
    count = data.draw(st.integers(1, 4))
    stream = data.draw(st.booleans())

    def made(dtype_of: torch.dtype) -> fs.FlatParameters:
        torch.manual_seed(1)
        return fs.flatten(Odd(shapes, frozen, counter).to(dtype_of))

    server = FedMapServer(
        made(model_dtype), schedule, dtype=dtype, coding=coding, min_updates=2, max_samples=99
    )
    clients = [FedMapClient(made(torch.float32), dtype=dtype, coding=coding) for _ in range(count)]
    eligible = server.layout.eligible
    before = server.mask
    for r in range(4):
        server.begin_round()
        assert server.mask <= before
        assert server.mask.nnz == min(before.nnz, schedule.keep(server.round, eligible))
        before = server.mask
        present = data.draw(st.sets(st.integers(0, count - 1)))
        silent = data.draw(st.sets(st.sampled_from(sorted(present) or [0])))
        answered = []
        updates = []
        for i in sorted(present):
            client = clients[i]
            client.receive(server.broadcast(client.have))
            assert client.params.mask == server.mask
            assert torch.equal(client.params.values.to(model_dtype), server.params.values)
            if i in silent:
                continue
            torch.manual_seed(10 * r + i)
            with torch.no_grad():
                for p in client.params.parameters:
                    p.add_(0.1 * torch.randn(p.shape))
            samples = data.draw(st.integers(1, 99))
            updates.append((i, client.update(samples)))
            answered.append((client, samples))
        values = server.params.values.clone()
        try:
            if stream:
                for i, update in updates:
                    assert server.add(i, update) is None
                result = server.close_round()
            else:
                result = server.aggregate(reversed(updates))
        except RoundFailed:
            assert len(updates) < 2
            assert torch.equal(server.params.values, values)
            server.abort_round()  # the round is tried again, under the same number
            before = server.mask
            continue
        assert result.accepted == tuple(i for i, _ in updates)
        assert result.refused == {}
        wanted = dense_mean(answered, server.mask, DTYPES[dtype])
        got = server.params.values
        assert torch.equal(got, fs.ops.cast(wanted, model_dtype)[0])
        assert (
            not got[: server.mask.numel][~server.mask.to_bool()]
            .view(torch.int32 if got.element_size() == 4 else torch.int16)
            .any()
        )
    again = FedMapServer(
        made(model_dtype), schedule, dtype=dtype, coding=coding, min_updates=2, max_samples=99
    )
    again.from_bytes(server.to_bytes())
    for s in (server, again):
        s.begin_round()
    assert again.broadcast() == server.broadcast()
