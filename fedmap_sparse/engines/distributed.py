"""torch.distributed: packed gradients in DDP, and the masks of FSDP2's shards.

All ranks hold one mask, so an all-reduce needs no positions: the survivors are packed, summed over
the ranks and unpacked. Nothing here is bound to a backend: tested over gloo; NCCL takes the same
calls on CUDA tensors. A federated round across ranks is in `engines.ranks`.
"""
# No postponed annotations here: DDP reads those of a communication hook.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from fedmap_sparse import ops
from fedmap_sparse.flat import FlatParameters
from fedmap_sparse.layout import FlatLayout
from fedmap_sparse.mask import Mask

Group = dist.ProcessGroup | None

#: Above this density a tensor is reduced whole: packing costs more there than it saves. 10 M
#: float32 over gloo on loopback, two ranks on two quiet Zen 4 cores, medians of 25 turns
#: (`benchmarks/all_reduce.py`): whole 28 ms; packed 10 ms at a density of 0.1, 21 at 0.3, 22 at
#: 0.4, 33 at 0.5, 38 at 0.6. A slower network moves the crossing up.
DENSE_ABOVE = 0.4


def packed_all_reduce(
    tensor: Tensor,
    mask: Mask,
    *,
    group: Group = None,
    exact: bool = False,
    dense_above: float = DENSE_ABOVE,
) -> Tensor:
    """Sum the survivors of `tensor` over the ranks, in place; the rest becomes +0.0.

    Args:
        tensor: contiguous float32, float16 or bfloat16, `mask.numel` elements, the same size on
            each rank.
        mask: which elements count; the same on each rank (see `check_same_mask`).
        group: process group; None: the default one.
        exact: sum in float64, in the order of the ranks, and round once to float32: every rank gets
            the same bits, and they do not depend on how the backend orders its sums (gloo's order
            differs by position from four ranks on). The tensor's dtype is reached from float32.
        dense_above: a mask of more density than this is not packed; the result is the same.

    Returns:
        `tensor`.

    Raises:
        TypeError, ValueError: as `ops.pack`.

    Each rank sends about 2 (R-1)/R nnz values, exact or not (R: number of ranks). Exact costs more
    memory: about 2 nnz values and one float64 for nnz / R values.
    """
    return _reduce(tensor, mask, group, exact, dense_above, 1)[0].wait()


def _reduce(
    tensor: Tensor, mask: Mask, group: Group, exact: bool, dense_above: float, divisor: int
) -> tuple[Future[Tensor], int]:
    """A future of `tensor`, reduced and divided; and how many values each rank put in."""
    packs = mask.nnz < mask.numel and mask.density <= dense_above
    if packs:
        moved = ops.pack(tensor, mask)
    else:
        ops.zero_pruned_(tensor, mask)
        moved = tensor

    def finish(summed: Tensor) -> Tensor:
        return ops.unpack(summed, mask, out=tensor) if packs else tensor

    if exact:
        _sum_in_rank_order(moved, group, divisor)
        done: Future[Tensor] = Future()
        done.set_result(finish(moved))
        return done, moved.numel()
    if divisor != 1:
        moved.div_(divisor)
    work = dist.all_reduce(moved, group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda f: finish(f.value()[0])), moved.numel()


