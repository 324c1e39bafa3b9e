"""Cases of the masked optimizer steps: one flat buffer, one segment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.bench import floors
from fedmap_sparse.bench.case import Peer, Setting, Trial, case, same
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops import masked_adamw as adamw
from fedmap_sparse.ops import masked_sgd as sgd
from fedmap_sparse.ops._segments import ZEROED, Segments

DENSITIES = (1.0, 0.5, 0.1, 0.01)
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
#: AdamW's first step: lr, beta1, beta2, eps, weight_decay, beta1^t, beta2^t.
ADAMW_SCALARS = (1e-4, 0.9, 0.999, 1e-8, 1e-2, 0.9, 0.999)

#: What a step changes: values, master copies (16-bit values only), states.
Buffers = tuple[Tensor, Tensor | None, list[Tensor]]
Step = Callable[[Buffers, str | None], Tensor]
Optimizer = Callable[..., torch.optim.Optimizer]


@case("masked_sgd", densities=DENSITIES)
def masked_sgd(s: Setting) -> Trial:
    segments = Segments([0], [s.n])
    segments.scalars[0, :2] = torch.tensor([SGD["lr"], SGD["momentum"]])
    segments.rows[0, 3] = ZEROED  # as the optimizers say from their second step on
    grad, mask = s.normal(), s.mask(s.values())

    def step(buffers: Buffers, backend: str | None = None) -> Tensor:
        values, master, (momentum,) = buffers
        sgd.step_segments_(
            values,
            mask,
            [grad],
            segments,
            momentum_buffer=momentum,
            master=master,
            backend=backend,
        )
        return values

    return _trial(s, mask, grad, step, 1, torch.optim.SGD, SGD)


@case("masked_adamw", densities=DENSITIES)
def masked_adamw(s: Setting) -> Trial:
    segments = Segments([0], [s.n])
    segments.scalars[0, :7] = torch.tensor(ADAMW_SCALARS, dtype=torch.float64)
    segments.rows[0, 3] = ZEROED
    grad, mask = s.normal(), s.mask(s.values())

    def step(buffers: Buffers, backend: str | None = None) -> Tensor:
        values, master, (exp_avg, exp_avg_sq) = buffers
        adamw.step_segments_(
            values,
            mask,
            [grad],
            segments,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            master=master,
            backend=backend,
        )
        return values

    return _trial(s, mask, grad, step, 2, torch.optim.AdamW, ADAMW)


def _trial(
    s: Setting,
    mask: Mask,
    grad: Tensor,
    step: Step,
    states: int,
    optimizer: Optimizer,
    options: dict[str, Any],
) -> Trial:
    def buffers(fill: Callable[[int], Tensor]) -> Buffers:
        packed = ops.pack(s.values(), mask)
        master = None if s.dtype == torch.float32 else ops.cast(packed, torch.float32)[0]
        return ops.unpack(packed, mask), master, [fill(i) for i in range(states)]

    def check() -> None:
        results = []
        for backend in (None, "reference"):
            made = buffers(lambda i: s.normal(mask.nnz, seed=1 + i).float().abs())
            values = step(made, backend)
            results.append([values, *([] if made[1] is None else [made[1]]), *made[2]])
        for index, (got, expected) in enumerate(zip(*results, strict=True)):
            same(f"step, tensor {index}", got, expected)

    held = buffers(lambda i: torch.zeros(mask.nnz, device=s.device))
    values, master, state = held
    packed = len(state) + (master is not None)
    lines = floors.touched_bytes(mask, values.element_size())
    state_bytes = 4 * packed * mask.nnz
    return Trial(
        lambda: step(held, None),
        check,
        mask.words.nbytes + 3 * lines + 2 * state_bytes,
        floors.together(
            floors.touched(torch.zeros_like(values), mask),
            floors.read(grad, lines),
            floors.inplace(torch.zeros(max(packed * mask.nnz, 16), device=s.device)),
        ),
        {"fused + mask": _peer(s, mask, grad, optimizer, options)},
    )


def _peer(
    s: Setting,
    mask: Mask,
    grad: Tensor,
    optimizer: Optimizer,
    options: dict[str, Any],
) -> Peer:
    """torch's fused step over everything, then `mul_` by the mask in the values' dtype.

    At density 1 there is nothing to multiply; 16-bit values have no master copies there.
    """
    p = torch.nn.Parameter(s.values())
    p.grad = grad
    keep = mask.to_bool().to(s.dtype) if mask.nnz < mask.numel else None
    torch_step: Callable[[], Any] = optimizer([p], fused=True, **options).step

    def run() -> Tensor:
        torch_step()
        if keep is not None:
            p.data.mul_(keep)
        return p

    return Peer(run)
