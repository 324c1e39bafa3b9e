"""The ops under torch.compile and opcheck, with the Triton backend as their implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ladder import WHOLE
from torch import Tensor

import fedmap_sparse as fs
from fedmap_sparse import ops
from fedmap_sparse.ops import masked_sgd
from fedmap_sparse.ops._segments import Segments

_INDUCTOR = "inductor" if WHOLE else "aot_eager"  # inductor alone takes a minute


def select_pack_step(
    values: Tensor, grad: Tensor, segments: Any, buffer: Tensor, backend: str
) -> Tensor:
    mask = ops.magnitude_mask(values, 1200, backend=backend)
    packed = ops.pack(values, mask, backend=backend)
    masked_sgd.step_segments_(
        values, mask, [grad], segments, momentum_buffer=buffer, backend=backend
    )
    return packed * 2


@pytest.mark.filterwarnings("ignore")  # inductor's own, of the machine it runs on
def test_fullgraph_over_select_pack_and_step(rung: Any) -> None:
    n = 3000
    start, grad = torch.randn(n), torch.randn(n)
    rung.show(grad=grad)
    segments = Segments([0], [n])
    segments.scalars[0, :2] = torch.tensor([0.1, 0.9])
    results = []
    for backend, compiled in (("reference", False), ("triton", False), ("triton", True)):
        values, buffer = start.clone(), torch.ones(1200)
        run = (
            torch.compile(select_pack_step, fullgraph=True, backend=_INDUCTOR)
            if compiled
            else select_pack_step
        )
        results.append((run(values, grad, segments, buffer, backend), values, buffer))
    for eager, compiled in zip(results[1], results[2], strict=True):
        assert torch.equal(eager, compiled)
    for reference, eager in zip(results[0], results[1], strict=True):
        assert torch.equal(reference, eager)


def test_opcheck(rung: Any) -> None:
    mask = fs.Mask.from_bool(torch.rand(500) < 0.5)
    values = torch.randn(500)
    packed = ops.pack(values, mask, backend="reference")
    library, check = torch.ops.fedmap_sparse, torch.library.opcheck
    tests = ("test_schema", "test_faketensor")
    check(library.pack.triton, (values, mask.words, mask.rank, mask.nnz), test_utils=tests)
    check(library.unpack.triton, (packed, mask.words, mask.rank, 500), test_utils=tests)
    check(library.magnitude_mask.triton, ([values], [None], 500, 50), test_utils=tests)
    out = torch.empty(500, dtype=torch.float16)
    check(library.cast_out.triton, (values, out), test_utils=tests)
    parent = (mask.words, mask.rank, 500, mask.nnz)
    check(library.extract.triton, (mask.words, *parent), test_utils=tests)
