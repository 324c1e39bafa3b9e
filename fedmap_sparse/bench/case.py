"""What a case is: how one op is run, checked, timed and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fedmap_sparse import _checks
from fedmap_sparse.bench import inputs
from fedmap_sparse.errors import FedMapError
from fedmap_sparse.mask import Mask

Run = Callable[[], object]
#: Of a whole round (`rounds.py`), in order.
PHASES = ("prune", "broadcast", "receive", "steps", "update", "aggregate")
CPU = torch.device("cpu")
#: Of what takes several vectors, unless another number is asked for.
CLIENTS = 10


class CheckFailed(FedMapError):
    """The op's result differs from the reference: it will not be timed."""


@dataclass(frozen=True)
class Setting:
    """What one record is measured at. `seed` tells the input sets of one setting apart.

    `clients` is how many vectors an op takes that takes several.
    """

    n: int
    density: float
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    inputs: str = "normal"
    seed: int = 0
    clients: int = CLIENTS

    @property
    def keep(self) -> int:
        return round(self.density * self.n)

    def values(self, seed: int = 0, n: int | None = None) -> Tensor:
        count = self.n if n is None else n
        drawn = inputs.values(self.inputs, count, dtype=self.dtype, seed=self.seed + seed)
        return drawn.to(self.device)

    def normal(self, n: int | None = None, seed: int = 0) -> Tensor:
        """What gradients are made of, whatever the values are."""
        drawn = inputs.values("normal", self.n if n is None else n, seed=1000 + self.seed + seed)
        return drawn.to(self.dtype).to(self.device)

    def mask(self, values: Tensor) -> Mask:
        """Of `density`; a run's weights have their own."""
        from fedmap_sparse import ops

        if self.inputs.startswith(inputs.RUN):
            return Mask.from_bool(values != 0)
        return ops.magnitude_mask(values, self.keep)


@dataclass(frozen=True)
class Peer:
    """What a user would run otherwise, with outputs, masks and indices made beforehand.

    `reset`, untimed, restores what an in-place peer destroys.
    """

    run: Run
    reset: Run | None = None


@dataclass(frozen=True)
class Trial:
    """One case at one setting, buffers made.

    Attributes:
        ours, peers: return their result, so that a test can compare them.
        check: compares `ours` on these very inputs with the reference; raises CheckFailed.
        nbytes: the least that must move through memory.
        floor: plain streams of those bytes; None: a device copy of as many.
        calls: calls per timing.
        state_bytes: of an optimizer, where there is one.
        sizes: bytes that each produces, by "ours" and the peers' names, where that is the point.
        clients: how many vectors it takes, where it takes several.
    """

    ours: Run
    check: Callable[[], None]
    nbytes: int
    floor: Callable[[], object]
    peers: dict[str, Peer] = field(default_factory=dict)
    calls: int = 1
    state_bytes: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    clients: int | None = None


@dataclass(frozen=True)
class Case:
    """One op: where it is measured by default, and how a trial of it is made.

    Attributes:
        group: a name for several cases: `--ops GROUP` means all of them.
        fixed_n, fixed_inputs: the size it always has and what it always runs on; None: any.
        peers_from: packages that some of its peers need.
    """

    op: str
    build: Callable[[Setting], Trial]
    densities: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...]
    group: str
    fixed_n: int | None = None
    fixed_inputs: str | None = None
    peers_from: tuple[str, ...] = ()


Build = TypeVar("Build", bound=Callable[..., Trial])

REGISTRY: dict[str, Case] = {}


def case(
    op: str,
    *,
    densities: Sequence[float],
    dtypes: Sequence[torch.dtype] = _checks.FLOAT_DTYPES,
    devices: Sequence[str] = ("cpu", "cuda"),
    group: str | None = None,
    fixed_n: int | None = None,
    fixed_inputs: str | None = None,
    peers_from: tuple[str, ...] = (),
) -> Callable[[Build], Build]:
    """Register the function below as the case of `op`."""

    def register(build: Build) -> Build:
        REGISTRY[op] = Case(
            op,
            build,
            tuple(densities),
            tuple(dtypes),
            tuple(devices),
            group or op,
            fixed_n,
            fixed_inputs,
            peers_from,
        )
        return build

    return register


def same(what: str, got: Tensor, expected: Tensor) -> None:
    """Raise CheckFailed unless the two agree in every bit."""
    if got.dtype != expected.dtype or got.numel() != expected.numel():
        raise CheckFailed(
            f"{what}: expected {expected.numel()} {_checks.short(expected.dtype)}, "
            f"got {got.numel()} {_checks.short(got.dtype)}"
        )
    a, b = got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
    if not torch.equal(a, b):
        size = got.element_size()
        different = (a != b).view(-1, size).any(1)
        first = int(different.nonzero()[0])
        raise CheckFailed(
            f"{what}: {int(different.sum())} of {got.numel()} elements differ from the reference, "
            f"first at {first}: expected {expected.reshape(-1)[first].item()}, "
            f"got {got.reshape(-1)[first].item()}"
        )


def same_mask(what: str, got: Mask, expected: Mask) -> None:
    same(f"{what}.words", got.words, expected.words)
    same(f"{what}.rank", got.rank, expected.rank)
    if got.nnz != expected.nnz:
        raise CheckFailed(f"{what}.nnz: expected {expected.nnz}, got {got.nnz}")
