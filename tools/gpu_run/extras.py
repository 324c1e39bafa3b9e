"""Workloads beside the catalogue's: selections by CUDA C++ and of a list, a digest, messages."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ladder.catalogue import Workload

Selection = Callable[[list[Tensor], list[Tensor | None], int, int], Any]
#: What follows a workload's name where it is CUDA C++.
MARK = " (CUDA C++)"


def cuda_select() -> tuple[Selection | None, str]:
    """`magnitude_mask` of the CUDA C++ kernels; or why there is none."""
    try:
        driver = importlib.import_module("fedmap_sparse.cuda_kernels._driver")
        module = importlib.import_module("fedmap_sparse.cuda_kernels.select")
    except ImportError as error:
        return None, str(error)
    why: str = driver.missing()
    return (None, why) if why else (module.magnitude_mask, "")


def selections() -> dict[str, Selection]:
    """Those that run here, CUDA C++ first, by what follows their workloads' names."""
    from fedmap_sparse.triton_kernels import select

    by_cuda, _ = cuda_select()
    return {**({MARK: by_cuda} if by_cuda else {}), "": select.magnitude_mask}


def each_extra(n: int, device: torch.device) -> Iterator[Workload]:
    """Made as they are asked for, the most worth knowing first."""
    from ladder.catalogue import Workload, touched

    import fedmap_sparse as fs
    from fedmap_sparse.mask import _digest, digest_sums

    torch.manual_seed(0)
    values = torch.randn(n, device=device)
    half = values.to(torch.bfloat16)
    within = fs.Mask.from_bool(torch.rand(n, device=device) < 0.3)
    parts = list(values.split(-(-n // 8)))
    inputs: dict[str, tuple[list[Tensor], list[Tensor | None], int, float]] = {
        "select float32": ([values], [None], n, 4.125),
        "select bfloat16": ([half], [None], n, 2.125),
        "select within 0.3": ([values], [within.words], within.nnz, 0.25 + 4 * touched(0.3)),
        "select of 8": (parts, [None] * len(parts), n, 4.125),
    }
    for mark, select in selections().items():
        for name, (given, masks, eligible, floor) in inputs.items():
            if mark or name == "select of 8":  # the catalogue has Triton's others
                yield Workload(
                    name + mark,
                    n,
                    lambda s=select, g=given, m=masks, e=eligible: s(g, m, e, n // 10),
                    floor,
                    0.0,
                    0.0,
                )
    yield Workload("digest", n, lambda: _digest(within.words, n), 0.125, 0.0, 0.0)
    # Its kernel, without the wait for the number.
    yield Workload("digest sums", n, lambda: digest_sums(within.words), 0.125, 0.0, 0.0)
    model = nn.Linear(n, 1, bias=False, device="meta")
    model.weight = nn.Parameter(values.view(1, -1))
    params = fs.flatten(model)
    mask = fs.Mask.from_bool(torch.rand(n, device=device) < 0.1)

    def write() -> bytes:
        return fs.encode(params, mask, mask_section="full")

    data = write()

    def read() -> Tensor:
        return fs.decode(data, params.layout, device=device).packed

    kept = mask.nnz / n
    yield Workload("message out 0.1", n, write, 4.125 + 4 * kept, 0.0, 0.0)
    yield Workload("message in 0.1", n, read, 0.125 + 4 * kept, 0.0, 0.0)
