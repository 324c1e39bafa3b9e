"""Differential privacy of clients in packed space: clip, add Gaussian noise, account.

What one client sends is clipped to a norm, as its difference from the broadcast, and noise is added
to survivors and tail: `density * n` numbers instead of n, so the noise of a pruned model is shorter
by sqrt(density) at the same epsilon. Pruned weights stay +0.0: which they are follows from the
noised model alone, so the mask tells nothing more (post-processing).

Central: `FedMapServer(privacy=Gaussian(...))`, where the server sees each update and the model is
what is protected. Local: `Gaussian.privatize_` on each client, before `update` or `update_array`,
where the server need not be trusted. `epsilon` says what either is worth.

Not protected: the losses and numbers of samples that updates report, who took part, buffers (the
server keeps its own: batch norm's statistics would be a second, unprotected message), and what the
floating-point numbers' own spacing tells (Mironov 2012). The generator is no cryptographic one.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.codec import Message
from fedmap_sparse.federated.arrays import clear_gaps
from fedmap_sparse.federated.global_model import write_model
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.layout import FlatLayout


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian mechanism on clipped differences.

    Args:
        max_norm: L2 norm that a difference from the broadcast is clipped to.
        noise: standard deviation of the noise on the sum of the differences, in units of
            `max_norm`.
        seed: of the generator, 0 <= seed < 2^63. None: drawn from the system's randomness. The
            noise of a round depends on the seed and the round alone, so a seed that others know
            protects nothing, and a round that is played twice has to have another seed.

    >>> import torch, fedmap_sparse as fs
    >>> params = fs.flatten(torch.nn.Linear(20, 5))
    >>> server = fs.FedMapServer(params, fs.schedule.Dense(), privacy=Gaussian(0.5, noise=1.0))
    """

    max_norm: float
    noise: float
    seed: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < math.inf:
            raise ValueError(f"max_norm: expected a finite number above 0, got {self.max_norm}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise: expected a finite number of at least 0, got {self.noise}")
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(63))
        elif not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed: expected 0 <= seed < 2^63, got {self.seed}")

    def clip_(self, vector: Tensor, start: Tensor) -> float:
        """Cut `vector - start` to `max_norm`, in place; its norm before."""
        return ops.clip_difference_(vector, start, self.max_norm)

    def add_noise_(self, mean: Tensor, layout: FlatLayout, updates: int, stream: int) -> None:
        """Add the noise of a sum to a mean of `updates` clipped vectors, in place.

        Args:
            mean: float32, survivors and tail.
            stream: tells the noises of one seed apart: 0 <= stream < 2^63.
        """
        assert self.seed is not None
        std = self.noise * self.max_norm / updates
        ops.add_gaussian_(mean, std, seed=self.seed, stream=stream)
        if layout.tail_numel:
            clear_gaps(mean[mean.numel() - layout.tail_numel :], layout)

    def privatize_(self, params: FlatParameters, received: Message, client: int = 0) -> float:
        """The local form: clip what was trained and add the noise of one update, in place.

        Args:
            params: the client's; trained from `received`.
            received: the broadcast.
            client: tells clients that share a seed apart: 0 <= client < 2^31.

        Returns:
            The norm of the difference before it was clipped.

        Raises:
            ValueError: weights that are not finite; nothing is changed.
        """
        mask = received.mask
        start = torch.cat([received.packed.float(), received.tail.float()])
        packed = ops.pack(params.prunable.detach(), mask).float()
        vector = torch.cat([packed, params.tail.detach().float()])
        norm = self.clip_(vector, start)
        self.add_noise_(vector, params.layout, 1, received.round << 31 | client)
        write_model(params, mask, vector[: mask.nnz].contiguous(), vector[mask.nnz :].contiguous())
        return norm


#: Renyi orders with sampling: by all of the library's own a figure takes a second, not a tenth,
#: and differs where epsilon is below 0.5 alone.
SAMPLED_ORDERS = (*range(2, 17), 18, 20, 24, 28, 32, 40, 48, 64)


@lru_cache(maxsize=4096)
def epsilon(
    noise: float,
    rounds: int,
    *,
    delta: float,
    clients: int,
    cohort: int | None = None,
    local: bool = False,
) -> float:
    """What so many rounds of `Gaussian` give away: (epsilon, `delta`)-privacy of one client.

    Neighbours are federations of as many clients in which one client's data are replaced by any
    others. One client then moves the sum of clipped differences by up to `2 * max_norm`, so the
    noise counts half: a figure for clients that are added or left out is about half of this one.

    Args:
        noise: as of `Gaussian`.
        rounds: how many ended.
        delta: 0 < delta < 1, well below 1 / clients.
        clients: of the federation.
        cohort: clients per round. They must be drawn uniformly, without replacement, anew in each
            round, as `InProcessEngine` does. Nobody who sees the models may know who was drawn.
            Whether a client drops out must not depend on its data. None: all clients; nothing is
            assumed.
        local: each client adds its noise to its own update, and is in every round: no sampling
            helps against a server that sees who answers.

    Returns:
        By Renyi accounting (`dp_accounting.rdp`); infinity without noise.

    Raises:
        ImportError: dp-accounting is not installed (the extra `privacy`).
        ValueError: numbers out of range.
    """
    size = clients if cohort is None or local else cohort
    if not 0 <= noise < math.inf or not 0 < delta < 1 or rounds < 0:
        raise ValueError(
            "expected noise >= 0, 0 < delta < 1 and rounds >= 0, got "
            f"noise={noise}, delta={delta}, rounds={rounds}"
        )
    if not 1 <= size <= clients:
        raise ValueError(f"cohort: expected 1 to {clients} clients, got {size}")
    if not rounds:
        return 0.0
    if not noise:
        return math.inf
    from dp_accounting import dp_event, privacy_accountant, rdp

    event: dp_event.DpEvent = dp_event.GaussianDpEvent(noise / 2)
    orders = None
    if size < clients:
        event = dp_event.SampledWithoutReplacementDpEvent(clients, size, event)
        orders = SAMPLED_ORDERS
    accountant = rdp.RdpAccountant(
        orders, neighboring_relation=privacy_accountant.NeighboringRelation.REPLACE_ONE
    )
    return float(accountant.compose(event, rounds).get_epsilon(delta))
