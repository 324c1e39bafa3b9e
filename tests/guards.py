"""What the tests of the native kernels share: masks, bits, and buffers that notice overruns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedmap_sparse import Mask
from fedmap_sparse._backends import native
from fedmap_sparse.mask import num_words

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
#: Around every edge: bit, word, vector, block.
EDGES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049, 4097]
_GUARD = 256  # bytes at each end, a multiple of every alignment in use
_FILL = 0xA5


def bits(t: Tensor) -> Tensor:
    """As integers: -0.0 differs from 0.0, and each NaN from the others."""
    return t.view({4: torch.int32, 2: torch.int16}[t.element_size()])


def random_mask(numel: int, density: float, seed: int = 0) -> Mask:
    g = torch.Generator().manual_seed(seed)
    return Mask.from_words(_words(torch.rand(numel, generator=g) < density), numel)


def _words(keep: Tensor) -> Tensor:
    import numpy as np

    packed = np.packbits(keep.numpy(), bitorder="little")
    padded = np.zeros(4 * num_words(keep.numel()), dtype=np.uint8)
    padded[: packed.size] = packed
    return torch.from_numpy(padded.view(np.int32))


@contextmanager
def guarded(numel: int, dtype: torch.dtype, *, shift: int = 0) -> Iterator[Tensor]:
    """An uninitialised tensor, `shift` elements off alignment, whose surroundings must stay.

    Its memory starts as a pattern, so that what was not written is seen as wrong.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.full((2 * _GUARD + 64 + (numel + shift) * size,), _FILL, dtype=torch.uint8)
    start = _GUARD + (-(raw.data_ptr() + _GUARD) % 64) + shift * size
    yield raw[start : start + numel * size].view(dtype)
    assert bool((raw[:start] == _FILL).all()), "written before the buffer"
    assert bool((raw[start + numel * size :] == _FILL).all()), "written past the buffer"


_LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
"""


def run_native(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` with `native`, the extension alone, in a new process: torch takes a second."""
    return subprocess.run(
        [sys.executable, "-c", _LOAD + code, native.__file__],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
