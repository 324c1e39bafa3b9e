"""What is checked of this project's kernels, for `tests/gpu_free`, `tests/gpu` and the report."""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

#: `make test-gpu-free` sets it: every case on every rung. By default a selection.
WHOLE = os.environ.get("FEDMAP_SPARSE_LADDER") == "whole"


@contextlib.contextmanager
def coarser() -> Iterator[None]:
    """Steps by 256 survivors, not 32: the interpreter's time goes by the number of operations."""
    from fedmap_sparse.triton_kernels import _tuning

    shapes = dict.fromkeys(("STEP_DENSE", "STEP_MIDDLE", "STEP_SPARSE"), (128, 256, 8, 2048))
    with mock.patch.multiple(_tuning, **shapes):
        yield
