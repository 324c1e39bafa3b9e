"""Top-k of the update: nothing is lost but for later, and all hold the server's model."""

import pytest
import torch
from experiment_runs import StopAfter, quick, records, timeless
from torch import nn

from fedmap_sparse import codec, flatten
from fedmap_sparse.errors import FormatError
from fedmap_sparse.experiments import runner
from fedmap_sparse.experiments.topk import TopKClient, TopKServer

pytest.importorskip("safetensors", reason="safetensors is not installed")

SHARE = 0.05


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 10), nn.ReLU(), nn.Linear(10, 4))


def federation(clients: int = 2) -> tuple[TopKServer, list[TopKClient]]:
    server = TopKServer(flatten(model()), SHARE)
    return server, [TopKClient(flatten(model()), SHARE) for _ in range(clients)]


def learn(client: TopKClient, seed: int) -> torch.Tensor:
    """What a client's weights moved by."""
    torch.manual_seed(seed)
    change = torch.randn(client.layout.prunable_numel) * 0.1
    change *= client.layout.initial_mask().to_bool()
    with torch.no_grad():
        client.params.prunable.add_(change)
    return change


def test_an_update_is_the_largest_share_and_the_rest_follows() -> None:
    server, (client, _) = federation()
    server.begin_round()
    client.receive(server.broadcast(client.have))
    known = client.params.prunable.detach().clone()
    learn(client, 1)
    data = client.update(10)
    assert data == client.update(10)
    message = codec.decode(data, client.layout)
    wanted = client.params.prunable.detach() - known
    assert message.mask.nnz == 22  # 5% of 440
    largest = wanted.abs().sort(descending=True).values[:22]
    assert message.packed.abs().unique() == pytest.approx(float(largest.mean()), rel=1e-5)
    server.aggregate([(0, data)])
    server.begin_round()
    client.receive(server.broadcast(client.have))
    again = codec.decode(client.update(10), client.layout)
    left = wanted - message.dense()
    kept = again.mask.to_bool()
    assert torch.equal(kept, left.abs() >= left.abs().sort(descending=True).values[21])


def test_everyone_holds_the_servers_model_by_steps_or_whole() -> None:
    server, clients = federation(3)
    sizes = []
    for round in range(4):
        server.begin_round()
        updates = []
        for k, client in enumerate(clients):
            if k == 2 and round == 1:
                continue  # misses a round, so that no step fits it
            data = server.broadcast(client.have)
            client.receive(data)
            sizes.append((round, k, len(data)))
            assert torch.equal(client.params.values, server.params.values)
            learn(client, 10 * round + k)
            updates.append((k, client.update(10 + k)))
        server.aggregate(updates)
    size = {(round, k): n for round, k, n in sizes}
    assert size[1, 0] < size[0, 0] / 2
    assert size[2, 2] == size[0, 2]
    assert size[3, 2] < size[0, 2] / 2


def test_what_the_server_leaves_out_comes_later() -> None:
    server, (client, _) = federation()
    start = server.params.prunable.detach().clone()
    server.begin_round()
    client.receive(server.broadcast(client.have))
    learn(client, 3)
    client.share = 1.0  # everything, so that the server alone leaves out
    data = client.update(10)
    came = codec.decode(data, client.layout).dense()
    server.aggregate([(0, data)])
    moved = server.params.prunable.detach() - start
    assert int((moved != 0).sum()) == 22
    left = server._residual.clone()
    assert torch.allclose(left + moved, came, atol=1e-6)
    server.begin_round()
    client.receive(server.broadcast(client.have))
    client._left_out.zero_()  # nothing new comes, so that the step is of what was left out
    before = server.params.prunable.detach().clone()
    server.aggregate([(0, client.update(10))])
    chosen = server.params.prunable.detach() != before
    assert int(chosen.sum()) == 22
    assert left[chosen].abs().min() >= left[~chosen].abs().max()


def test_a_step_from_another_model_is_refused() -> None:
    server, (client, late) = federation()
    server.begin_round()
    client.receive(server.broadcast(client.have))
    server.aggregate([(0, client.update(1))])
    server.begin_round()
    step = server.broadcast(client.have)
    with pytest.raises(FormatError, match="got a step from one that is not here"):
        late.receive(step)


def test_a_run_sends_less_and_resumes_to_the_same_bits(tmp_path):  # type: ignore[no-untyped-def]
    options = {"method": "stc", "update_density": 0.05, "dropout": 0.2, "participation": 0.5}
    whole, parts = (quick(tmp_path / name, **options) for name in ("whole", "parts"))
    runner.run(whole)
    with pytest.raises(KeyboardInterrupt):
        runner.run(parts, observer=StopAfter(2))
    runner.run(parts, resume=True)
    assert timeless(whole.folder) == timeless(parts.folder)
    found = records(whole.folder)
    stc, dense = ([r for r in found if r["arm"] == arm] for arm in ("stc", "dense"))
    assert all(a["uplink_bytes"] < b["uplink_bytes"] / 5 for a, b in zip(stc, dense))
    assert all(r["density"] == 1 for r in stc)
