"""One case an op, in one registry: `fedmap-sparse bench` and benchmarks/ run the same.

Peers get their outputs, masks and indices beforehand: their best form. A floor counts each byte
that has to move once, so an op cannot be below it but by luck.
"""

from __future__ import annotations

import importlib.util
import zlib

import torch
from torch import Tensor

from fedmap_sparse import _backends, ops
from fedmap_sparse._backends import native
from fedmap_sparse._checks import short
from fedmap_sparse.bench import floors
from fedmap_sparse.bench.case import (
    CheckFailed,
    Peer,
    Setting,
    Trial,
    case,
    same,
    same_mask,
)
from fedmap_sparse.bench.expected import expected_mask
from fedmap_sparse.codec._crc32c import crc32c_reference
from fedmap_sparse.mask import Mask
from fedmap_sparse.ops.quantize import cast_reference


def select_peers(values: Tensor, keep: int) -> dict[str, Peer]:
    magnitude = values.abs()
    top = (values.new_empty(keep), torch.empty(keep, dtype=torch.int64, device=values.device))
    kth = (values.new_empty(()), torch.empty((), dtype=torch.int64, device=values.device))
    at = values.numel() - keep
    peers = {
        "torch.topk": Peer(lambda: torch.topk(magnitude, keep, sorted=False, out=top)),
        "torch.kthvalue": Peer(lambda: torch.kthvalue(magnitude, at + 1, out=kth)),
    }
    if values.device.type == "cpu" and values.dtype != torch.bfloat16:  # numpy has none
        source = magnitude.numpy()
        scratch = source.copy()

        def reset() -> None:
            scratch[:] = source

        peers["numpy partition"] = Peer(lambda: scratch.partition(at), reset)
    if values.device.type == "cuda":
        ordered = (
            torch.empty_like(values),
            torch.empty(values.shape, dtype=torch.int64, device=values.device),
        )
        peers["torch.sort"] = Peer(lambda: torch.sort(magnitude, out=ordered))
        peers |= cupy_sort(magnitude)
    return peers


def cupy_sort(magnitude: Tensor) -> dict[str, Peer]:
    """cub's radix sort, by way of CuPy; nothing where CuPy is not installed or lacks the dtype."""
    if magnitude.dtype == torch.bfloat16 or importlib.util.find_spec("cupy") is None:
        return {}
    import cupy

    scratch = magnitude.clone()
    array = cupy.asarray(scratch)
    return {"cupy sort": Peer(array.sort, lambda: scratch.copy_(magnitude))}