def _sum_in_rank_order(values: Tensor, group: Group, divisor: int) -> None:
    """values = sum over ranks / divisor. Each rank sums one share of all ranks, then all gather."""
    world = dist.get_world_size(group)
    share = -(-values.numel() // world)
    own = values.new_zeros(world * share)
    own[: values.numel()] = values.view(-1)
    columns = torch.empty_like(own)
    dist.all_to_all_single(columns, own, group=group)
    total = torch.zeros(share, dtype=torch.float64, device=values.device)
    for row in columns.view(world, share):
        total += row
    rounded = (total / divisor).float().to(values.dtype)
    dist.all_gather(list(own.view(world, share).unbind()), rounded, group=group)
    values.view(-1).copy_(own[: values.numel()])


def check_same_mask(params: FlatParameters, group: Group = None) -> None:
    """Raise unless all ranks hold the same mask. Call it after a pruning: 16 bytes per rank.

    Raises:
        ValueError: on every rank, naming the ranks whose mask differs from the first one's.
    """
    own = torch.tensor(list(params.mask.digest()), dtype=torch.uint8, device=params.values.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    rows = [row.tolist() for row in every]
    if odd := [rank for rank, row in enumerate(rows) if row != rows[0]]:
        raise ValueError(f"mask: expected rank 0's on all ranks, got others on ranks {odd}")


class PackedHook:
    """A DDP communication hook that reduces the gradients of survivors only.

    Pruned gradients become +0.0 on every rank; masked optimizers never read them. With two ranks
    the weights' bits are those of DDP without a hook.

    Args:
        params: the flattened model inside DDP. The mask is read at each step, so pruning in mid-run
            needs no more than the new mask on each rank.
        group: process group of the DDP model; None: the default one.
        exact: as in `packed_all_reduce`, from four ranks on the way to the same bits whatever the
            backend; it runs without overlap with the backward pass.
        dense_above: buckets of more density than this are not packed.

    Attributes:
        bytes: what this rank put into all-reduces so far: 4 (nnz + tail) per step in float32.

    Example: `PackedHook(params).register(ddp)`, before the first backward.
    """

    def __init__(
        self,
        params: FlatParameters,
        *,
        group: Group = None,
        exact: bool = False,
        dense_above: float = DENSE_ABOVE,
    ) -> None:
        self.params = params
        self.group = group
        self.exact = exact
        self.dense_above = dense_above
        self.bytes = 0
        self._mask: Mask | None = None
        self._keep = torch.empty(0, dtype=torch.bool, device="cpu")
        self._buckets: dict[tuple[int, ...], Mask] = {}

    def register(self, ddp: DistributedDataParallel) -> None:
        """Make `ddp` use this hook; raises ValueError if the ranks' masks differ."""
        check_same_mask(self.params, self.group)
        ddp.register_comm_hook(self, PackedHook._run)

    def _run(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]  # torch hides it
        buffer = bucket.buffer()
        mask = self._bucket_mask(bucket.parameters())
        world = dist.get_world_size(self.group)  # divided by first, as DDP does
        done, count = _reduce(buffer, mask, self.group, self.exact, self.dense_above, world)
        self.bytes += count * buffer.element_size()
        return done

    def _bucket_mask(self, parameters: list[Tensor]) -> Mask:
        """The mask over a bucket's buffer. O(numel) once per mask and bucket.

        Buckets are known by what is in them: DDP rebuilds them after the first backward.
        """
        if self._mask is not self.params.mask:
            self._mask = self.params.mask
            self._keep = self._mask.to_bool()
            self._buckets = {}
        key = tuple(p.data_ptr() for p in parameters)
        if key not in self._buckets:
            bits = torch.cat([self._survivors(p) for p in parameters])
            self._buckets[key] = Mask.from_bool(bits)
        return self._buckets[key]

    def _survivors(self, p: Tensor) -> Tensor:
        start = p.storage_offset() - self.params.values.storage_offset()
        inside = p.untyped_storage().data_ptr() == self.params.values.untyped_storage().data_ptr()
        if inside and start < self.params.layout.prunable_numel:
            return self._keep[start : start + p.numel()]
        return self._keep.new_ones(p.numel())  # the tail, or a parameter that was not flattened


class ShardMasks:
    """A mask over a model that FSDP2 has sharded: each rank holds the bits of its own shards.

    Args:
        model: after `fully_shard`; its parameters are DTensors, sharded by rows.
        layout: of the whole model, made before sharding: `FlatLayout.from_state_dict`.
        mask: over `layout.prunable_numel`, the same on each rank.

    Attributes:
        masks: parameter name to Mask over this rank's shard.

    Raises:
        ValueError: a prunable parameter that the model lacks, or of another shape.
    """

    def __init__(self, model: nn.Module, layout: FlatLayout, mask: Mask) -> None:
        layout.check_mask(mask)
        found = dict(model.named_parameters())
        self._shards: dict[str, Tensor] = {}
        self.masks: dict[str, Mask] = {}
        for name, bits in layout.mask_dict(mask).items():
            p = found.get(name)
            if p is None or tuple(p.shape) != tuple(bits.shape):
                got = "none" if p is None else tuple(p.shape)
                raise ValueError(f"{name}: expected shape {tuple(bits.shape)}, got {got}")
            self._shards[name] = p
            if isinstance(p, DTensor):  # from the whole to a shard of it: nothing travels
                whole = DTensor.from_local(
                    bits.to(p.device), p.device_mesh, [Replicate()] * p.device_mesh.ndim
                )
                bits = whole.redistribute(placements=p.placements).to_local()
            self.masks[name] = Mask.from_bool(bits.contiguous())

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Write +0.0 to this rank's pruned weights."""
        for name, p in self._shards.items():
            local = p.to_local() if isinstance(p, DTensor) else p
            ops.zero_pruned_(local, self.masks[name])

    def register(self, optimizer: torch.optim.Optimizer) -> Any:
        """Zero the pruned weights now and after each step of any optimizer; returns the handle."""
        self.zero_pruned()
        return optimizer.register_step_post_hook(lambda *_: self.zero_pruned())
