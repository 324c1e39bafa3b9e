"""Small inputs of each op and the bytes that come out, in ops.txt, which two programs read: the
package's tests (tests/ops/test_vectors.py) and the self-check of the kernels, without Python
(tests/native/selfcheck/check_vectors.cpp).

One vector a line: the op, `name=value` for each input, `->`, `name=value` for each output. Tensors
are a dtype and the hex of their little-endian bytes; masks are their words, int32, over `numel`
elements. `python tests/vectors/op_vectors.py` adds the vectors that are missing, from the
references in plain torch, and never changes one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import Mask, ops
from fedmap_sparse.ops import entropy
from fedmap_sparse.ops._payload import Runs, chunk_steps, density_codes
from fedmap_sparse.ops.accumulate import add_int8_

FILE = Path(__file__).parent / "ops.txt"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Fields = dict[str, Any]


def spelled(value: Any) -> str:
    if isinstance(value, Tensor):
        data = value.detach().contiguous().view(torch.uint8).numpy().tobytes().hex()
        return f"{str(value.dtype).removeprefix('torch.')}:{data}"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)


def parsed(text: str) -> Any:
    kind, colon, data = text.partition(":")
    if colon:
        raw = torch.frombuffer(bytearray.fromhex(data), dtype=torch.uint8)
        return raw.view(getattr(torch, kind))
    if kind[0].isalpha():
        return getattr(torch, kind)
    return float(kind) if set(kind) & set(".e") else int(kind)


def line(op: str, given: Fields, wanted: Fields) -> str:
    def fields(values: Fields) -> list[str]:
        return [f"{name}={spelled(value)}" for name, value in values.items()]

    return " ".join([op, *fields(given), "->", *fields(wanted)])


def read() -> Iterator[tuple[str, Fields, Fields]]:
    """(op, inputs, outputs) of each vector."""
    for text in FILE.read_text().splitlines():
        head, tail = text.split(" -> ")
        op, *given = head.split()
        yield op, _fields(given), _fields(tail.split())


def _fields(words: list[str]) -> Fields:
    return {name: parsed(value) for name, value in (word.split("=") for word in words)}


def _mask(given: Fields, name: str = "mask") -> Mask:
    return Mask.from_words(given[name], given["numel"])


def _select(x: Fields, backend: str) -> Fields:
    within = _mask(x, "within")
    return {
        "words": ops.magnitude_mask(x["values"], x["keep"], within=within, backend=backend).words
    }


def _zero_pruned(x: Fields, backend: str) -> Fields:
    values = x["values"].clone()
    ops.zero_pruned_(values, _mask(x), before=_mask(x, "before"), backend=backend)
    return {"values": values}


def _pack(x: Fields, backend: str) -> Fields:
    mask = _mask(x)
    out = torch.empty(mask.nnz, dtype=x["to"], device="cpu")
    return {"packed": ops.pack(x["values"], mask, out=out, backend=backend)}


def _unpack(x: Fields, backend: str) -> Fields:
    out = torch.empty(x["numel"], dtype=x["to"], device="cpu")
    return {"values": ops.unpack(x["packed"], _mask(x), out=out, backend=backend)}


def _extract(x: Fields, backend: str) -> Fields:
    child = ops.extract(_mask(x), _mask(x, "parent"), backend=backend)
    return {"words": child.words}


def _deposit(x: Fields, backend: str) -> Fields:
    parent = _mask(x, "parent")
    bits = Mask.from_words(x["bits"], parent.nnz)
    return {"words": ops.deposit(bits, parent, backend=backend).words}


def _stepped(x: Fields, *states: str) -> Fields:
    """Copies of what a step changes; float32 values have no masters."""
    wide = x["values"].dtype == torch.float32
    return {name: x[name].clone() for name in ("values", *states, *([] if wide else ["master"]))}


def _masked_sgd(x: Fields, backend: str) -> Fields:
    now = _stepped(x, "momentum_buffer")
    how = {name: x[name] for name in ("lr", "momentum", "dampening", "weight_decay")}
    rest = {name: t for name, t in now.items() if name != "values"}
    ops.masked_sgd_(now["values"], _mask(x), x["gradient"], **how, **rest, backend=backend)
    return now


def _masked_adamw(x: Fields, backend: str) -> Fields:
    now = _stepped(x, "exp_avg", "exp_avg_sq")
    how = {name: x[name] for name in ("lr", "eps", "weight_decay", "step")}
    how["betas"] = (x["beta1"], x["beta2"])
    rest = {name: t for name, t in now.items() if name != "values"}
    ops.masked_adamw_(now["values"], _mask(x), x["gradient"], **how, **rest, backend=backend)
    return now


def _weighted_mean(x: Fields, backend: str) -> Fields:
    weights = x["weights"].tolist()
    payloads = list(x["payloads"].view(len(weights), -1))
    out = torch.empty(payloads[0].numel(), dtype=x["to"], device="cpu")
    return {"mean": ops.weighted_mean(payloads, weights, out=out, backend=backend)}


def _accumulate(x: Fields, backend: str) -> Fields:
    accumulator = ops.Accumulator(x["sums"].numel(), backend=backend)
    accumulator.sums = x["sums"].clone()
    accumulator.add(x["payload"], x["weight"])
    return {"sums": accumulator.sums}


def _accumulate_int8(x: Fields, backend: str) -> Fields:
    if backend == "reference":
        payload = _dequantize_int8(x, backend)["values"]
        return _accumulate({**x, "payload": payload}, backend)
    sums = x["sums"].clone()
    add_int8_(sums, x["q"], x["scales"], x["block"], x["weight"])
    return {"sums": sums}


def _cast(x: Fields, backend: str) -> Fields:
    out, overflowed = ops.cast(x["values"], x["to"], backend=backend)
    return {"cast": out, "overflowed": overflowed}


def _quantize_int8(x: Fields, backend: str) -> Fields:
    residual = x["residual"].clone()
    q, scales = ops.quantize_int8(x["values"], block=x["block"], residual=residual, backend=backend)
    return {"q": q, "scales": scales, "residual": residual}


def _dequantize_int8(x: Fields, backend: str) -> Fields:
    return {"values": ops.dequantize_int8(x["q"], x["scales"], block=x["block"], backend=backend)}


def _trimmed_mean(x: Fields, backend: str) -> Fields:
    rows = list(x["vectors"].view(x["count"], -1))
    return {"mean": ops.trimmed_mean(rows, x["trim"], backend=backend)}


def _squared_distances(x: Fields, backend: str) -> Fields:
    rows = list(x["vectors"].view(x["count"], -1))
    return {"among": ops.squared_distances(rows, backend=backend).reshape(-1)}


def _clip_difference(x: Fields, backend: str) -> Fields:
    values = x["values"].clone()
    ops.clip_difference_(values, x["start"], x["max_norm"], backend=backend)
    return {"values": values}


def _add_gaussian(x: Fields, backend: str) -> Fields:
    values = x["values"].clone()
    ops.add_gaussian_(values, x["std"], seed=x["seed"], stream=x["stream"], backend=backend)
    return {"values": values}


def _to_fixed(x: Fields, backend: str) -> Fields:
    how = {name: x[name] for name in ("clip", "scale", "weight")}
    steps, beyond = ops.to_fixed(x["values"], **how, backend=backend)
    return {"steps": steps, "beyond": beyond}


def _from_fixed(x: Fields, backend: str) -> Fields:
    return {"values": ops.from_fixed(x["steps"], x["divisor"], backend=backend)}


def _encode_mask(x: Fields, backend: str) -> Fields:
    mask = _mask(x)
    runs = Runs(*(torch.tensor([k], device="cpu") for k in (0, mask.numel)))
    nnz = torch.tensor([mask.nnz], device="cpu")
    return {"payload": entropy.encode_mask(mask.words, runs, nnz, 1 << 20, backend=backend)}


def _encode_values(x: Fields, backend: str) -> Fields:
    return {"payload": entropy.encode_values(x["values"], 1 << 20, backend=backend)}


RUNS: dict[str, Callable[[Fields, str], Fields]] = {
    "select": _select,
    "zero_pruned": _zero_pruned,
    "pack": _pack,
    "unpack": _unpack,
    "extract": _extract,
    "deposit": _deposit,
    "masked_sgd": _masked_sgd,
    "masked_adamw": _masked_adamw,
    "weighted_mean": _weighted_mean,
    "accumulate": _accumulate,
    "accumulate_int8": _accumulate_int8,
    "cast": _cast,
    "quantize_int8": _quantize_int8,
    "dequantize_int8": _dequantize_int8,
    "trimmed_mean": _trimmed_mean,
    "squared_distances": _squared_distances,
    "clip_difference": _clip_difference,
    "add_gaussian": _add_gaussian,
    "to_fixed": _to_fixed,
    "from_fixed": _from_fixed,
    "encode_mask": _encode_mask,
    "encode_values": _encode_values,
}

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.17549435e-38, 5.9604645e-8, 2.9802322e-8, 6.0975552e-5]
SPECIAL += [65504.0, 65519.996, 65520.0, -65520.0, 3.3961775e38, 3.40282347e38, 1.00048828]
SPECIAL += [1.00390625, 1.01171875, float("inf"), -float("inf")]


def _numbers(count: int, seed: int) -> list[int]:
    x = [(seed << 32) + i for i in range(1, count + 1)]
    x = [v * 0x9E3779B97F4A7C15 & (1 << 64) - 1 for v in x]
    return [(v ^ v >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1 for v in x]


def _values(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of 16 magnitudes around 1, from integers alone."""
    bits = [
        (v >> 63) << 31 | (118 + (v >> 50) % 16) << 23 | (v >> 20) & 0x7FFFFF
        for v in _numbers(count, seed)
    ]
    wide = torch.tensor([struct.unpack("<f", struct.pack("<I", b))[0] for b in bits])
    return ops.cast(wide, dtype, backend="reference")[0]


