"""Mask: which elements of a flat index space survive. A bitmap, a rank index, a digest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse._backends import native

#: Elements per entry of the rank index.
BLOCK = 2048

_K0, _K1, _K2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def num_words(numel: int) -> int:
    """32-bit words of a bitmap over `numel` elements."""
    return (numel + 31) // 32


def num_ranks(numel: int) -> int:
    """Entries of the rank index over `numel` elements: one a block of 2048, and the total."""
    return (numel + BLOCK - 1) // BLOCK + 1


def unfilled(like: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Words and rank of a mask over `numel` elements, for an op to fill."""
    return (
        like.new_empty(num_words(numel), dtype=torch.int32),
        like.new_empty(num_ranks(numel), dtype=torch.int64),
    )


_WORD = torch.empty(0, dtype=torch.int32, device="cpu")
_RANK = torch.empty(0, dtype=torch.int64, device="cpu")


def unfilled_cpu(numel: int) -> tuple[Tensor, Tensor]:
    """The same of a mask on the CPU: 1.6 us instead of 2.2, as no dtype has to be parsed."""
    return _WORD.new_empty(num_words(numel)), _RANK.new_empty(num_ranks(numel))


class Mask:
    """An immutable set of survivors over `numel` elements.

    Attributes:
        words: int32 tensor of ceil(numel / 32) words. Element i is bit `i & 31` of word `i >> 5`,
            as in `numpy.packbits(bitorder="little")`. Bits past `numel` are 0.
        rank: int64 tensor; entry b counts the survivors before element 2048 b, the last all.
        numel: size of the index space, a Python int.
        nnz: survivors, a Python int (so that shapes of packed tensors are static).

    Make one with `full`, `empty`, `from_bool`, `from_words` or an op. `a <= b` is the subset test,
    `& | ~` combine masks of one size, `==` compares bits; a mask pickles and hashes by its bits.
    """

    __slots__ = ("_digest", "nnz", "numel", "rank", "words")

    def __init__(self, words: Tensor, rank: Tensor, numel: int, nnz: int) -> None:
        # For the package's own use: the caller vouches that the four agree.
        self.words = words
        self.rank = rank
        self.numel = numel
        self.nnz = nnz
        self._digest: bytes | None = None

    @staticmethod
    def full(numel: int, device: torch.device | str = "cpu") -> Mask:
        """Every one of `numel` elements survives."""
        words = torch.full((num_words(_size(numel)),), -1, dtype=torch.int32, device=device)
        if numel & 31:
            words[-1] = (1 << (numel & 31)) - 1
        starts = torch.arange(num_ranks(numel), dtype=torch.int64, device=device)
        return Mask(words, (starts * BLOCK).clamp_(max=numel), numel, numel)

    @staticmethod
    def empty(numel: int, device: torch.device | str = "cpu") -> Mask:
        """None of `numel` elements survives."""
        words = torch.zeros(num_words(_size(numel)), dtype=torch.int32, device=device)
        rank = torch.zeros(num_ranks(numel), dtype=torch.int64, device=device)
        return Mask(words, rank, numel, 0)

    @staticmethod
    def from_bool(keep: Tensor) -> Mask:
        """From a contiguous bool tensor of any shape, read in row-major order. O(numel)."""
        _checks.check_tensor("keep", keep, (torch.bool,))
        words = torch.empty(num_words(keep.numel()), dtype=torch.int32, device=keep.device)
        if _backends.pick(None, keep.device) == "cpu":
            native.mask_from_bools(
                keep.data_ptr(), keep.numel(), words.data_ptr(), _backends.threads()
            )
        else:
            words.copy_(words_from_bool(keep))
        return _with_rank(words, keep.numel())

    @staticmethod
    def from_words(words: Tensor, numel: int) -> Mask:
        """From a bitmap. The tensor is taken over, not copied: do not write to it afterwards.

        Raises:
            TypeError: `words` is not int32.
            ValueError: its size is not ceil(numel / 32), or a bit past `numel` is set.
        """
        _checks.check_tensor("words", words, (torch.int32,))
        _checks.check_numel("words", words, num_words(_size(numel)), f"ceil({numel} / 32)")
        if numel & 31 and (int(words[-1]) & 0xFFFFFFFF) >> (numel & 31):
            raise ValueError(f"words: a bit past numel={numel} is set in the last word")
        return _with_rank(words.reshape(-1), numel)

    def to_bool(self) -> Tensor:
        """The mask as a 1-D bool tensor of `numel` elements. O(numel)."""
        if _backends.pick(None, self.device) == "cpu":
            out = torch.empty(self.numel, dtype=torch.bool)
            native.mask_to_bools(
                self.words.data_ptr(), self.numel, out.data_ptr(), _backends.threads()
            )
            return out
        return bool_from_words(self.words, self.numel)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def density(self) -> float:
        """`nnz / numel`; 0.0 when empty. For a model's density see `FlatParameters.density`."""
        return self.nnz / self.numel if self.numel else 0.0

    def to(self, device: torch.device | str) -> Mask:
        if torch.device(device) == self.device:
            return self
        moved = Mask(self.words.to(device), self.rank.to(device), self.numel, self.nnz)
        moved._digest = self._digest
        return moved

    def digest(self) -> bytes:
        """16 bytes that change with the bits and with `numel`; kept after the first call.

        A sum over 64-bit words of position-keyed mixes (splitmix64's middle state and its output),
        so that it runs in parallel at memory speed on every backend. It detects mistakes; it is no
        authentication. Defined in docs/format.md.
        """
        if self._digest is None:
            self._digest = _digest(self.words, self.numel)
        return self._digest

    def __le__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        self._check_peer(other)
        if _backends.pick(None, self.device) == "cpu":
            return bool(
                native.mask_subset(
                    self.words.data_ptr(), other.words.data_ptr(), self.numel, _backends.threads()
                )
            )
        return not bool((self.words & ~other.words).any())

    def __and__(self, other: Mask) -> Mask:
        self._check_peer(other)
        return _with_rank(self.words & other.words, self.numel)

    def __or__(self, other: Mask) -> Mask:
        self._check_peer(other)
        return _with_rank(self.words | other.words, self.numel)

    def __invert__(self) -> Mask:
        return _with_rank(~self.words & Mask.full(self.numel, self.device).words, self.numel)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return (
            self.numel == other.numel
            and self.nnz == other.nnz
            and self.device == other.device
            and torch.equal(self.words, other.words)
        )

    def __hash__(self) -> int:
        return hash(self.digest())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.words.cpu().numpy(), self.numel)

    def __repr__(self) -> str:
        return f"Mask(numel={self.numel}, nnz={self.nnz}, density={self.density:.4g})"

    def _check_peer(self, other: Mask) -> None:
        _checks.check_mask("other", other, self.numel)
        _checks.check_device("other", other.words, self.device)


