"""Model, data and local training; the server's and a client's options."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fedmap_sparse as fs
from fedmap_sparse.experiments import partition
from fedmap_sparse.experiments.data import load

torch.set_num_threads(1)  # the nodes of a simulation share the cores


def flat_model() -> fs.FlatParameters:
    torch.manual_seed(0)
    return fs.flatten(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    )


def make_server(clients: int) -> fs.FedMapServer:
    schedule = fs.schedule.Iterative(target=0.9, start=1, end=3)
    return fs.FedMapServer(flat_model(), schedule, lr=0.05, min_updates=clients)


def make_client(dtype: str = "float32") -> fs.FedMapClient:
    return fs.FedMapClient(
        flat_model(),
        optimizer=lambda p, mask, lr: fs.optim.MaskedSGD(p, mask, lr=lr, momentum=0.9),
        dtype=dtype,
    )


def part_of(images, part: int, clients: int) -> torch.Tensor:
    return torch.as_tensor(partition.iid(images.labels.numpy(), clients, seed=0)[part])


def train(part: int, clients: int, client: fs.FedMapClient, message) -> tuple[int, float]:
    """One pass over this client's part of the data, seeded by part and round."""
    data = load("fashion-mnist-subset")
    own = part_of(data.train, part, clients)
    rng = torch.Generator().manual_seed(1000 * message.round + part)
    for chosen in own[torch.randperm(len(own), generator=rng)].split(64):
        client.optimizer.zero_grad()
        loss = cross_entropy(
            client.params.module(data.train.images[chosen]), data.train.labels[chosen]
        )
        loss.backward()
        client.optimizer.step()
    return len(own), loss.item()


@torch.no_grad()
def evaluate(part: int, clients: int, client: fs.FedMapClient) -> tuple[int, dict[str, float]]:
    data = load("fashion-mnist-subset")
    own = part_of(data.validation, part, clients)
    found = client.params.module(data.validation.images[own]).argmax(1)
    return len(own), {"accuracy": (found == data.validation.labels[own]).float().mean().item()}
