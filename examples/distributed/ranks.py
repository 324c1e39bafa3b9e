"""FedMap across processes.

    torchrun --standalone --nproc-per-node 2 examples/distributed/ranks.py

Rank 0 has the server; the ranks share out ten clients. The model is the same, bit for bit, at any
number of ranks (try 1 and 4). Over two machines: torchrun's `--nnodes` and `--rdzv-endpoint`.
"""

import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

import fedmap_sparse as fs
from fedmap_sparse.engines.ranks import RanksEngine
from fedmap_sparse.experiments import partition
from fedmap_sparse.experiments.data import load

CLIENTS, ROUNDS = 10, 6
torch.set_num_threads(1)  # the ranks share the cores
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
data = load("fashion-mnist-subset")
parts = partition.iid(data.train.labels.numpy(), CLIENTS, seed=0)


def flat_model() -> fs.FlatParameters:
    torch.manual_seed(0)
    return fs.flatten(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    )


def train(name, client, message):
    """One epoch on this client's part, seeded by round and client."""
    rng = torch.Generator().manual_seed(1000 * message.round + name)
    part = torch.as_tensor(parts[name])
    for chosen in part[torch.randperm(len(part), generator=rng)].split(64):
        client.optimizer.zero_grad()
        loss = cross_entropy(
            client.params.module(data.train.images[chosen]), data.train.labels[chosen]
        )
        loss.backward()
        client.optimizer.step()
    return len(part), loss.item()


shared = flat_model()  # the clients of a rank share one model: their weights come each round
clients = {
    name: fs.FedMapClient(
        shared, optimizer=lambda p, mask, lr: fs.optim.MaskedSGD(p, mask, lr=lr, momentum=0.9)
    )
    for name in range(rank, CLIENTS, world)
}
server = None
if rank == 0:
    schedule = fs.schedule.Iterative(target=0.9, start=1, end=4)
    server = fs.FedMapServer(flat_model(), schedule, lr=0.05)
engine = RanksEngine(server, clients, train)

for _ in range(ROUNDS):
    done = engine.round()
    if server is not None:
        print(
            f"round {done.result.round}: density {server.params.density:.2f}, loss "
            f"{done.result.loss:.3f}, {done.downlink_bytes:,} bytes down, {done.uplink_bytes:,} up"
        )

if server is not None:
    digest = hashlib.blake2b(server.params.values.numpy().tobytes(), digest_size=8).hexdigest()
    print(f"model {digest} from {world} ranks")
dist.destroy_process_group()
