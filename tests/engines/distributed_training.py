"""Checks of data-parallel and of sharded training, for distributed_worker.py."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

import fedmap_sparse as fs
from fedmap_sparse.engines.distributed import (
    PackedHook,
    ShardMasks,
    check_same_mask,
    packed_all_reduce,
)

Check = Callable[[], dict[str, Any]]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 31),
        nn.ReLU(),
        nn.Linear(31, 7),
    ).to(dtype)


def batch(rng: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 1, 8, 8, generator=rng).to(dtype)
    return x, torch.randint(0, 7, (8,), generator=rng)


def checksum(*tensors: Tensor) -> str:
    data = b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def everywhere(value: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


# Data-parallel training, with and without the hook.


def train_ddp(
    hook: bool,
    *,
    density: float = 0.2,
    wrap_first: bool = False,
    dtype: torch.dtype = torch.float32,
    accumulate: bool = False,
    clip: bool = False,
    prune_at: tuple[int, ...] = (),
    exact: bool = False,
    dense_above: float = 1.0,
    **options: Any,
) -> tuple[str, int, int]:
    """(checksum of weights and mask, bytes of the last step, bytes expected of it)."""
    model = network(dtype)
    if wrap_first:
        ddp = DDP(model, bucket_cap_mb=0.004, **options)
    params = fs.flatten(model)
    if not wrap_first:
        ddp = DDP(model, bucket_cap_mb=0.004, **options)

    def prune(to: float) -> None:
        keep = round(to * params.layout.eligible)
        if keep < params.mask.nnz:
            params.mask = fs.ops.prune_(params.prunable, keep, within=params.mask)

    prune(density)
    # With `exact`, the dense run is the same sum with nothing packed.
    packed = PackedHook(params, exact=exact, dense_above=dense_above if hook else 0.0)
    if hook:
        packed.register(ddp)
    elif exact:
        packed._bucket_mask = lambda ps: fs.Mask.full(sum(p.numel() for p in ps))  # type: ignore[method-assign]
        packed.register(ddp)
    optimizer = fs.optim.MaskedSGD(params, lr=0.05, momentum=0.9)
    rng = torch.Generator().manual_seed(dist.get_rank())
    before = 0
    for i in range(5):
        if i in prune_at:
            prune(params.density / 3)
            check_same_mask(params)
        optimizer.zero_grad()
        if accumulate:
            x, y = batch(rng, dtype)
            with ddp.no_sync():
                cross_entropy(ddp(x).float(), y).backward()
        x, y = batch(rng, dtype)
        before = packed.bytes
        cross_entropy(ddp(x).float(), y).backward()
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    tail = sum(e.numel for e in params.layout.tail_entries)
    wanted = params.values.element_size() * (params.mask.nnz + tail)
    return checksum(params.values, params.mask.words), packed.bytes - before, wanted


def ddp(**options: Any) -> dict[str, Any]:
    packed, sent, wanted = train_ddp(True, **options)
    dense, _, _ = train_ddp(False, **options)
    ranks = everywhere(packed)
    return {
        "equal": packed == dense,
        "agree": len(set(ranks)) == 1,
        "bytes": sent == wanted if options.get("dense_above", 1.0) == 1.0 else sent > wanted,
    }


DDP_CHECKS: dict[str, Check] = {
    "density_1": partial(ddp, density=1.0),
    "density_0.5": partial(ddp, density=0.5),
    "density_0.1": partial(ddp, density=0.1),
    "density_0.01": partial(ddp, density=0.01),
    "wrapped_before_flatten": partial(ddp, wrap_first=True),
    "gradient_as_bucket_view": partial(ddp, gradient_as_bucket_view=True),
    "static_graph": partial(ddp, static_graph=True),
    "no_sync": partial(ddp, accumulate=True),
    "clip": partial(ddp, clip=True),
    "bfloat16": partial(ddp, dtype=torch.bfloat16),
    "pruned_in_mid_run": partial(ddp, density=0.9, prune_at=(1, 3)),
    "some_buckets_dense": partial(ddp, density=0.5, dense_above=0.51),
    "exact": partial(ddp, exact=True),
    "exact_pruned_in_mid_run": partial(ddp, exact=True, density=0.9, prune_at=(1, 3)),
}


# The operation alone, beside plain torch.


def values_of(rank: int, dtype: torch.dtype, numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)


def all_reduce(numel: int, nnz: int, dtype: torch.dtype, dense_above: float) -> dict[str, Any]:
    keep = torch.zeros(numel, dtype=torch.bool)
    keep[torch.randperm(numel, generator=torch.Generator().manual_seed(9))[:nnz]] = True
    mask = fs.Mask.from_bool(keep)
    every = [values_of(r, dtype, numel) for r in range(dist.get_world_size())]
    total = sum((v.double() for v in every), torch.zeros(numel, dtype=torch.float64))
    wanted = torch.where(keep, total, 0.0).float().to(dtype)
    got = values_of(dist.get_rank(), dtype, numel)
    same = packed_all_reduce(got, mask, exact=True, dense_above=dense_above)
    loose = values_of(dist.get_rank(), dtype, numel)
    packed_all_reduce(loose, mask, dense_above=dense_above)
    close = torch.allclose(loose.float(), wanted.float(), rtol=2**-6, atol=2**-5)
    return {
        "in_place": same is got,
        "exact": torch.equal(got, wanted),
        "loose": close and not loose[~keep].any(),
        "agree": len(set(everywhere(checksum(got)))) == 1,
    }


ALL_REDUCE_CHECKS: dict[str, Check] = {
    f"{numel}_of_which_{nnz}_{str(dtype)[6:]}_above_{above}": partial(
        all_reduce, numel, nnz, dtype, above
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for numel, nnz in ((5000, 700), (5000, 5000), (100, 1), (64, 0), (33, 30))
    for above in (0.6, 1.0)
}


def masks_that_differ() -> dict[str, Any]:
    params = fs.flatten(network())
    check_same_mask(params)
    if dist.get_rank() == 1:
        params.mask = fs.ops.prune_(params.prunable, 10, within=params.mask)
    try:
        check_same_mask(params)
    except ValueError as error:
        return {"names_the_rank": "[1]" in str(error)}
    return {"raises": False}


# FSDP2.


def sharded(layout: fs.FlatLayout, mask: fs.Mask) -> tuple[nn.Module, ShardMasks, Any]:
    model = network()
    fully_shard(model[4])
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks = ShardMasks(model, layout, mask)
    masks.register(optimizer)
    return model, masks, optimizer


def fsdp() -> dict[str, Any]:
    """Masks over shards: pruned weights stay zero through steps of torch's own optimizer."""
    start = network().state_dict()
    layout = fs.FlatLayout.from_state_dict(start)
    flat = fs.flatten(network())
    mask = fs.ops.magnitude_mask(flat.prunable, layout.eligible // 5, within=flat.mask)
    model, masks, optimizer = sharded(layout, mask)
    one = network()  # the same on one rank, over the batches of all ranks
    plain = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
    bits = layout.mask_dict(mask)

    def zero() -> None:
        with torch.no_grad():
            for name, p in one.named_parameters():
                if name in bits:
                    p.mul_(bits[name])

    zero()
    world = dist.get_world_size()
    rngs = [torch.Generator().manual_seed(r) for r in range(world)]
    for _ in range(4):
        batches = [batch(rng) for rng in rngs]
        x, y = batches[dist.get_rank()]
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        plain.zero_grad()
        for x, y in batches:
            (cross_entropy(one(x), y) / world).backward()
        plain.step()
        zero()
    every = dict(model.named_parameters())
    local = [p.to_local() for p in every.values() if isinstance(p, DTensor)]
    whole = {n: p.full_tensor() for n, p in every.items()}  # type: ignore[attr-defined]
    kept = sum(sum(everywhere(m.nnz)) for m in masks.masks.values())
    # The full state on rank 0 goes through the codec, and comes back to the shards.
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp.get_model_state_dict(model, options=options)
    coded = True
    if dist.get_rank() == 0:
        payload = fs.encode_state_dict(state, mask, layout=layout)
        state = fs.decode_state_dict(payload, layout=layout, masks=mask)
        coded = all(torch.equal(state[n], whole[n]) for n in whole)
    for p in local:
        p.detach().zero_()
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.set_model_state_dict(model, state, options=options)
    again = {n: p.full_tensor() for n, p in model.named_parameters()}  # type: ignore[attr-defined]
    return {
        "is_sharded": len(local) == len(every) and kept == mask.nnz,
        "pruned_are_zero": all(not whole[n][~bits[n]].any() for n in bits),
        "as_on_one_rank": all(
            torch.allclose(whole[n], p, rtol=1e-5, atol=1e-6) for n, p in one.named_parameters()
        ),
        "coded": coded,
        "came_back": all(torch.equal(again[n], whole[n]) for n in whole),
    }


def fsdp_refuses() -> dict[str, Any]:
    layout = fs.FlatLayout.from_state_dict(network().state_dict())
    other = nn.Sequential(nn.Conv2d(1, 4, 5))
    fully_shard(other)
    try:
        ShardMasks(other, layout, layout.initial_mask())
    except ValueError as error:
        return {"names_the_parameter": str(error).startswith("0.weight: expected shape")}
    return {"raises": False}