def _size(numel: int) -> int:
    if isinstance(numel, bool) or not isinstance(numel, int):
        raise TypeError(f"numel: expected an int, got {type(numel).__name__}")
    if numel < 0:
        raise ValueError(f"numel: expected at least 0, got {numel}")
    return numel


def _unpickle(words: np.ndarray, numel: int) -> Mask:
    return Mask.from_words(torch.from_numpy(words), numel)


def _with_rank(words: Tensor, numel: int) -> Mask:
    rank = rank_index(words, numel, _backends.pick(None, words.device))
    return Mask(words, rank, numel, int(rank[-1]))


def rank_index(words: Tensor, numel: int, backend: str) -> Tensor:
    """Survivors before each block of 2048 elements, and in all: int64. O(numel / 32)."""
    if backend == "cpu":
        rank = torch.empty(num_ranks(numel), dtype=torch.int64)
        native.rank_index(words.data_ptr(), numel, rank.data_ptr(), _backends.threads())
        return rank
    if backend == "triton":
        scan = _backends.kernels("_scan").rank_index
        index: Tensor = _backends.on_device(scan, (words, numel))
        return index
    rank = torch.zeros(num_ranks(numel), dtype=torch.int64, device=words.device)
    if numel:
        bits = bool_from_words(words, 32 * words.numel())
        padded = torch.nn.functional.pad(bits, (0, -bits.numel() % BLOCK))
        torch.cumsum(padded.view(-1, BLOCK).sum(1), 0, out=rank[1:])
    return rank


def _digest(words: Tensor, numel: int) -> bytes:
    backend = _backends.pick(None, words.device)
    if backend == "cpu":
        return bytes(native.mask_digest(words.data_ptr(), numel, _backends.threads()))
    if backend == "triton":
        digest = _backends.kernels("_digest").digest
        return bytes(_backends.on_device(digest, (words, numel)))
    return digest_reference(words, numel)


def words_from_bool(keep: Tensor) -> Tensor:
    """Reference: bits to int32 words, plain torch."""
    flat = keep.reshape(-1)
    bits = torch.nn.functional.pad(flat, (0, -flat.numel() % 32)).view(-1, 32).to(torch.int64)
    shifts = torch.arange(32, device=keep.device)
    return (bits << shifts).sum(1).to(torch.int32)  # the cast wraps, as two's complement does


def bool_from_words(words: Tensor, numel: int) -> Tensor:
    """Reference: int32 words to bits, plain torch."""
    shifts = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words[:, None] >> shifts) & 1).bool().reshape(-1)[:numel]


def digest_reference(words: Tensor, numel: int) -> bytes:
    """Reference of `Mask.digest`, on any device: torch's int64 wraps, and its >> keeps the sign."""
    even = torch.nn.functional.pad(words, (0, words.numel() % 2))
    j = torch.arange(1, even.numel() // 2 + 1, device=words.device)
    t = even.view(torch.int64) + j * _signed(_K0)
    t = (t ^ ((t >> 30) & ((1 << 34) - 1))) * _signed(_K1)
    t ^= (t >> 27) & ((1 << 37) - 1)
    u = t * _signed(_K2)
    u ^= (u >> 31) & ((1 << 33) - 1)
    sums: list[int] = torch.stack([t.sum(), u.sum()]).tolist()
    both = ((h + numel * k) & ((1 << 64) - 1) for h, k in zip(sums, (1, _K0), strict=True))
    return b"".join(h.to_bytes(8, "little") for h in both)


def _signed(k: int) -> int:
    return k - (1 << 64) if k >> 63 else k
