"""Whole rounds: prune, send, receive, step, answer, aggregate; ours and the ways people write them.

Every arm holds one global model and one client module that ten clients use in turn, as a
simulation does. Nothing is trained: gradients are drawn once, so that what is timed is everything
but forward and backward, and those are timed beside it.
"""

from __future__ import annotations

import copy
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fedmap_sparse as fs
from fedmap_sparse.bench import memory, models
from fedmap_sparse.bench.case import PHASES, CheckFailed, Setting
from fedmap_sparse.bench.runner import Record, Refused
from fedmap_sparse.bench.steps import SGD
from fedmap_sparse.bench.timing import quantile
from fedmap_sparse.engines.phases import Phases

#: A round prunes a fifth of the weights that are left, as a schedule of ten or so rounds does.
PRUNED = 0.2
State = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """How large a round is: `steps` optimizer steps on each of `clients` clients."""

    clients: int = 10
    steps: int = 5

    def lr(self, client: int) -> float:
        """Each client's own, so that their updates differ."""
        return float(SGD["lr"]) * (1 + client / self.clients)


class Arm(ABC):
    """One way to write a round."""

    name: str

    def __init__(self, model: nn.Module, grads: State, before: int, keep: int, size: Size) -> None:
        self.size = size
        self.keep = keep
        self.grads = grads
        self.start = dict(model.named_parameters())

    @abstractmethod
    def reset(self) -> None:
        """Go back to the model before the round. Not timed."""

    @abstractmethod
    def round(self, phases: Phases) -> int:
        """One round; the bytes that travelled."""

    @abstractmethod
    def weights(self) -> State:
        """The global model."""

    def give_grads(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p.grad = self.grads[name].clone()


class Packed(Arm):
    """This package: a mask that both sides know, survivors alone."""

    name = "fedmap_sparse"

    def __init__(self, model: nn.Module, grads: State, before: int, keep: int, size: Size) -> None:
        super().__init__(model, grads, before, keep, size)
        flat = fs.flatten(copy.deepcopy(model))
        flat.mask = fs.ops.prune_(flat.prunable, before, within=flat.mask)
        self.server = fs.FedMapServer(flat, _Fixed(keep))
        self.module = fs.flatten(copy.deepcopy(model))
        self.give_grads(self.module.module)
        self._saved = self.server.state_dict()

    def reset(self) -> None:
        self.server.load_state_dict(self._saved)
        self.clients = {
            c: fs.FedMapClient(self.module, optimizer=self._optimizer(c))
            for c in range(self.size.clients)
        }
        # Clients of an earlier round: they hold the mask before this one.
        earlier = self.server.snapshot()
        for client in self.clients.values():
            client.receive(earlier)

    def _optimizer(self, client: int) -> Callable[..., fs.optim.MaskedSGD]:
        options = {**SGD, "lr": self.size.lr(client)}
        return lambda params, mask, lr: fs.optim.MaskedSGD(params, mask, **options)

    def round(self, phases: Phases) -> int:
        server, moved = self.server, 0
        with phases("prune"):
            server.begin_round()
        updates = []
        for c, client in self.clients.items():
            with phases("broadcast"):
                message = server.broadcast(client.have)
            with phases("receive"):
                client.receive(message)
            with phases("steps"):
                for _ in range(self.size.steps):
                    client.optimizer.step()  # type: ignore[union-attr]  # made by receive
            with phases("update"):
                updates.append((c, client.update(num_samples=1)))
            moved += len(message) + len(updates[-1][1])
        with phases("aggregate"):
            server.aggregate(updates)
        return moved

    def weights(self) -> State:
        return {name: p.detach() for name, p in self.server.params.module.named_parameters()}


class Dense(Arm):
    """Boolean masks beside the model, masked gradients, a mean over state dicts."""

    def __init__(self, model: nn.Module, grads: State, before: int, keep: int, size: Size) -> None:
        super().__init__(model, grads, before, keep, size)
        layout = fs.flatten(copy.deepcopy(model)).layout
        self.prunable = [e.name for e in layout.prunable_entries]
        self.server, self.client = copy.deepcopy(model), copy.deepcopy(model)
        self._prune(before)
        self._saved = copy.deepcopy(self.server.state_dict())

    def _prune(self, keep: int) -> None:
        parameters = dict(self.server.named_parameters())
        chosen = [parameters[name].detach() for name in self.prunable]
        scores = torch.cat([p.abs().view(-1) for p in chosen])
        threshold = torch.topk(scores, keep, sorted=False).values.min()
        for p in chosen:
            p.mul_(p.abs() >= threshold)

    def reset(self) -> None:
        self.server.load_state_dict(self._saved)
        self.give_grads(self.client)

    def round(self, phases: Phases) -> int:
        moved, updates = 0, []
        with phases("prune"):
            self._prune(self.keep)
        with phases("broadcast"):
            message = self.pack(self.server)
        for c in range(self.size.clients):
            with phases("receive"):
                self.client.load_state_dict(self.unpack(message))
                parameters = dict(self.client.named_parameters())
                weights = [parameters[name].detach() for name in self.prunable]
                masks = [w != 0 for w in weights]
            with phases("steps"):
                options = {**SGD, "lr": self.size.lr(c)}
                step = torch.optim.SGD(self.client.parameters(), fused=True, **options).step
                grads = [parameters[name].grad for name in self.prunable]
                for _ in range(self.size.steps):
                    for grad, mask in zip(grads, masks, strict=True):
                        grad.mul_(mask)  # type: ignore[union-attr]  # given by `reset`
                    step()
                    for weight, mask in zip(weights, masks, strict=True):
                        weight.mul_(mask)
            with phases("update"):
                updates.append(self.pack(self.client))
            moved += len(message) + len(updates[-1])
        with phases("aggregate"):
            self.server.load_state_dict(self.mean(updates))
        return moved

    @abstractmethod
    def pack(self, module: nn.Module) -> bytes:
        """A module's state as bytes."""

    @abstractmethod
    def unpack(self, data: bytes) -> State:
        """The state dict again."""

    @abstractmethod
    def mean(self, updates: list[bytes]) -> State:
        """Of the clients' states."""

    def weights(self) -> State:
        return {name: p.detach() for name, p in self.server.named_parameters()}


class BooleanMasks(Dense):
    """State dicts by `torch.save`."""

    name = "Boolean masks, torch.save"

    def pack(self, module: nn.Module) -> bytes:
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        return buffer.getvalue()

    def unpack(self, data: bytes) -> State:
        found: State = torch.load(io.BytesIO(data), weights_only=True)
        return found

    def mean(self, updates: list[bytes]) -> State:
        states = [self.unpack(data) for data in updates]
        share = 1 / len(states)
        return {
            key: sum(state[key] * share for state in states).to(first.dtype)  # type: ignore[union-attr]  # sum's 0
            for key, first in states[0].items()
        }


class FlowerArrays(Dense):
    """One `.npy` per array, and a mean over lists of arrays: what Flower's FedAvg does.

    As `flwr.common.ndarrays_to_parameters` and `flwr.server.strategy.aggregate` of Flower 1.x have
    it; tests compare the bytes with theirs.
    """

    name = "Boolean masks, Flower FedAvg"

    def pack(self, module: nn.Module) -> bytes:
        return b"".join(map(array_bytes, self._arrays(module)))

    @staticmethod
    def _arrays(module: nn.Module) -> list[Any]:
        return [t.numpy() for t in module.state_dict().values()]

    def unpack(self, data: bytes) -> State:
        stream = io.BytesIO(data)
        names = self.client.state_dict()
        return {name: torch.from_numpy(np.load(stream, allow_pickle=False)) for name in names}

    def mean(self, updates: list[bytes]) -> State:
        weighted = []
        for data in updates:
            stream = io.BytesIO(data)
            arrays = [np.load(stream, allow_pickle=False) for _ in self.client.state_dict()]
            weighted.append([array * 1 for array in arrays])  # by the number of samples
        sums = [sum(layer) / len(updates) for layer in zip(*weighted, strict=True)]
        named = zip(self.client.state_dict().items(), sums, strict=True)
        return {name: torch.as_tensor(array).to(t.dtype) for (name, t), array in named}


def array_bytes(array: Any) -> bytes:
    """As Flower serialises one array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


@dataclass(frozen=True)
class _Fixed(fs.schedule.Schedule):
    """So many survivors, whatever the round."""

    count: int

    def keep(self, at_round: int, eligible: int) -> int:
        return self.count


@dataclass
class _Samples:
    """What was measured of one arm."""

    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})
    nbytes: int = 0
    memory: int = 0

    def add(self, phases: Phases) -> None:
        self.seconds.append(sum(phases.values()))
        for name in PHASES:
            self.phases[name].append(phases.get(name, 0.0))

    def record(self) -> dict[str, Any]:
        found = {
            "median_s": quantile(self.seconds, 0.5),
            "p20_s": quantile(self.seconds, 0.2),
            "p80_s": quantile(self.seconds, 0.8),
            "phases_s": {name: quantile(times, 0.5) for name, times in self.phases.items()},
            "payload_bytes": self.nbytes,
        }
        if memory.known():
            found["memory_bytes"] = self.memory
        return found


def measure(model: str, density: float, size: Size, rounds: int) -> Record:
    """One model at one density: a record as `runner` makes them, with phases, bytes and memory.

    Raises:
        CheckFailed: the arms' models differ after a round.
    """
    torch.manual_seed(0)
    build, _ = models.MODELS[model]
    module = build()
    generator = torch.Generator().manual_seed(1)
    grads = {
        name: torch.randn(p.shape, generator=generator) for name, p in module.named_parameters()
    }
    layout = fs.flatten(copy.deepcopy(module)).layout
    keep = round(density * layout.eligible)
    before = min(layout.eligible, round(keep / (1 - PRUNED)))
    arms = [
        kind(module, grads, before, keep, size) for kind in (Packed, BooleanMasks, FlowerArrays)
    ]
    samples = {arm.name: _Samples() for arm in arms}
    prunable = [module.get_parameter(e.name).detach() for e in layout.prunable_entries]
    _check(arms, float(fs.ops.magnitude_threshold(prunable, keep)))
    for arm in arms:
        arm.reset()
        with memory.peak() as used:
            samples[arm.name].nbytes = arm.round(Phases())
        samples[arm.name].memory = used.bytes
    for _ in range(rounds):
        for arm in arms:
            arm.reset()
            phases = Phases()
            arm.round(phases)
            samples[arm.name].add(phases)
    ours, *peers = (samples[arm.name].record() for arm in arms)
    for peer in peers:
        peer["speedup"] = peer["median_s"] / ours["median_s"]
    return {
        "op": f"round_{model}",
        "n": sum(p.numel() for p in module.parameters()),
        "density": density,
        "dtype": "float32",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "inputs": "init",
        "clients": size.clients,
        "steps": size.steps,
        **ours,
        "peers": {arm.name: peer for arm, peer in zip(arms[1:], peers, strict=True)},
        "forward_backward_s": models.forward_backward(model, module) * size.clients * size.steps,
    }


def _check(arms: Sequence[Arm], threshold: float) -> None:
    """Weights tied at the threshold may be kept by one arm and pruned by another."""
    found = []
    tied = {name: w.detach().abs() == threshold for name, w in arms[0].start.items()}
    for arm in arms:
        arm.reset()
        arm.round(Phases())
        found.append({name: w.clone() for name, w in arm.weights().items()})
    for arm, weights in zip(arms[1:], found[1:], strict=True):
        for name, ours in found[0].items():
            theirs = torch.where(tied[name], ours, weights[name])
            if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7):
                off = float((ours - theirs).abs().max())
                raise CheckFailed(f"{name}: expected the model of {arm.name}, got one {off} away")


def run(
    names: Sequence[str], densities: Sequence[float], size: Size, rounds: int
) -> Iterator[Record | Refused]:
    """A record for each model and density, or the reason why there is none."""
    for name in names:
        for density in densities:
            try:
                yield measure(name, density, size, rounds)
            except CheckFailed as error:
                place = Setting(models.MODELS[name][1], density, inputs="init")
                yield Refused(f"round_{name}", place, str(error))
