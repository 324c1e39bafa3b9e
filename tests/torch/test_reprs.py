"""What the objects of a round print: one line that a reader can use."""

from torch import nn

import fedmap_sparse as fs


def test_one_readable_line():
    server = fs.FedMapServer(fs.flatten(nn.Linear(8, 8)), fs.schedule.OneShot(0.5, at=0))
    client = fs.FedMapClient(fs.flatten(nn.Linear(8, 8)), dtype="bfloat16")
    assert repr(server) == "FedMapServer(round 0, idle, epoch 0, 64 of 64 weights, float32)"
    assert repr(client) == "FedMapClient(no mask yet of 64, bfloat16)"
    server.begin_round()
    assert repr(server) == "FedMapServer(round 0, open, epoch 1, 32 of 64 weights, float32)"
    got = client.receive(server.broadcast(client.have))
    assert repr(got) == "Message(broadcast, round 0, epoch 1, 32 of 64 weights, float32, 0 samples)"
    assert repr(client) == "FedMapClient(32 weights of 64, bfloat16)"
    update = fs.decode(client.update(5), server.layout, mask=server.mask)
    assert (
        repr(update) == "Message(update, round 0, epoch 1, 32 of 64 weights, bfloat16, 5 samples)"
    )
    for thing in (server, client, update, fs.ops.Accumulator(5), server.params, server.mask):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 120
