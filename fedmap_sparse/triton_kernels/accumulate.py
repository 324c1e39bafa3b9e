"""Weighted mean of packed payloads: one launch for any number of clients, float64 sums."""

from __future__ import annotations

import struct

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmap_sparse.triton_kernels._bits import FLOAT16, FLOAT32, KINDS, block_of, narrow, raw, widen
from fedmap_sparse.triton_kernels._launch import cdiv, launch
from fedmap_sparse.triton_kernels._tables import to_device


@triton.jit
def _add_payload(sums, payload, weight, offsets, inside, KIND: tl.constexpr):
    x = widen(tl.load(payload + offsets, mask=inside, other=0), KIND)
    return sums + x.to(tl.float64) * weight


@triton.jit
def _round_once(x, KIND: tl.constexpr):
    """float64 to the bits of a value. To 16 bits by way of float32 rounded to odd, which makes the
    second rounding exact (Boldo and Melquiond 2008)."""
    single = x.to(tl.float32)
    if KIND == FLOAT32:
        bits = narrow(single, KIND)
    else:
        exact = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        near = single.to(tl.float64).to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        inexact = (near != exact) & (exact < 0x7FF0000000000000)
        away = (inexact & (near > exact)).to(tl.int32)
        odd = (single.to(tl.int32, bitcast=True) - away) | inexact.to(tl.int32)
        bits = narrow(odd.to(tl.float32, bitcast=True), KIND)
    return bits


@triton.jit
def store_mean(sums, total, out, bad, offsets, inside, KIND: tl.constexpr):
    bits = _round_once(sums / total, KIND)
    tl.store(out + offsets, bits, mask=inside)
    if KIND == FLOAT32:
        infinite = (bits & 0x7FFFFFFF) >= 0x7F800000
    else:
        infinite = (bits & 0x7FFF) >= (0x7C00 if KIND == FLOAT16 else 0x7F80)
    count = tl.sum((infinite & inside).to(tl.int32), 0)
    tl.atomic_add(bad, count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit
def _mean_of_tile(
    table, out, bad, clients, offsets, inside, FROM: tl.constexpr, TO: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros((BLOCK,), tl.float64)
    for client in range(clients):
        payload = tl.load(table + client)
        if FROM == FLOAT32:
            pointer = payload.to(tl.pointer_type(tl.int32), bitcast=True)
        else:
            pointer = payload.to(tl.pointer_type(tl.int16), bitcast=True)
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        weight = tl.load(table + clients + client).to(tl.float64, bitcast=True)
        sums = _add_payload(sums, pointer, weight, offsets, inside, FROM)
    total = tl.load(table + 2 * clients).to(tl.float64, bitcast=True)
    store_mean(sums, total, out, bad, offsets, inside, TO)


@triton.jit(do_not_specialize=["clients", "n"])
def _weighted_mean(
    table, out, bad, clients, n, FROM: tl.constexpr, TO: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`table` holds the clients' addresses, then their weights, then the total, as bits."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:  # a mask that is always true does not split wide accesses
        _mean_of_tile(table, out, bad, clients, offsets, offsets >= 0, FROM, TO, ALIGNED, BLOCK)
    else:  # a mask that ends at a multiple of 16 does not either: 70 registers without it on sm_90
        whole = n // 16 * 16
        _mean_of_tile(table, out, bad, clients, offsets, offsets < whole, FROM, TO, ALIGNED, BLOCK)
        rest = whole + tl.arange(0, 16).to(tl.int64)
        _mean_of_tile(table, out, bad, clients, rest, rest < n, FROM, TO, ALIGNED, 16)


@triton.jit
def _add_to_tile(sums, payload, weight, offsets, inside, KIND: tl.constexpr):
    held = tl.load(sums + offsets, mask=inside, other=0.0)
    tl.store(
        sums + offsets, _add_payload(held, payload, weight, offsets, inside, KIND), mask=inside
    )


@triton.jit(do_not_specialize=["weight", "n"])
def _accumulate_add(sums, payload, weight: tl.int64, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """`weight` is a float64 as bits: a float argument would arrive as float32."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    w = weight.to(tl.int64).to(tl.float64, bitcast=True)
    if start + BLOCK <= n:
        _add_to_tile(sums, payload, w, offsets, offsets >= 0, KIND)
    else:
        _add_to_tile(sums, payload, w, offsets, offsets < n, KIND)


@triton.jit
def _mean_of_sums(sums, total, out, bad, offsets, inside, KIND: tl.constexpr):
    held = tl.load(sums + offsets, mask=inside, other=0.0)
    store_mean(held, total, out, bad, offsets, inside, KIND)


@triton.jit(do_not_specialize=["total", "n"])
def _accumulate_mean(sums, total: tl.int64, out, bad, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    t = total.to(tl.int64).to(tl.float64, bitcast=True)
    if start + BLOCK <= n:
        _mean_of_sums(sums, t, out, bad, offsets, offsets >= 0, KIND)
    else:
        whole = n // 16 * 16
        _mean_of_sums(sums, t, out, bad, offsets, offsets < whole, KIND)
        rest = whole + tl.arange(0, 16).to(tl.int64)
        _mean_of_sums(sums, t, out, bad, rest, rest < n, KIND)


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


def weighted_mean_out(payloads: list[Tensor], weights: list[float], out: Tensor) -> Tensor:
    """The mean into `out`; how many of its elements are not finite, on the device."""
    bad = torch.zeros((), dtype=torch.int64, device=out.device)
    if not out.numel():
        return bad
    total = 0.0
    for weight in weights:
        total += weight
    table = np.array(
        [*(p.data_ptr() for p in payloads), *map(_bits, weights), _bits(total)], np.int64
    )
    block, warps = block_of(*payloads, out)
    launch(
        _weighted_mean,
        (cdiv(out.numel(), block),),
        to_device(table, out.device),
        raw(out),
        bad,
        len(payloads),
        out.numel(),
        FROM=KINDS[payloads[0].dtype],
        TO=KINDS[out.dtype],
        ALIGNED=block > 32 * warps,
        BLOCK=block,
        num_warps=warps,
    )
    return bad


def accumulate_add_(sums: Tensor, payload: Tensor, weight: float) -> None:
    """`sums += weight * payload`, float64."""
    if not sums.numel():
        return
    block, warps = block_of(sums, payload)
    launch(
        _accumulate_add,
        (cdiv(sums.numel(), block),),
        sums,
        raw(payload),
        _bits(weight),
        sums.numel(),
        KIND=KINDS[payload.dtype],
        BLOCK=block,
        num_warps=warps,
    )


def accumulate_mean_out(sums: Tensor, total: float, out: Tensor) -> Tensor:
    """`sums / total` into `out`, rounded once; how many are not finite, on the device."""
    bad = torch.zeros((), dtype=torch.int64, device=out.device)
    if not out.numel():
        return bad
    block, warps = block_of(sums, out)
    launch(
        _accumulate_mean,
        (cdiv(out.numel(), block),),
        sums,
        _bits(total),
        raw(out),
        bad,
        out.numel(),
        KIND=KINDS[out.dtype],
        BLOCK=block,
        num_warps=warps,
    )
    return bad
