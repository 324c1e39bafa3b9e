"""Models of the tests of layouts and flat parameters."""

import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 5))
