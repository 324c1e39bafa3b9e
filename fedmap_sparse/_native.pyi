"""The C++ extension. dtype codes are 0 float32, 1 float16, 2 bfloat16, 3 int8; `threads` <= 0 means
all of the machine's.

Tensors are seen to be contiguous, on the CPU, and of dtypes and sizes that agree; else it is a
ValueError or, with `attempt`, None, and nothing is written. `attempt` declines subclasses of
torch.Tensor too.
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
def rank_index(words: Tensor, numel: int, rank: Tensor, threads: int, /) -> int: ...
def mask_from_bools(bools: Tensor, words: Tensor, threads: int, /) -> None: ...
def mask_to_bools(words: Tensor, bools: Tensor, threads: int, /) -> None: ...
def mask_subset(a: Tensor, b: Tensor, threads: int, /) -> bool: ...
def mask_digest(words: Tensor, numel: int, threads: int, /) -> bytes: ...
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
    values: Tensor, before: Tensor | None, after: Tensor, threads: int, attempt: bool, /
) -> _Answer: ...
def pack(
    values: Tensor, words: Tensor, rank: Tensor, out: Tensor, threads: int, attempt: bool, /
) -> _Answer: ...
def unpack(
    packed: Tensor, words: Tensor, rank: Tensor, out: Tensor, threads: int, attempt: bool, /
) -> _Answer: ...
def extract(
    mask: Tensor,
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
    bits: Tensor,
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
    rows: Tensor,
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
    payloads: _Tensors, weights: list[float], out: Tensor, threads: int, attempt: bool, /
) -> _Answer: ...
def accumulate_add(
    sums: Tensor, payload: Tensor, weight: float, threads: int, attempt: bool, /
) -> _Answer: ...
def accumulate_add_int8(
    sums: Tensor,
    q: Tensor,
    scales: Tensor,
    block: int,
    weight: float,
    threads: int,
    attempt: bool,
    /,
) -> _Answer: ...
def accumulate_mean(
    sums: Tensor, total: float, out: Tensor, threads: int, attempt: bool, /
) -> _Answer: ...
def cast(values: Tensor, out: Tensor, threads: int, attempt: bool, /) -> _Answer: ...
def all_finite(values: Tensor, threads: int, attempt: bool, /) -> _Answer: ...
def quantize_int8(
    values: Tensor,
    block: int,
    q: Tensor,
    scales: Tensor,
    residual: Tensor | None,
    threads: int,
    attempt: bool,
    /,
) -> _Answer: ...
def dequantize_int8(
    q: Tensor, scales: Tensor, block: int, out: Tensor, threads: int, attempt: bool, /
) -> _Answer: ...
def ranks_at(words: Tensor, rank: Tensor, positions: Tensor, out: Tensor, /) -> None: ...
def encode_mask(
    words: Tensor,
    starts: Tensor,
    numels: Tensor,
    codes: Tensor,
    chunk_steps: int,
    out: Tensor,
    threads: int,
    /,
) -> int: ...
def decode_mask(
    payload: Tensor,
    starts: Tensor,
    numels: Tensor,
    numel: int,
    words: Tensor,
    threads: int,
    /,
) -> _Fault: ...
def encode_values(values: Tensor, out: Tensor, threads: int, /) -> int: ...
def decode_values(payload: Tensor, out: Tensor, threads: int, /) -> _Fault: ...
def check_values(
    payload: Tensor, dtype: int, numel: int, threads: int, /
) -> tuple[_Fault, bool]: ...
def add_values(
    payload: Tensor, dtype: int, sums: Tensor, weight: float, threads: int, /
) -> _Fault: ...
def crc32c(data: Tensor | bytes | bytearray | memoryview, crc: int, threads: int, /) -> int: ...
def stream_read(data: Tensor | bytes | bytearray | memoryview, threads: int, /) -> int: ...
def stream_copy(src: Tensor, dst: Tensor, threads: int, /) -> None: ...
def stream_inplace(buffer: Tensor, threads: int, /) -> None: ...
def stream_touched(buffer: Tensor, words: Tensor, numel: int, threads: int, /) -> None: ...
