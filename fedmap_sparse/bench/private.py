"""Cases of what private sums are made of: the cut to a norm, noise, fixed-point integers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.bench import floors
from fedmap_sparse.bench.case import CheckFailed, Peer, Setting, Trial, case, same

_FLOAT32 = (torch.float32,)


@case("clip_difference", densities=(1.0,), dtypes=_FLOAT32, group="private")
def clip_difference(s: Setting) -> Trial:
    """Each call cuts the last one's result a little more, so that both passes run."""
    values, start = s.values(), s.normal(seed=1)
    fresh, other = values.clone(), values.clone()
    scratch = torch.empty_like(values)
    limit = float((values.double() - start.double()).norm())
    norms = [limit, limit]

    def ours() -> Tensor:
        norms[0] *= 0.9999
        ops.clip_difference_(values, start, norms[0])
        return values

    def theirs() -> Tensor:
        norms[1] *= 0.9999
        torch.sub(other, start, out=scratch)
        factor = min(1.0, norms[1] / float(scratch.norm()))
        return torch.add(start, scratch, alpha=factor, out=other)

    def check() -> None:
        results = []
        for backend in (None, "reference"):
            cut = fresh.clone()
            norm = ops.clip_difference_(cut, start, 0.7 * limit, backend=backend)
            results.append((cut, norm))
        same("clip_difference_", results[0][0], results[1][0])
        if results[0][1] != results[1][1]:
            raise CheckFailed("clip_difference_: expected the reference's norm")

    return Trial(
        ours,
        check,
        5 * values.nbytes,
        floors.together(
            floors.read(fresh), floors.read(start), floors.read(start), floors.inplace(other)
        ),
        {"sub, norm, add": Peer(theirs)},
    )


@case("add_gaussian", densities=(1.0,), dtypes=_FLOAT32, group="private")
def add_gaussian(s: Setting) -> Trial:
    """Bound by arithmetic, some 50 operations in float64 an element, not by memory."""
    values, other = s.values(), s.values()
    scratch = torch.empty_like(values)
    generator = torch.Generator(s.device).manual_seed(1)

    def ours() -> Tensor:
        ops.add_gaussian_(values, 1e-3, seed=1, stream=2)
        return values

    def theirs() -> Tensor:
        return other.add_(scratch.normal_(0.0, 1e-3, generator=generator))

    def check() -> None:
        results = []
        for backend in (None, "reference"):
            noised = s.values()
            ops.add_gaussian_(noised, 0.5, seed=3, stream=1, backend=backend)
            results.append(noised)
        same("add_gaussian_", *results)

    return Trial(
        ours,
        check,
        2 * values.nbytes,
        floors.inplace(other),
        {"normal_, add_": Peer(theirs)},
    )


@case("to_fixed", densities=(1.0,), dtypes=_FLOAT32, group="private")
def to_fixed(s: Setting) -> Trial:
    """The check for finite values reads the input once more; the result is a new tensor."""
    values, scratch = s.values(), s.values()
    other = torch.empty_like(values, dtype=torch.int32)

    def ours() -> Tensor:
        return ops.to_fixed(values, clip=2.0, scale=2.0**20)[0]

    def theirs() -> Tensor:
        torch.clamp(values, -2.0, 2.0, out=scratch)
        return other.copy_(scratch.mul_(2.0**20).round_())

    return Trial(
        ours,
        lambda: same(
            "to_fixed",
            ours(),
            ops.to_fixed(values, clip=2.0, scale=2.0**20, backend="reference")[0],
        ),
        2 * values.nbytes,
        floors.copy(values, other),
        {"clamp_, mul_, round_, copy_": Peer(theirs)},
    )


@case("from_fixed", densities=(1.0,), dtypes=_FLOAT32, group="private")
def from_fixed(s: Setting) -> Trial:
    sums = ops.to_fixed(s.values(), clip=2.0, scale=2.0**20)[0]
    other = torch.empty(sums.shape, device=s.device)

    def ours() -> Tensor:
        return ops.from_fixed(sums, 3e6)

    return Trial(
        ours,
        lambda: same("from_fixed", ours(), ops.from_fixed(sums, 3e6, backend="reference")),
        2 * sums.nbytes,
        floors.copy(sums, torch.empty_like(sums)),
        {"copy_, div_": Peer(lambda: other.copy_(sums).div_(3e6))},
    )