def _special(count: int, seed: int, dtype: torch.dtype) -> Tensor:
    picks = [v >> 40 for v in _numbers(count, seed)]
    wide = torch.where(
        torch.tensor([v % 3 == 0 for v in picks]),
        torch.tensor([SPECIAL[v // 3 % len(SPECIAL)] for v in picks]),
        _values(count, seed + 1),
    )
    return ops.cast(wide, dtype, backend="reference")[0]


def _tied(count: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Of three magnitudes, 0.25 and its two successors, so that the limit falls within one."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    quarter = torch.tensor(0.25, dtype=dtype).view(bits)
    steps = torch.tensor([(v >> 33) % 3 for v in _numbers(count, seed)])
    return (quarter + steps).to(bits).view(dtype)


def _bits(count: int, percent: int, seed: int) -> Mask:
    keep = [(v >> 33) % 100 < percent for v in _numbers(count, seed)]
    return Mask.from_bool(torch.tensor(keep))


def inputs() -> Iterator[tuple[str, Fields]]:
    """Each op on sizes that end within a vector and within a word. New ones go to the end."""
    n = 205
    few, half = _bits(n, 10, 1), _bits(n, 50, 2)
    for dtype in DTYPES:
        within = {"numel": 1100, "within": _bits(1100, 70, 3).words}
        yield "select", {"values": _special(1100, 4, dtype), "keep": 300, **within}
        two = {"numel": n, "mask": few.words, "before": half.words}
        yield "zero_pruned", {"values": _special(n, 5, dtype), **two}
        for mask in (few, half):
            over = {"numel": n, "mask": mask.words}
            for to in (dtype, DTYPES[(DTYPES.index(dtype) + 1) % 3]):
                yield "pack", {"values": _special(n, 6, dtype), **over, "to": to}
                yield "unpack", {"packed": _special(mask.nnz, 7, dtype), **over, "to": to}
            yield from _steps(mask, dtype)
        for to in DTYPES:
            yield "cast", {"values": _special(n, 8, dtype), "to": to}
        many = {"payloads": _values(5 * n, 9, dtype)}
        weights = torch.tensor([1.0, 2.5, 0.75, 3.0, 1.125], dtype=torch.float64)
        yield "weighted_mean", {**many, "weights": weights, "to": dtype}
        sums = _values(n, 10).double() / 3
        yield "accumulate", {"sums": sums, "payload": _values(n, 11, dtype), "weight": 1.7}
        yield "encode_values", {"values": _special(n, 12, dtype)}
    both = {"mask": (few & half).words, "parent": half.words}
    yield "extract", {"numel": n, **both}
    yield "deposit", {"numel": n, "bits": _bits(half.nnz, 40, 13).words, "parent": half.words}
    residual = _values(n, 14) * 2.0**-8
    yield "quantize_int8", {"values": _values(n, 15), "block": 64, "residual": residual}
    q = torch.tensor([(v >> 40) % 255 - 127 for v in _numbers(n, 16)], dtype=torch.int8)
    scales = _values(4, 17).abs()
    yield "dequantize_int8", {"q": q, "scales": scales, "block": 64}
    yield "trimmed_mean", {"vectors": _values(7 * 77, 18), "count": 7, "trim": 2}
    yield "squared_distances", {"vectors": _values(4 * n, 19), "count": 4}
    pair = {"values": _values(n, 20), "start": _values(n, 21)}
    yield "clip_difference", {**pair, "max_norm": 10.0}
    yield "add_gaussian", {"values": _values(n, 22), "std": 0.7, "seed": 42, "stream": 3}
    fixed = {"clip": 2.0, "scale": 1e4, "weight": 3}
    yield "to_fixed", {"values": _values(n, 23), **fixed}
    steps = torch.tensor([(v >> 40) - (1 << 23) for v in _numbers(n, 24)], dtype=torch.int32)
    yield "from_fixed", {"steps": steps, "divisor": 3e4}
    for mask in (_bits(1500, 12, 25), _bits(1500, 75, 26)):
        size, nnz = torch.tensor([mask.numel]), torch.tensor([mask.nnz])
        codes = density_codes(size, nnz)
        plan = {"codes": codes, "chunk": chunk_steps(size, codes, entropy.CHUNK_BYTES)}
        yield "encode_mask", {"numel": mask.numel, "mask": mask.words, **plan}
    for dtype in DTYPES:
        yield "select", {"values": _tied(1100, 27, dtype), "keep": 300, **within}
    sums = _values(n, 28).double() / 3
    yield "accumulate_int8", {"sums": sums, "q": q, "scales": scales, "block": 64, "weight": 1.7}


def _steps(mask: Mask, dtype: torch.dtype) -> Iterator[tuple[str, Fields]]:
    values = _values(mask.numel, 30, dtype)
    ops.zero_pruned_(values, mask, backend="reference")
    step = {"numel": mask.numel, "mask": mask.words, "values": values}
    step["gradient"] = _values(mask.numel, 31, dtype)
    if dtype != torch.float32:
        step["master"] = ops.pack(values, mask, backend="reference").float() * (1 + 2**-13)
    sgd = {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}
    yield "masked_sgd", {**step, "momentum_buffer": _values(mask.nnz, 32), **sgd}
    adam = {"exp_avg": _values(mask.nnz, 33), "exp_avg_sq": _values(mask.nnz, 34).abs()}
    adam |= {"lr": 0.05, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    yield "masked_adamw", {**step, **adam, "step": 3}


def main() -> None:
    stored = FILE.read_text().splitlines() if FILE.exists() else []
    lines = [line(op, given, RUNS[op](given, "reference")) for op, given in inputs()]
    if lines[: len(stored)] != stored:
        raise SystemExit(f"{FILE.name} holds other vectors than these, and is not rewritten")
    FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
