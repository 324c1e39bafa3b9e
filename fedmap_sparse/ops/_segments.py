"""The segments of a flat buffer that one masked step covers, with each one's hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import native
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops.quantize import cast_reference

NESTEROV, MAXIMIZE, FIRST, AMSGRAD = 1, 2, 4, 8
#: The caller vouches that the segment's pruned elements are +0.0 already, so that a backend need
#: not visit the memory between survivors (0.125 + 8 d + 12 (1 - (1 - d)^8) bytes an element on a
#: GPU, where writing zeros blindly costs 4 more). Without it they are written.
ZEROED = 16


class Segments:
    """A table of segments: `rows[s]` = offset, numel, gradient address, flags; `scalars[s]` = 8
    float64 hyper-parameters. Kept between steps; the optimizer rewrites what changed.

    Offsets grow; those below the mask's numel are multiples of 128, the rest multiples of 8, as
    `flatten` lays them out.
    """

    def __init__(self, offsets: Sequence[int], numels: Sequence[int]) -> None:
        if len(offsets) != len(numels):
            raise ValueError(f"numels: expected {len(offsets)}, one an offset, got {len(numels)}")
        self.rows = torch.zeros(len(offsets), 4, dtype=torch.int64)
        self.rows[:, 0] = torch.tensor(list(offsets), dtype=torch.int64)
        self.rows[:, 1] = torch.tensor(list(numels), dtype=torch.int64)
        self.numels = tuple(numels)
        self.scalars = torch.zeros(len(offsets), 8, dtype=torch.float64)

    def __len__(self) -> int:
        return self.rows.shape[0]


def check_gradients(
    grads: Sequence[Tensor | None], segments: Segments, values: Tensor
) -> list[Tensor | None]:
    """The gradients without autograd; raises unless each is as kernels want it."""
    if len(grads) != len(segments):
        raise ValueError(f"grads: expected {len(segments)}, one a segment, got {len(grads)}")
    for grad, numel in zip(grads, segments.numels, strict=True):
        if grad is not None:
            _checks.check_tensor("grads", grad, (values.dtype,))
            _checks.check_numel("grads", grad, numel, "the segment's size")
            _checks.check_device("grads", grad, values.device)
    # The dispatcher resolves lazy negation in other arguments, but not in lists of optional ones.
    return [None if g is None else _checks.plain(g).resolve_neg() for g in grads]


def direct(
    kernel: str,
    values: Tensor,
    mask: Mask,
    grads: Sequence[Tensor | None],
    segments: Segments,
    states: dict[str, Tensor | None],
    backend: str | None,
) -> bool:
    """Straight to the C++ kernel of this name, `states` in its order; false where that does not do.

    As an op, a step with its dozen tensors costs 14 to 20 us beside its work, so 2.
    """
    if not _backends.direct(backend, values) or not isinstance(mask, Mask):
        return False
    done = getattr(native, kernel)(
        values,
        mask.words,
        mask.rank,
        mask.numel,
        tuple(grads),  # so that nobody takes a gradient away meanwhile
        segments.rows,
        segments.scalars,
        *states.values(),
        _backends.threads(),
        True,
    )
    if done is None:
        return False
    _backends.written(values, *states.values())
    return True


def step(
    op: Callable[..., None],
    values: Tensor,
    mask: Mask,
    grads: Sequence[Tensor | None],
    segments: Segments,
    states: dict[str, Tensor | None],
    backend: str | None,
) -> None:
    """Check that one step's tensors agree, then call `op`. `states` in its order, master last."""
    _checks.check_tensor("values", values)
    _checks.check_mask("mask", mask)
    _checks.check_same_device("mask", mask, values)
    if mask.numel > values.numel():
        raise ValueError(f"mask: expected at most {values.numel()} elements, got {mask.numel}")
    plain = check_gradients(grads, segments, values)
    size = mask.nnz + values.numel() - mask.numel
    for name, state in states.items():
        if state is not None:
            _checks.check_out(name, state, size, (torch.float32,), values.device)
    if values.dtype != torch.float32 and states["master"] is None:
        raise ValueError(
            f"master: expected float32 master copies for {_checks.short(values.dtype)} values"
        )
    op(
        _checks.plain(values),
        mask.words,
        mask.rank,
        mask.numel,
        mask.nnz,
        plain,
        segments.rows,
        segments.scalars,
        *states.values(),
        _backends.pick(backend, values.device),
    )


def step_cpu(kernel: str) -> Callable[..., None]:
    """The `cpu` implementation of a step's op."""

    def run(
        values: Tensor,
        words: Tensor,
        rank: Tensor,
        numel: int,
        nnz: int,
        grads: list[Tensor | None],
        *rest: Any,
    ) -> None:
        threads = _backends.threads()
        getattr(native, kernel)(values, words, rank, numel, grads, *rest, threads, False)

    return run


def float32_scalar(value: float, like: Tensor) -> Tensor:
    """Reference: a hyper-parameter rounded to float32 once, before it meets a float32 tensor.

    torch would compute `float * tensor` with the float64 scalar rounded inside the kernel, by
    device and op; a 0-d tensor leaves no choice.
    """
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def step_reference(
    values: Tensor,
    mask: Mask,
    grads: Sequence[Tensor | None],
    rows: Tensor,
    scalars: Tensor,
    master: Tensor | None,
    states: Sequence[Tensor | None],
    update: Callable[..., Tensor],
) -> None:
    """Reference: `update(p, g, flags, scalars, *states)` for each segment that has a gradient."""
    survivors = mask.to_bool()
    held = torch.cat([survivors, survivors.new_ones(values.numel() - mask.numel)])
    before = torch.cumsum(held, 0) - held.to(torch.int64)  # packed index of each flat position
    for (offset, size, _, flags), row, grad in zip(rows.tolist(), scalars, grads, strict=True):
        if grad is None:
            continue
        inside = slice(offset, offset + size)
        kept = held[inside]
        state = before[inside][kept]
        p = values[inside][kept]
        if master is not None:  # a value that is not its master rounded was written by someone
            copies = master[state]
            same = cast_reference(copies, values.dtype).view(torch.int16) == p.view(torch.int16)
            p = torch.where(same, copies, p.to(torch.float32))
        g = grad.reshape(-1)[kept].to(torch.float32)
        parts = [None if s is None else s[state] for s in states]
        p = update(p, g, flags, row, *parts)
        for whole, part in zip(states, parts, strict=True):
            if whole is not None and part is not None:
                whole[state] = part
        if master is not None:
            master[state] = p
        values[inside] = 0.0
        values[inside][kept] = cast_reference(p, values.dtype)
