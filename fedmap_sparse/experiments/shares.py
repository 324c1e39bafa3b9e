"""Samples as local training and evaluation want them: by client, in memory that workers share, and
in the memory layout that the model is fastest on.

PyTorch's convolutions, poolings and normalisations take images in two layouts of memory: NCHW,
and NHWC ("channels last"), which their CPU code is mostly faster on. A batch in NHWC makes all that
follows NHWC; the weights stay as they are. `.contiguous(memory_format=torch.channels_last)` leaves
images of one channel alone, as both layouts are the same bytes then, and PyTorch takes them for
NCHW: what decides is the stride of the channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedmap_sparse.engines.shared import SharedTensor
from fedmap_sparse.experiments.data import Split
from fedmap_sparse.experiments.partition import Index
from fedmap_sparse.federated import ClientId


class Shares(Mapping[ClientId, Split]):
    """Each client's own samples; clients are numbered from 0.

    All stand side by side in one tensor, client after client. Pickled for a worker process
    (`engines.workers`) it costs nothing if it is `shared`.

    Args:
        split: all training samples.
        parts: which of them each client has.
        device: where they are wanted.
        nhwc: images [n, channels, height, width] are kept as NHWC in memory.
        shared: in memory that worker processes map; on the CPU only.
    """

    def __init__(
        self,
        split: Split,
        parts: Sequence[Index],
        device: torch.device,
        *,
        nhwc: bool = False,
        shared: bool = False,
    ) -> None:
        ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
        self._places = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self._nhwc = nhwc and split.images.dim() == 4
        source = split.images.permute(0, 2, 3, 1) if self._nhwc else split.images
        self._memory: list[Tensor | SharedTensor] = []
        for tensor in (source, split.labels):
            shape = (ends[-1], *tensor.shape[1:])
            kept = SharedTensor(shape, tensor.dtype) if shared else None
            out = (
                torch.empty(shape, dtype=tensor.dtype, device=device)
                if kept is None
                else kept.tensor
            )
            for part, place in zip(parts, self._places, strict=True):
                out[place] = tensor[torch.from_numpy(part)].to(device)
            self._memory.append(out if kept is None else kept)

    @property
    def shared(self) -> list[SharedTensor]:
        """The memory that workers have to be given."""
        return [memory for memory in self._memory if isinstance(memory, SharedTensor)]

    @property
    def sizes(self) -> dict[ClientId, int]:
        """How many samples each client has."""
        return {i: place.stop - place.start for i, place in enumerate(self._places)}

    def __getitem__(self, client: ClientId) -> Split:
        """The samples of one client, views of those of all."""
        images, labels = self._tensors()
        place = self._places[int(client)]
        return Split(_as_nchw(images[place]) if self._nhwc else images[place], labels[place])

    def __iter__(self) -> Iterator[ClientId]:
        return iter(range(len(self._places)))

    def __len__(self) -> int:
        return len(self._places)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        images, labels = (m.tensor if isinstance(m, SharedTensor) else m for m in self._memory)
        return images, labels


def placed(split: Split, device: torch.device, nhwc: bool) -> Split:
    """A split to evaluate on, on its device and in the model's layout."""
    images = split.images
    if nhwc and images.dim() == 4:
        # A clone, because `contiguous` would leave the strides of a single channel as they are.
        images = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        images = _as_nchw(images)
    return Split(images.to(device), split.labels.to(device))


def _as_nchw(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2)
