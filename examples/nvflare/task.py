"""Model, data and local training of the NVFlare example; the server's and each client's options."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fedmap_sparse as fs
from fedmap_sparse.experiments import partition
from fedmap_sparse.experiments.data import load

CLIENTS, ROUNDS = 2, 4


def flat_model() -> fs.FlatParameters:
    torch.manual_seed(0)
    return fs.flatten(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    )


def make_server() -> fs.FedMapServer:
    schedule = fs.schedule.Iterative(target=0.9, start=1, end=3)
    return fs.FedMapServer(flat_model(), schedule, lr=0.05)


def make_client() -> fs.FedMapClient:
    return fs.FedMapClient(
        flat_model(), optimizer=lambda p, mask, lr: fs.optim.MaskedSGD(p, mask, lr=lr, momentum=0.9)
    )


def train(part, client, message):
    """One pass over this client's part of the data, seeded by part and round."""
    data = load("fashion-mnist-subset")
    own = torch.as_tensor(partition.iid(data.train.labels.numpy(), CLIENTS, seed=0)[part])
    rng = torch.Generator().manual_seed(1000 * message.round + part)
    for chosen in own[torch.randperm(len(own), generator=rng)].split(64):
        client.optimizer.zero_grad()
        loss = cross_entropy(
            client.params.module(data.train.images[chosen]), data.train.labels[chosen]
        )
        loss.backward()
        client.optimizer.step()
    return len(own), loss.item()
