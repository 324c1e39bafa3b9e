"""The C++ extension. Buffers are tensors, or integer addresses (`tensor.data_ptr()`), 0 for none;
dtype codes are 0 float32, 1 float16, 2 bfloat16, 3 int8; `threads` <= 0 means all of the machine's.

Addresses are trusted: the checks are in `fedmap_sparse.ops`. Tensors are seen to be contiguous, on
the CPU, and of dtypes and sizes that agree; else it is a ValueError or, with `attempt`, None, and
nothing is written. `attempt` declines subclasses of torch.Tensor too.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_Tensors = Sequence[Tensor | None]
_Answer = int | None
_Fault = tuple[str, int] | None
"""What is wrong with a payload, and at which byte."""

def isa() -> str: ...
def isa_levels() -> list[str]: ...
def isa_probe() -> str: ...
def set_isa(name: str, /) -> None: ...
def pool_threads() -> int: ...
def rank_index(words: int, numel: int, rank: int, threads: int, /) -> int: ...
def mask_from_bools(bools: int, numel: int, words: int, threads: int, /) -> None: ...
def mask_to_bools(words: int, numel: int, bools: int, threads: int, /) -> None: ...
def mask_subset(a: int, b: int, numel: int, threads: int, /) -> bool: ...
def mask_digest(words: int, numel: int, threads: int, /) -> bytes: ...
def select(
    values: _Tensors,
    within: _Tensors,
    eligible: int,
    keep: int,
    words: _Tensors,
    ranks: _Tensors,
    threads: int,
    attempt: bool,
    /,
) -> _Answer: ...
def select_reads() -> int: ...
def zero_pruned(
    values: int, before: int, after: int, numel: int, dtype: int, threads: int, /
) -> None: ...
def pack(
    values: Tensor,
    words: Tensor,
    rank: Tensor,
    numel: int,
    out: Tensor,
    threads: int,
    attempt: bool,
    /,
) -> _Answer: ...
def unpack(
    packed: Tensor,
    words: Tensor,
    rank: Tensor,
    numel: int,
    out: Tensor,
    threads: int,
    attempt: bool,
    /,
) -> _Answer: ...
def extract(
    child: Tensor,
    parent: Tensor,
    parent_rank: Tensor,
    numel: int,
    out: Tensor,
    rank: Tensor,
    threads: int,
    attempt: bool,
    /,
) -> _Answer: ...
def deposit(
    kept: Tensor,
    parent: Tensor,
    parent_rank: Tensor,
    numel: int,
    out: Tensor,
    rank: Tensor,
    threads: int,
    attempt: bool,
    /,
) -> _Answer: ...
def read_gradients(
    values: Tensor,
    parameters: list[Tensor],
    owners: list[dict[str, Any]],
    keys: list[str],
    segments: int,
    /,
) -> int: ...
def same_tree(
    links: list[tuple[dict[str, Any], str, Any]], sizes: list[tuple[dict[str, Any], int]], /
) -> bool: ...
def written_unseen(
    values: Tensor, words: Tensor, rank: Tensor, prunable: int, rows: Tensor, turn: int, /
) -> bool: ...
def masked_sgd(
    values: Tensor,
    words: Tensor,
    rank: Tensor,
    prunable: int,
    grads: _Tensors | None,
    rows: Tensor,
    scalars: Tensor,
    momentum: Tensor | None,
    master: Tensor | None,
    threads: int,
    attempt: bool,
    /,
) -> _Answer: ...
def masked_adamw(
    values: Tensor,
    words: Tensor,
    rank: Tensor,
    prunable: int,
    grads: _Tensors | None,
    rows: Tensor,
    scalars: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    master: Tensor | None,
    threads: int,
    attempt: bool,
    /,
) -> _Answer: ...
def weighted_mean(
    payloads: _Tensors,
    weights: list[float],
    out: Tensor,
    threads: int,
    attempt: bool,
    /,
) -> _Answer: ...
def weighted_mean_int8(
    payloads: list[int],
    scales: list[int],
    block: int,
    weights: list[float],
    n: int,
    out: int,
    out_dtype: int,
    threads: int,
    /,
) -> int: ...
def accumulate_add(
    sums: int, payload: int, dtype: int, weight: float, n: int, threads: int, /
) -> None: ...
def accumulate_add_int8(
    sums: int, payload: int, scales: int, block: int, weight: float, n: int, threads: int, /
) -> None: ...
def accumulate_mean(
    sums: int, total_weight: float, n: int, out: int, out_dtype: int, threads: int, /
) -> int: ...
def cast(src: int, src_dtype: int, dst: int, dst_dtype: int, n: int, threads: int, /) -> int: ...
def all_finite(src: int, dtype: int, n: int, threads: int, /) -> bool: ...
def quantize_int8(
    src: int, n: int, block: int, q: int, scales: int, residual: int, threads: int, /
) -> None: ...
def dequantize_int8(q: int, scales: int, block: int, n: int, dst: int, threads: int, /) -> None: ...
def ranks_at(words: int, rank: int, positions: int, count: int, out: int, /) -> None: ...
def encode_mask(
    words: int,
    starts: int,
    numels: int,
    runs: int,
    codes: int,
    chunk_steps: int,
    out: int,
    capacity: int,
    threads: int,
    /,
) -> int: ...
def decode_mask(
    payload: int,
    size: int,
    starts: int,
    numels: int,
    runs: int,
    numel: int,
    words: int,
    threads: int,
    /,
) -> _Fault: ...
def encode_values(
    values: int, dtype: int, n: int, out: int, capacity: int, threads: int, /
) -> int: ...
def decode_values(
    payload: int, size: int, dtype: int, n: int, out: int, threads: int, /
) -> _Fault: ...
def check_values(
    payload: int, size: int, dtype: int, n: int, threads: int, /
) -> tuple[_Fault, bool]: ...
def add_values(
    payload: int, size: int, dtype: int, n: int, sums: int, weight: float, threads: int, /
) -> _Fault: ...
def crc32c(data: int, nbytes: int, crc: int, threads: int, /) -> int: ...
def stream_read(src: int, nbytes: int, threads: int, /) -> int: ...
def stream_copy(src: int, dst: int, nbytes: int, threads: int, /) -> None: ...
def stream_inplace(buf: int, nbytes: int, threads: int, /) -> None: ...
def stream_touched(buf: int, words: int, numel: int, threads: int, /) -> None: ...
