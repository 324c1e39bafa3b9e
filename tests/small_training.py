"""A small model, one training step of it, and the comparison of two of them."""

import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def train(m, o, seed):
    o.zero_grad()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    m(x).sub(1).square().mean().backward()
    o.step()


def same(m, twin, **tolerance):
    for p, q in zip(m.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)
