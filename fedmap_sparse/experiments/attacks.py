"""Hostile clients for experiments: what they send instead of an honest update.

An attacker trains as the others do; then its model is changed, before the update is encoded. The
attackers are the clients with the last numbers: clients run in that order, so an attacker has seen
every honest update of the round, which is the strongest position there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.codec import Message
from fedmap_sparse.engines.in_process import generator
from fedmap_sparse.engines.workers import Train
from fedmap_sparse.experiments.data import Split
from fedmap_sparse.federated import ClientId, FedMapClient
from fedmap_sparse.federated.arrays import clear_gaps
from fedmap_sparse.federated.global_model import write_model

#: `(own, start, honest, noise) -> forged`: float32 vectors of survivors and tail. `own` is what the
#: attacker trained, `start` the broadcast, `honest` the updates that came before, `noise` standard
#: normal numbers.
Rule = Callable[[Tensor, Tensor, list[Tensor], Tensor], Tensor]


def sign(own: Tensor, start: Tensor, honest: list[Tensor], noise: Tensor) -> Tensor:
    """Ten times the opposite of the difference from the broadcast."""
    return start - 10 * (own - start)


def noise(own: Tensor, start: Tensor, honest: list[Tensor], noise: Tensor) -> Tensor:
    """Gaussian noise, 100 times as long as the own difference from the broadcast."""
    size = 100 * float((own - start).double().norm()) / max(1, own.numel()) ** 0.5
    return own.add(noise, alpha=size)


def constant(own: Tensor, start: Tensor, honest: list[Tensor], noise: Tensor) -> Tensor:
    """1 for every weight."""
    return torch.ones_like(own)


def little(own: Tensor, start: Tensor, honest: list[Tensor], noise: Tensor) -> Tensor:
    """1.5 standard deviations below the honest mean, in each coordinate: "a little is enough"
    (Baruch et al., arXiv 1902.06156), by an attacker who knows all honest updates."""
    seen = torch.stack(honest or [own])
    return seen.mean(0) - 1.5 * seen.std(0, correction=0)


def copy(own: Tensor, start: Tensor, honest: list[Tensor], noise: Tensor) -> Tensor:
    """The update of the first honest client once more: its data count more often (mimic,
    Karimireddy et al., arXiv 2006.09365)."""
    return honest[0] if honest else own


def unchanged(own: Tensor, start: Tensor, honest: list[Tensor], noise: Tensor) -> Tensor:
    """What was trained, on labels that `flipped` changed."""
    return own


#: By the option `attack`.
ATTACKS: dict[str, Rule] = {
    "sign": sign,
    "noise": noise,
    "constant": constant,
    "labels": unchanged,
    "little": little,
    "copy": copy,
}


class Attack:
    """Local training in which some clients are hostile.

    What is random depends on (seed, round, client) alone.

    Args:
        kind: one of `ATTACKS`.
        hostile: who attacks.
        train: the honest training.
        seed: of the run.
    """

    def __init__(self, kind: str, hostile: frozenset[ClientId], train: Train, seed: int) -> None:
        self._rule = ATTACKS[kind]
        self._hostile = hostile
        self._train = train
        self._seed = seed
        self._round = -1
        self._honest: dict[ClientId, Tensor] = {}

    def __call__(
        self, name: ClientId, client: FedMapClient, message: Message
    ) -> tuple[int, float | None]:
        """Train `client`; a hostile one's model is then what it wants the server to have."""
        if message.round != self._round:
            self._round = message.round
            self._honest.clear()
        found = self._train(name, client, message)
        params, mask = client.params, message.mask
        own = torch.cat([ops.pack(params.prunable.detach(), mask), params.tail]).float()
        if name not in self._hostile:
            self._honest[name] = own
            return found
        start = torch.cat([message.packed.float(), message.tail.float()])
        rng = generator(self._seed, 4, message.round, int(name))
        drawn = torch.from_numpy(rng.standard_normal(own.numel(), dtype="float32")).to(own.device)
        honest = [self._honest[other] for other in sorted(self._honest, key=int)]
        forged = self._rule(own, start, honest, drawn)
        tail = forged[mask.nnz :].clone()
        clear_gaps(tail, params.layout)
        write_model(params, mask, forged[: mask.nnz].contiguous(), tail)
        return found


def hostile_clients(clients: int, attackers: int) -> frozenset[ClientId]:
    """The last `attackers` of so many clients, numbered from 0."""
    return frozenset(range(clients - attackers, clients))


def flipped(
    samples: Mapping[ClientId, Split], hostile: frozenset[ClientId], classes: int
) -> dict[ClientId, Split]:
    """The samples with the labels of hostile clients counted from the other end."""
    return {
        name: Split(split.images, classes - 1 - split.labels) if name in hostile else split
        for name, split in samples.items()
    }
