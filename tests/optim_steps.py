"""A small model, its training steps and the state of its optimizer, for the tests of optimizers."""

import torch
from torch import nn

import fedmap_sparse as fs


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 6))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 9, generator=g), torch.randint(6, (16,), generator=g)
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(x.to(dtype)).float(), y)


def train(model, optimizer, seed, closure=False):
    optimizer.zero_grad()
    if closure:

        def evaluate():
            loss = loss_of(model, seed)
            loss.backward()
            return loss

        return optimizer.step(evaluate)
    loss_of(model, seed).backward()
    optimizer.step()
    return None


def saved_state(optimizer, name):
    """What `state_dict` has of one kind, per parameter in the layout's order, or None."""
    saved = optimizer.state_dict()["state"]
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    numbers = [order.index(id(p)) for p in optimizer.flat.parameters]
    return [saved.get(n, {}).get(name) for n in numbers]


def dense_state(optimizer, name):
    """Packed state as one tensor per parameter."""
    dense = []
    masks = saved_state(optimizer, "mask")
    entries = optimizer.flat.layout.entries
    for e, words, t in zip(entries, masks, saved_state(optimizer, name), strict=True):
        if t is not None and t.shape != e.shape:
            t = fs.ops.unpack(t.flatten(), fs.Mask.from_words(words, e.numel)).view(e.shape)
        dense.append(t)
    return dense
