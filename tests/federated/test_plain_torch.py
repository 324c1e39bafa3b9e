"""Five rounds of FedMap in plain torch, with Boolean masks and state dicts and no code of ours,
beside the package: weights, buffers and masks bit for bit."""

from fractions import Fraction

import pytest
import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedAdamW, MaskedSGD

ROUNDS, CLIENTS, STEPS, TARGET = 5, 4, 3, "0.85"
LR, MOMENTUM, DAMPENING, DECAY = 0.05, 0.9, 0.25, 0.01
BETA1, BETA2, EPS = 0.85, 0.98, 1e-6
SAMPLES = [7, 3, 11, 5]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 25, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def start() -> nn.Module:
    torch.manual_seed(11)
    return net()


def batch(round: int, client: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1000 * round + 10 * client + step)
    return torch.randn(8, 1, 7, 7, generator=g), torch.randint(10, (8,), generator=g)


def gradients(model: nn.Module, round: int, client: int, step: int) -> None:
    model.train()
    model.zero_grad()
    x, y = batch(round, client, step)
    nn.functional.cross_entropy(model(x), y).backward()


def participates(round: int, client: int) -> bool:
    return (round + client) % 3 != 0


def keep_count(round: int, eligible: int) -> int:
    """Cubic from round 1 to 3, in exact fractions."""
    if round < 1:
        return eligible
    left = max(Fraction(3 - round, 2), Fraction(0))
    return eligible - round_half_even(Fraction(TARGET) * (1 - left**3) * eligible)


def round_half_even(value: Fraction) -> int:
    return round(value)


def f32(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def sgd(p, g, state, step):
    g = g + f32(DECAY) * p
    momentum = f32(MOMENTUM)
    buffer = momentum * state["m"] + f32(1 - DAMPENING) * g if "m" in state else g
    state["m"] = buffer
    return p - f32(LR) * buffer


def adamw(p, g, state, step):
    p = p * f32(1 - LR * DECAY)
    zero = torch.zeros_like(p)
    m, v = state.get("m", zero), state.get("v", zero)
    m = m + (g - m) * f32(1 - BETA1)
    v = v * f32(BETA2) + (f32(1 - BETA2) * g) * g
    state["m"], state["v"] = m, v
    power1 = power2 = 1.0
    for _ in range(step + 1):
        power1, power2 = power1 * BETA1, power2 * BETA2
    root = v.double().sqrt().float() / f32((1 - power2) ** 0.5)
    return p - f32(LR / (1 - power1)) * (m / (root + f32(EPS)))


def plain_fedmap(update):
    """State dicts of every round after aggregation, and the masks."""
    model = start()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in weights.items() if p.ndim >= 2}
    eligible = sum(m.numel() for m in masks.values())
    history = []
    for r in range(ROUNDS):
        keep = keep_count(r, eligible)
        if keep < sum(int(m.sum()) for m in masks.values()):
            size = torch.cat([weights[n].abs().flatten() for n in masks])
            alive = torch.cat([m.flatten() for m in masks.values()])
            order = torch.where(alive, size, -1.0).sort(descending=True, stable=True).indices
            chosen = torch.zeros_like(alive)
            chosen[order[:keep]] = True
            parts = chosen.split([m.numel() for m in masks.values()])
            masks = {n: c.view_as(m) for (n, m), c in zip(masks.items(), parts, strict=True)}
            weights = {
                n: torch.where(masks[n], w, 0.0) if n in masks else w for n, w in weights.items()
            }
        total, sums, seen = 0.0, {}, {}
        for c in filter(lambda c: participates(r, c), range(CLIENTS)):
            local = net()
            local.load_state_dict({**weights, **buffers})
            states = {n: {} for n in weights}
            for s in range(STEPS):
                gradients(local, r, c, s)
                with torch.no_grad():
                    for n, p in local.named_parameters():
                        fresh = update(p.detach(), p.grad, states[n], s)
                        p.copy_(torch.where(masks[n], fresh, 0.0) if n in masks else fresh)
            total += SAMPLES[c]
            for n, t in local.state_dict().items():
                if t.is_floating_point():
                    product = t.double() * SAMPLES[c]
                    sums[n] = sums.get(n, torch.zeros_like(product)) + product
                else:
                    seen[n] = torch.maximum(seen.get(n, t), t)
        mean = {n: (s / total).float() for n, s in sums.items()}
        weights = {n: mean[n] for n in weights}
        buffers = {n: seen[n] if n in seen else mean[n] for n in buffers}
        history.append(({**weights, **buffers}, masks))
    return history


def our_fedmap(make_optimizer):
    server = fs.FedMapServer(fs.flatten(start()), fs.schedule.Cubic(float(TARGET), 1, 3))
    clients = [fs.FedMapClient(fs.flatten(net()), optimizer=make_optimizer) for _ in range(CLIENTS)]
    history = []
    for r in range(ROUNDS):
        server.begin_round()
        updates = []
        for c in filter(lambda c: participates(r, c), range(CLIENTS)):
            client = clients[c]
            client.receive(server.broadcast(client.have))
            for s in range(STEPS):
                gradients(client.params.module, r, c, s)
                client.optimizer.step()
            updates.append((c, client.update(SAMPLES[c])))
        server.aggregate(reversed(updates))
        masks = server.layout.mask_dict(server.mask)
        history.append((server.params.to_state_dict(), masks))
    return history


def integers(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.int32) if t.is_floating_point() else t


@pytest.mark.parametrize(
    ("update", "optimizer"),
    [
        (
            sgd,
            lambda p, m, lr: MaskedSGD(
                p, m, lr=LR, momentum=MOMENTUM, dampening=DAMPENING, weight_decay=DECAY
            ),
        ),
        (
            adamw,
            lambda p, m, lr: MaskedAdamW(
                p, m, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY
            ),
        ),
    ],
    ids=["sgd", "adamw"],
)
def test_five_rounds_equal_plain_torch_bit_for_bit(update, optimizer):
    plain, ours = plain_fedmap(update), our_fedmap(optimizer)
    counts = []
    for (weights, masks), (our_weights, our_masks) in zip(plain, ours, strict=True):
        assert masks.keys() == our_masks.keys()
        for name, mask in masks.items():
            assert torch.equal(mask, our_masks[name]), name
        for name, t in our_weights.items():
            assert torch.equal(integers(t), integers(weights[name])), name
        counts.append(sum(int(m.sum()) for m in masks.values()))
    eligible = counts[0]
    assert counts[-1] == eligible - round(Fraction(TARGET) * eligible)
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 3