@case("select", densities=(0.5, 0.1, 0.01), peers_from=("cupy",))
def select(s: Setting) -> Trial:
    values = s.values()
    words = torch.empty((s.n + 31) // 32, dtype=torch.int32, device=s.device)

    def ours() -> Mask:
        return ops.magnitude_mask(values, s.keep)

    nbytes = values.nbytes + words.nbytes
    bytes_read = torch.empty(nbytes // 4 + 16, dtype=torch.int32)
    bytes_read.zero_()
    return Trial(
        ours,
        lambda: same_mask("magnitude_mask", ours(), expected_mask(values, s.keep)),
        nbytes,
        floors.read(bytes_read, nbytes),
        select_peers(values, s.keep) if s.keep else {},
    )


@case("select_packed", densities=(0.1,))
def select_packed(s: Setting) -> Trial:
    """The next round: four fifths of the packed survivors, beside a selection over everything."""
    values = s.values()
    packed = ops.pack(values, s.mask(values))
    keep = round(0.8 * s.keep)

    def ours() -> Mask:
        return ops.magnitude_mask(packed, keep)

    return Trial(
        ours,
        lambda: same_mask("magnitude_mask", ours(), expected_mask(packed, keep)),
        packed.nbytes + packed.numel() // 8,
        floors.read(packed),
        {"select over all": Peer(lambda: ops.magnitude_mask(values, s.keep))},
    )


@case("select_within", densities=(0.1,))
def select_within(s: Setting) -> Trial:
    """The next round in place: four fifths of a mask's survivors in the dense buffer."""
    values = s.values()
    within = s.mask(values)
    keep = round(0.8 * s.keep)

    def ours() -> Mask:
        return ops.magnitude_mask(values, keep, within=within)

    def check() -> None:
        packed = ops.pack(values, within, backend="reference")
        expected = ops.deposit(expected_mask(packed, keep), within, backend="reference")
        same_mask("magnitude_mask", ours(), expected)

    lines = floors.touched_bytes(within, values.element_size())
    return Trial(
        ours,
        check,
        lines + 2 * within.words.nbytes,
        floors.together(
            floors.read(values, lines), floors.copy(within.words, torch.empty_like(within.words))
        ),
    )


@case("pack", densities=(0.1,))
def pack(s: Setting) -> Trial:
    values = s.values()
    mask = s.mask(values)
    out, other = values.new_empty(mask.nnz), values.new_empty(mask.nnz)
    kept = mask.to_bool()
    index = kept.nonzero().view(-1)

    def ours() -> Tensor:
        return ops.pack(values, mask, out=out)

    lines = floors.touched_bytes(mask, values.element_size())
    return Trial(
        ours,
        lambda: same("pack", ours(), ops.pack(values, mask, backend="reference")),
        mask.words.nbytes + lines + out.nbytes,
        floors.together(
            floors.read(values, mask.words.nbytes + lines - out.nbytes), floors.copy(other, out)
        ),
        {
            "masked_select": Peer(lambda: torch.masked_select(values, kept, out=other)),
            "index_select": Peer(lambda: torch.index_select(values, 0, index, out=other)),
        },
    )


@case("unpack", densities=(0.1,))
def unpack(s: Setting) -> Trial:
    values = s.values()
    mask = s.mask(values)
    packed = ops.pack(values, mask, backend="reference")
    out, other = torch.empty_like(values), torch.zeros_like(values)
    kept = mask.to_bool()
    index = kept.nonzero().view(-1)

    def ours() -> Tensor:
        return ops.unpack(packed, mask, out=out)

    nbytes = mask.words.nbytes + packed.nbytes + out.nbytes
    return Trial(
        ours,
        lambda: same("unpack", ours(), ops.unpack(packed, mask, backend="reference")),
        nbytes,
        floors.copy(values, torch.empty_like(values), nbytes // 2),
        {
            # Without zero_, which it would need wherever the mask changes.
            "masked_scatter_": Peer(lambda: other.masked_scatter_(kept, packed)),
            "zero_ + index_copy_": Peer(lambda: other.zero_().index_copy_(0, index, packed)),
        },
    )


@case("extract", densities=(0.1,))
def extract(s: Setting) -> Trial:
    """The child keeps four fifths of the parent, as in the next round."""
    values = s.values()
    parent = s.mask(values)
    child = ops.magnitude_mask(values, round(0.8 * s.keep))
    child_bool, parent_bool = child.to_bool(), parent.to_bool()
    out = torch.empty(parent.nnz, dtype=torch.bool, device=s.device)
    nbytes = child.words.nbytes + parent.words.nbytes + parent.nnz // 8

    def ours() -> Mask:
        return ops.extract(child, parent)

    return Trial(
        ours,
        lambda: same_mask("extract", ours(), ops.extract(child, parent, backend="reference")),
        nbytes,
        _words_floor(child.words, parent.words, written=parent.nnz // 8),
        {
            "masked_select of bools": Peer(
                lambda: torch.masked_select(child_bool, parent_bool, out=out)
            )
        },
    )


@case("deposit", densities=(0.1,))
def deposit(s: Setting) -> Trial:
    values = s.values()
    parent = s.mask(values)
    child = ops.magnitude_mask(values, round(0.8 * s.keep))
    kept = ops.extract(child, parent)
    kept_bool, parent_bool = kept.to_bool(), parent.to_bool()
    out = torch.zeros(s.n, dtype=torch.bool, device=s.device)

    def ours() -> Mask:
        return ops.deposit(kept, parent)

    return Trial(
        ours,
        lambda: same_mask("deposit", ours(), child),
        kept.words.nbytes + parent.words.nbytes + child.words.nbytes,
        _words_floor(kept.words, parent.words, written=child.words.nbytes),
        {"masked_scatter_ of bools": Peer(lambda: out.masked_scatter_(parent_bool, kept_bool))},
    )


def _words_floor(first: Tensor, second: Tensor, *, written: int) -> floors.Stream:
    """Reads both bitmaps and writes as many bytes as the result has."""
    source = torch.cat([first, second])
    target = torch.empty_like(source)
    return floors.together(
        floors.copy(source, target, written),
        floors.read(source[written // 4 :], source.nbytes - written),
    )


@case("accumulate", densities=(0.5,))
def accumulate(s: Setting) -> Trial:
    """The clients' packed survivors: `density * n` values each."""
    clients = s.clients
    payloads = [s.values(seed=c, n=s.keep) for c in range(clients)]
    weights = [float(100 + 7 * c) for c in range(clients)]
    out, other = torch.empty_like(payloads[0]), torch.empty_like(payloads[0])
    shares = torch.tensor([w / sum(weights) for w in weights], device=s.device)
    stacked = torch.empty(clients, s.keep, dtype=s.dtype, device=s.device)
    alphas, column = shares.tolist(), shares.to(s.dtype)[:, None]

    def ours() -> Tensor:
        return ops.weighted_mean(payloads, weights, out=out)

    def loop() -> Tensor:
        torch.mul(payloads[0], alphas[0], out=other)
        for payload, alpha in zip(payloads[1:], alphas[1:], strict=True):
            other.add_(payload, alpha=alpha)
        return other

    def stack() -> Tensor:
        torch.stack(payloads, out=stacked)
        return torch.sum(stacked.mul_(column), 0, out=other)

    return Trial(
        ours,
        lambda: same(
            "weighted_mean", ours(), ops.weighted_mean(payloads, weights, backend="reference")
        ),
        (clients + 1) * out.nbytes,
        floors.together(*(floors.read(p) for p in payloads[:-1]), floors.copy(payloads[-1], other)),
        {"add_ loop": Peer(loop), "stack, weighted sum": Peer(stack)},
        clients=clients,
    )


@case("cast_float16", densities=(1.0,), dtypes=(torch.float32,), group="quantize")
def cast_float16(s: Setting) -> Trial:
    return _cast(s, torch.float16)


@case("cast_bfloat16", densities=(1.0,), dtypes=(torch.float32,), group="quantize")
def cast_bfloat16(s: Setting) -> Trial:
    return _cast(s, torch.bfloat16)


def _cast(s: Setting, dtype: torch.dtype) -> Trial:
    values = s.values()
    out, other = torch.empty_like(values, dtype=dtype), torch.empty_like(values, dtype=dtype)

    def ours() -> Tensor:
        return ops.cast(values, dtype, out=out)[0]

    return Trial(
        ours,
        lambda: same(f"cast to {short(dtype)}", ours(), cast_reference(values, dtype)),
        values.nbytes + out.nbytes,
        floors.together(floors.read(values, values.nbytes - out.nbytes), floors.copy(other, out)),
        {"copy_": Peer(lambda: other.copy_(values))},
    )


@case("quantize_int8", densities=(1.0,), dtypes=(torch.float32,), group="quantize")
def quantize_int8(s: Setting) -> Trial:
    """With error feedback. The check for finite values reads the input once more; its codes and
    scales are new tensors, as there is no `out=` form.
    """
    values = s.values()
    residual = torch.zeros_like(values)

    def ours() -> tuple[Tensor, Tensor]:
        return ops.quantize_int8(values, residual=residual)

    def check() -> None:
        start = s.normal(seed=1) * 1e-2
        results = []
        for backend in (None, "reference"):
            feedback = start.clone()
            q, scales = ops.quantize_int8(values, residual=feedback, backend=backend)
            results.append((q, scales, feedback))
        for name, got, expected in zip(("q", "scales", "residual"), *results, strict=True):
            same(f"quantize_int8.{name}", got, expected)

    q = torch.empty(s.n, dtype=torch.int8, device=s.device)
    return Trial(
        ours,
        check,
        values.nbytes + 2 * residual.nbytes + q.nbytes,
        floors.together(
            floors.read(values, values.nbytes - q.nbytes),
            floors.copy(values, q, q.nbytes),
            floors.inplace(torch.zeros_like(residual)),
        ),
    )


@case("crc32c", densities=(1.0,), dtypes=(torch.float32,), devices=("cpu",))
def crc32c(s: Setting) -> Trial:
    """Of the values' bytes. Beside zlib's CRC-32, which is another polynomial."""
    values = s.values()
    raw = values.numpy().data.cast("B")

    def ours(nbytes: int = values.nbytes) -> int:
        return int(native.crc32c(values.view(torch.uint8)[:nbytes], 0, _backends.threads()))

    def check() -> None:
        prefix = min(values.nbytes, 1 << 16)
        level = native.isa()
        fast = ours()
        native.set_isa("scalar")
        try:
            slow = ours()
        finally:
            native.set_isa(level)
        if fast != slow or ours(prefix) != crc32c_reference(bytes(raw[:prefix])):
            raise CheckFailed("crc32c: expected the table-driven and bitwise values")

    return Trial(
        ours,
        check,
        values.nbytes,
        floors.read(values),
        {"zlib.crc32": Peer(lambda: zlib.crc32(raw))},
    )
