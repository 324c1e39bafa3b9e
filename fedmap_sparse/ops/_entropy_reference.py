"""The entropy coder in NumPy throughout: any size, slow, what the others are compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse.errors import PayloadError
from fedmap_sparse.mask import bool_from_words, words_from_bool
from fedmap_sparse.ops import _rans_reference as rans
from fedmap_sparse.ops._payload import (
    ENTRY,
    ESCAPE,
    ONES_COMMON,
    SPLIT,
    STEP_BITS,
    VALUE_CHUNK,
    Runs,
    all_ones,
    coded_runs,
    density_table,
    mask_head,
    open_mask,
    open_values,
    pad4,
)


def _plan(
    coded: list[tuple[int, int, int]], steps: int, chunk: int
) -> tuple[rans.Array, rans.Array, int]:
    """(active [chunks, chunk, 32], frequency [chunks, chunk, 16], chunks)."""
    chunks = -(-steps // chunk)
    chunk = min(chunk, steps) if chunks == 1 else chunk
    active = np.zeros((chunks * chunk, rans.LANES), bool)
    frequency = np.zeros((chunks * chunk, 16), np.int64)
    frequency[:, 0] = rans.SUM
    at = 0
    for _, n, code in coded:
        count, nibbles = -(-n // STEP_BITS), -(-n // 4)
        frequency[at : at + count] = density_table(code)
        active[at : at + count].reshape(-1)[:nibbles] = True
        at += count
    shape = (chunks, chunk)
    return active.reshape(*shape, -1), frequency.reshape(*shape, -1), chunks


def encode_mask(words: Tensor, runs: Runs, codes: Tensor, chunk: int) -> Tensor:
    coded, steps = coded_runs(runs, codes.tolist())
    head = mask_head(codes, chunk, steps)
    if not steps:
        return torch.frombuffer(bytearray(head), dtype=torch.uint8)
    active, frequency, _ = _plan(coded, steps, chunk)
    bits = bool_from_words(words, 32 * words.numel()).numpy()
    symbols = np.zeros(active.size, np.uint8)
    at = 0
    for start, n, code in coded:
        run = np.full(-(-n // 4) * 4, bool(code & ONES_COMMON))
        run[:n] = bits[start : start + n]
        nibbles = run.reshape(-1, 4) @ np.array([1, 2, 4, 8], np.uint8)
        symbols[at : at + nibbles.size] = nibbles
        at += -(-n // STEP_BITS) * rans.LANES
    states, coded_words = rans.encode(symbols.reshape(active.shape), active, frequency)
    sizes = np.array([w.size for w in coded_words], "<u4")
    body = sizes.tobytes() + states.astype("<u4").tobytes()
    body += b"".join(w.astype("<u2").tobytes() for w in coded_words)
    return torch.frombuffer(bytearray(head + body), dtype=torch.uint8)


def decode_mask(payload: Tensor, runs: Runs, numel: int) -> Tensor:
    opened = open_mask(payload, runs)
    bits = np.zeros(numel, bool)
    if opened.steps:
        active, frequency, _ = _plan(opened.coded, opened.steps, opened.chunk)
        words = np.frombuffer(payload.numpy(), "<u2", -1, opened.words_at)
        parts = np.split(words, np.cumsum(opened.sizes)[:-1])
        symbols = rans.decode(opened.states, parts, active, frequency)
        if isinstance(symbols, int):
            raise opened.broken(symbols)
        flat, at = symbols.reshape(-1), 0
        for start, n, code in opened.coded:
            nibbles = flat[at : at + -(-n // 4)]
            run = np.unpackbits(nibbles[:, None], axis=1, count=4, bitorder="little").reshape(-1)
            if (run[n:] != bool(code & ONES_COMMON)).any():
                raise opened.broken((at // rans.LANES + -(-n // STEP_BITS) - 1) // opened.chunk)
            bits[start : start + n] = run[:n]
            at += -(-n // STEP_BITS) * rans.LANES
    for start, end in all_ones(runs, opened.codes):
        bits[start:end] = True
    return words_from_bool(torch.from_numpy(bits))


def _value_plan(n: int) -> tuple[rans.Array, int]:
    """(active [chunks, 1024, 32], chunks)."""
    chunks = -(-n // VALUE_CHUNK)
    active = np.arange(chunks * VALUE_CHUNK) < n
    return active.reshape(chunks, -1, rans.LANES), chunks


def _best_top(exponents: rans.Array, bits: int) -> int:
    counts = np.bincount(exponents, minlength=1 << bits)
    before = np.concatenate([[0], np.cumsum(counts)])
    tops = np.arange(1 << bits)
    return int((before[tops + 1] - before[np.maximum(tops - ESCAPE + 1, 0)]).argmax())


def encode_values(values: Tensor) -> Tensor:
    e_bits, low_bits, high_bits, kind = SPLIT[values.dtype]
    v = values.detach().contiguous().view(torch.uint8).numpy().view(kind).astype(np.int64)
    n, mantissa = v.size, low_bits + high_bits - 1
    exponents = v >> mantissa & (1 << e_bits) - 1
    sign = v >> (e_bits + mantissa)
    high = sign << (high_bits - 1) | (v & (1 << mantissa) - 1) >> low_bits
    active, chunks = _value_plan(n)
    entries = np.zeros(chunks, ENTRY)
    symbols = np.zeros(active.shape, np.uint8).reshape(chunks, -1)
    escapes = []
    for c in range(chunks):
        part = exponents[c * VALUE_CHUNK : (c + 1) * VALUE_CHUNK]
        top = _best_top(part, e_bits)
        s = np.where((part <= top) & (part > top - ESCAPE), top - part, ESCAPE)
        counts = np.bincount(s, minlength=16)
        f = np.where(
            counts, np.maximum(1, (2 * counts * rans.SUM + part.size) // (2 * part.size)), 0
        )
        f[f.argmax()] += rans.SUM - f.sum()
        escapes.append(part[s == ESCAPE].astype(np.uint8).tobytes())
        entries[c]["top"], entries[c]["escapes"], entries[c]["frequency"] = top, counts[ESCAPE], f
        symbols[c, : part.size] = s
    tables = np.repeat(entries["frequency"].astype(np.int64)[:, None], active.shape[1], 1)
    states, words = rans.encode(symbols.reshape(active.shape), active, tables)
    entries["words"] = [w.size for w in words]
    bits = (high[:, None] >> np.arange(high_bits) & 1).astype(np.uint8)
    parts = [
        entries.tobytes(),
        states.astype("<u4").tobytes(),
        (v & (1 << low_bits) - 1).astype(f"<u{low_bits // 8}").tobytes() if low_bits else b"",
        np.packbits(bits.reshape(-1), bitorder="little").tobytes(),
        b"".join(w.astype("<u2").tobytes() for w in words),
        b"".join(escapes),
    ]
    return torch.frombuffer(bytearray(b"".join(map(pad4, parts))), dtype=torch.uint8)


def decode_values(payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    e_bits, low_bits, high_bits, kind = SPLIT[dtype]
    data = payload.numpy()
    opened = open_values(payload, n, dtype)
    entries, sizes = opened.entries, opened.sizes
    _, low_at, high_at, words_at = opened.parts
    active, _ = _value_plan(n)
    words = np.frombuffer(data, "<u2", int(sizes.sum()), words_at)
    tables = np.repeat(entries["frequency"].astype(np.int64)[:, None], active.shape[1], 1)
    symbols = rans.decode(opened.states, np.split(words, np.cumsum(sizes)[:-1]), active, tables)
    if isinstance(symbols, int):
        raise PayloadError("words or escapes that do not decode", 40 * symbols)
    exponents = np.repeat(entries["top"].astype(np.int64), VALUE_CHUNK) - symbols.reshape(-1)
    escaped = (symbols.reshape(-1) == ESCAPE) & active.reshape(-1)
    at = opened.escapes_at
    for c, e in enumerate(entries):
        chunk = slice(c * VALUE_CHUNK, (c + 1) * VALUE_CHUNK)
        here = np.frombuffer(data, np.uint8, int(e["escapes"]), at)
        at += here.size
        plain = exponents[chunk][active.reshape(-1)[chunk] & ~escaped[chunk]]
        if escaped[chunk].sum() != here.size or (here >= 1 << e_bits).any() or (plain < 0).any():
            raise PayloadError("words or escapes that do not decode", 40 * c)
        exponents[chunk][escaped[chunk]] = here
    high_bytes = np.frombuffer(data, np.uint8, -(-n * high_bits // 8), high_at)
    bits = np.unpackbits(high_bytes, count=n * high_bits, bitorder="little").reshape(n, high_bits)
    high = bits.astype(np.int64) @ (1 << np.arange(high_bits))
    low = np.frombuffer(data, f"<u{low_bits // 8}", n, low_at).astype(np.int64) if low_bits else 0
    mantissa = low_bits + high_bits - 1
    v = (high >> (high_bits - 1)) << (e_bits + mantissa) | exponents[:n] << mantissa
    v |= (high & (1 << (high_bits - 1)) - 1) << low_bits | low
    return torch.from_numpy(v.astype(kind).view(np.uint8)).view(dtype)
