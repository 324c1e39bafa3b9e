"""A federation in one file: a server and three clients that exchange bytes and nothing else.

The package knows nothing of the transport: it makes `bytes` and takes `bytes`. Pipes stand here for
whatever you have: gRPC, HTTP, MPI. Run it: `python examples/federation.py` (a few seconds).
"""

import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fedmap_sparse as fs

ROUNDS, CLIENTS, SAMPLES = 6, 3, 200


def network() -> nn.Module:
    torch.manual_seed(0)  # only so that a run can be repeated: weights travel with each broadcast
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))


def samples(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(SAMPLES, 20, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :4].argmax(1)


def run_client(number: int, server: Connection) -> None:
    model = network()
    client = fs.FedMapClient(
        fs.flatten(model),
        optimizer=lambda params, mask, lr: fs.optim.MaskedSGD(params, mask, lr=lr, momentum=0.9),
        dtype="bfloat16",  # of the values that travel; training stays in float32
    )
    x, y = samples(number)
    for _ in range(ROUNDS):
        server.send_bytes(client.have or b"")  # which mask this client holds
        client.receive(server.recv_bytes())
        for batch in torch.arange(SAMPLES).split(20):
            client.optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            client.optimizer.step()
        server.send_bytes(client.update(num_samples=SAMPLES))


def main() -> None:
    model = network()
    schedule = fs.schedule.Iterative(target=0.8, start=1, end=4)
    server = fs.FedMapServer(fs.flatten(model), schedule, lr=0.1)
    pairs = [Pipe() for _ in range(CLIENTS)]
    threads = [
        threading.Thread(target=run_client, args=(number, theirs))
        for number, (_, theirs) in enumerate(pairs)
    ]
    for thread in threads:
        thread.start()
    for number in range(ROUNDS):
        server.begin_round()  # prunes where the schedule says so
        for ours, _ in pairs:
            ours.send_bytes(server.broadcast(ours.recv_bytes() or None))
        result = server.aggregate([(i, ours.recv_bytes()) for i, (ours, _) in enumerate(pairs)])
        left, of = server.mask.nnz, server.layout.eligible
        print(f"round {number}: {left:,} of {of:,} weights, {result.uplink_bytes:,} bytes up")
    for thread in threads:
        thread.join()
    x, y = samples(CLIENTS)
    print(f"accuracy on new samples: {(model(x).argmax(1) == y).float().mean():.1%}")


if __name__ == "__main__":
    main()
