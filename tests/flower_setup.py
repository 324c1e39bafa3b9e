"""What the tests of Flower share: nodes, a small network, its batches."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

#: Node ids as Flower draws them: 64 bits, in no order of the partitions.
NODES = {2**63 + 7: 0, 12: 1, 2**40: 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 7))


def batch(*key: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(16, 20, generator=rng), torch.randint(7, (16,), generator=rng)
