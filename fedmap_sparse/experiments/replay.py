"""Local steps in a CUDA graph: captured once for each mask, replayed with batch after batch.

Of a small network, launching the kernels of a step takes longer than running them; a replay
launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmap_sparse.errors import ConfigError
from fedmap_sparse.federated import FedMapClient
from fedmap_sparse.optim import MaskedOptimizer

#: Steps that are launched under a mask before one is captured: libraries choose their kernels and
#: allocate in the first ones.
WARM_UP = 3


class Graphs(Protocol):
    """Where steps run, and how one is captured."""

    def aside(self) -> AbstractContextManager[None]:
        """What all of a client's steps run within."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does on the device what `work` asks for; `work` has not been done yet then."""


class CudaGraphs:
    """CUDA graphs on one device.

    Eager steps are on the stream of the captures too: autograd remembers on which stream it has
    gathered a parameter's gradient, and a capture may wait for no other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """As `Graphs` says."""
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            yield
        before.wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """As `Graphs` says."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


def gradients(module: nn.Module, images: Tensor, labels: Tensor, total: Tensor) -> None:
    """Those of a batch's mean cross-entropy, which is added to `total` once for each sample."""
    loss = F.cross_entropy(module(images), labels)
    loss.backward()
    total += loss.detach() * len(labels)


class ReplayedTraining:
    """Local training of clients that share a model, by replays.

    A graph has the addresses of the optimizer's state, so one optimizer serves every client while
    the mask stays the same: it begins anew with each (`MaskedOptimizer.restart`). What a graph
    cannot repeat is launched: a client's first step, which begins the momentum and takes the
    round's learning rate to the device; batches of another size; the first steps under a mask.

    Args:
        size: samples of the batches that are replayed.
    """

    def __init__(self, size: int, graphs: Graphs) -> None:
        self._size = size
        self._graphs = graphs
        self._optimizer: MaskedOptimizer | None = None
        self._total = torch.zeros(())
        self._forget(-1)

    def _forget(self, laid_out: int) -> None:
        """Steps are another from here on: `laid_out` is the optimizer's number for them."""
        self._laid_out = laid_out
        self._warm = 0
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, client: FedMapClient, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Train `client` in place; the mean loss.

        Raises:
            ConfigError: the model's step cannot be captured.
        """
        seen = 0
        with self._graphs.aside():
            optimizer = self._take(client)
            for images, labels in batches:
                if seen and len(labels) == self._size:
                    self._repeat(optimizer, images, labels)
                else:
                    self._step(optimizer, images, labels)
                seen += len(labels)
        client.params.note_stepped(None)  # replays are steps that the host has not seen
        return self._total.item() / seen

    def _take(self, client: FedMapClient) -> MaskedOptimizer:
        """The optimizer to go on with: the one before, as if it were the client's, if it fits."""
        held, fresh, flat = self._optimizer, client.optimizer, client.params
        assert fresh is not None
        if held is None or held.flat is not flat or held.mask != flat.mask:
            self._optimizer = fresh
            self._total = torch.zeros((), dtype=torch.float64, device=flat.values.device)
            self._forget(-1)
            return fresh
        flat.mask = held.mask  # equal, and the one that the graph reads
        for own, theirs in zip(held.param_groups, fresh.param_groups, strict=True):
            own.update({name: value for name, value in theirs.items() if name != "params"})
        held.restart()
        client.optimizer = held
        self._total.zero_()
        return held

    def _step(self, optimizer: MaskedOptimizer, images: Tensor, labels: Tensor) -> None:
        gradients(optimizer.flat.module, images, labels, self._total)
        optimizer.step()
        optimizer.zero_grad()  # so that a capture's gradients are in the graph's own memory

    def _repeat(self, optimizer: MaskedOptimizer, images: Tensor, labels: Tensor) -> None:
        """A step like the one before it: launched at first, then captured, then replayed."""
        if self._laid_out != optimizer.laid_out:
            self._forget(optimizer.laid_out)
        if self._warm < WARM_UP:
            self._step(optimizer, images, labels)
            self._warm += 1
            return
        if self._inputs is None or self._replay is None:
            inputs = self._inputs = images.clone(), labels.clone()
            self._replay = self._captured(optimizer, *inputs)
        else:
            self._inputs[0].copy_(images)
            self._inputs[1].copy_(labels)
        self._replay()

    def _captured(
        self, optimizer: MaskedOptimizer, images: Tensor, labels: Tensor
    ) -> Callable[[], None]:
        try:
            return self._graphs.capture(lambda: self._step(optimizer, images, labels))
        except RuntimeError as error:
            first = error.__context__ or error  # the end of a broken capture raises again
            name = type(optimizer.flat.module).__name__
            raise ConfigError(
                f"graphs: a step of {name} cannot be captured in a CUDA graph, graphs=false trains "
                f"it: {str(first).splitlines()[0]}"
            ) from error
