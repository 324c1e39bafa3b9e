"""Mask: which elements of a flat index space survive. A bitmap, a rank index, a digest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks, _transfer
from fedmap_sparse._backends import native

#: Elements per entry of the rank index.
BLOCK = 2048

_K0, _K1, _K2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def num_words(numel: int) -> int:
    """32-bit words of a bitmap over `numel` elements."""
    return (numel + 31) // 32


def num_ranks(numel: int) -> int:
    """Entries of the rank index over `numel` elements: one per block of 2048, and the total."""
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
    """Words and rank on the CPU: 1.6 us instead of 2.2, as no dtype has to be parsed."""
    return _WORD.new_empty(num_words(numel)), _RANK.new_empty(num_ranks(numel))


def check_mask(name: str, mask: object, numel: int | None = None) -> None:
    """Raise unless `mask` is a Mask, over `numel` elements where that is given."""
    if not isinstance(mask, Mask):
        raise TypeError(f"{name}: expected a Mask, got {type(mask).__name__}")
    if numel is not None and mask.numel != numel:
        raise ValueError(f"{name}: expected a mask over {numel} elements, got {mask.numel}")


class Mask:
    """An immutable set of survivors over `numel` elements.

    Make one with `full`, `empty`, `from_bool`, `from_words`, `cat` or an op. Masks over as many
    elements and on one device combine as sets do: `a & b`, `a | b`, `a - b`, `a ^ b`, `~a`;
    `a <= b` tells whether a is a subset of b, `a == b` whether their bits are the same. A mask
    pickles, hashes by its bits, and loads with `torch.load(weights_only=True)`.

    Attributes:
        words: int32 tensor of ceil(numel / 32) words. Element i is bit `i & 31` of word `i >> 5`,
            as in `numpy.packbits(bitorder="little")`. Bits past `numel` are 0.
        rank: int64 tensor; entry b counts the survivors before element 2048 b, the last all.
        numel: size of the index space, a Python int.
        nnz: number of survivors, a Python int (so that shapes of packed tensors are static).

    >>> import torch
    >>> a = Mask.from_bool(torch.tensor([True, True, False, False]))
    >>> b = Mask.from_bool(torch.tensor([True, False, True, False]))
    >>> (a - b).to_bool()
    tensor([False,  True, False, False])
    >>> a & b <= a
    True
    >>> Mask.cat([a, b])
    Mask(numel=8, nnz=4, density=0.5)
    """

    __slots__ = ("_digest", "nnz", "numel", "rank", "words")

    def __init__(self, words: Tensor, rank: Tensor, numel: int, nnz: int) -> None:
        # For the package's own use. Precondition: the four agree.
        if not torch.compiler.is_dynamo_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # a mask outlives the mode: autograd saves it
                words, rank = words.clone(), rank.clone()
        self.words = words
        self.rank = rank
        self.numel = numel
        self.nnz = nnz
        self._digest: bytes | None = None

    @staticmethod
    def full(numel: int, device: torch.device | str = "cpu") -> Mask:
        """A mask that keeps every one of `numel` elements. O(numel / 32).

        Raises:
            TypeError: `numel` is no int.
            ValueError: it is negative.
        """
        numel = _size(numel)
        words = torch.full((num_words(numel),), -1, dtype=torch.int32, device=device)
        if numel & 31:
            words[-1] = (1 << (numel & 31)) - 1
        starts = torch.arange(num_ranks(numel), dtype=torch.int64, device=device)
        return Mask(words, (starts * BLOCK).clamp_(max=numel), numel, numel)

    @staticmethod
    def empty(numel: int, device: torch.device | str = "cpu") -> Mask:
        """A mask that keeps none of `numel` elements. Errors and cost as in `full`."""
        numel = _size(numel)
        words = torch.zeros(num_words(numel), dtype=torch.int32, device=device)
        rank = torch.zeros(num_ranks(numel), dtype=torch.int64, device=device)
        return Mask(words, rank, numel, 0)

    @staticmethod
    def from_bool(keep: Tensor) -> Mask:
        """A mask of the elements that are true.

        Args:
            keep: contiguous bool tensor of any shape, read in row-major order.

        Raises:
            TypeError: another dtype.
            ValueError: a tensor that is not contiguous.

        O(numel).
        """
        _checks.check_tensor("keep", keep, (torch.bool,))
        words = torch.empty(num_words(keep.numel()), dtype=torch.int32, device=keep.device)
        if _backends.pick(None, keep.device) == "cpu":
            native.mask_from_bools(keep, words, _backends.threads())
        else:
            words.copy_(words_from_bool(keep))
        return _with_rank(words, keep.numel())

    @staticmethod
    def from_words(words: Tensor, numel: int) -> Mask:
        """A mask from its bitmap.

        Args:
            words: int32 tensor of ceil(numel / 32) words, laid out as the attribute `words`. It is
                taken over, not copied: do not write to it afterwards.
            numel: size of the index space.

        Raises:
            TypeError: `words` is not int32.
            ValueError: its size is not ceil(numel / 32), or a bit past `numel` is set.

        O(numel / 32).
        """
        _checks.check_tensor("words", words, (torch.int32,))
        _checks.check_numel("words", words, num_words(_size(numel)), f"ceil({numel} / 32)")
        if numel & 31 and (int(words[-1]) & 0xFFFFFFFF) >> (numel & 31):
            raise ValueError(f"words: a bit past numel={numel} is set in the last word")
        if not torch.compiler.is_compiling() and words.is_inference():
            words = words.clone()  # which autograd can save
        return _with_rank(words.reshape(-1), numel)

    @staticmethod
    def cat(masks: Sequence[Mask]) -> Mask:
        """One mask over the elements of all `masks`, one after another, as `torch.cat`.

        Raises:
            TypeError: a member is no Mask.
            ValueError: no masks, or masks on several devices.

        O(numel / 32) where every mask but the last has a multiple of 32 elements, else O(numel).
        """
        masks = list(masks)
        if not masks:
            raise ValueError("masks: expected at least one, got none")
        for mask in masks:
            check_mask("masks", mask)
            _checks.check_device("masks", mask.words, masks[0].device)
        if any(mask.numel & 31 for mask in masks[:-1]):
            return Mask.from_bool(torch.cat([mask.to_bool() for mask in masks]))
        words = torch.cat([mask.words for mask in masks])
        return _with_rank(words, sum(mask.numel for mask in masks))

    def to_bool(self) -> Tensor:
        """The mask as a 1-D bool tensor of `numel` elements. O(numel)."""
        if _backends.pick(None, self.device) == "cpu":
            out = torch.empty(self.numel, dtype=torch.bool, device="cpu")
            native.mask_to_bools(self.words, out, _backends.threads())
            return out
        return bool_from_words(self.words, self.numel)

    @property
    def device(self) -> torch.device:
        """Where `words` and `rank` are."""
        return self.words.device

    @property
    def density(self) -> float:
        """`nnz / numel`; 0.0 when empty. For a model's density see `FlatParameters.density`."""
        return self.nnz / self.numel if self.numel else 0.0

    def to(self, device: torch.device | str) -> Mask:
        """The mask on `device`; itself where it is there already."""
        if torch.device(device) == self.device:
            return self
        moved = Mask(self.words.to(device), self.rank.to(device), self.numel, self.nnz)
        moved._digest = self._digest
        return moved

    def digest(self) -> bytes:
        """16 bytes that change with the bits and with `numel`; kept after the first call.

        A sum over 64-bit words of position-keyed mixes (splitmix64's middle state and its output),
        so that it runs in parallel at memory speed on every backend. It detects mistakes; it is no
        authentication. Defined in docs/format.md. O(numel / 32).
        """
        if self._digest is None:
            self._digest = _digest(self.words, self.numel)
        return self._digest

    def __le__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        self._check_peer(other)
        if _backends.pick(None, self.device) == "cpu":
            return bool(native.mask_subset(self.words, other.words, _backends.threads()))
        return not bool((self.words & ~other.words).any())

    def __and__(self, other: Mask) -> Mask:
        self._check_peer(other)
        return _with_rank(self.words & other.words, self.numel)

    def __or__(self, other: Mask) -> Mask:
        self._check_peer(other)
        return _with_rank(self.words | other.words, self.numel)

    def __sub__(self, other: Mask) -> Mask:
        self._check_peer(other)
        return _with_rank(self.words & ~other.words, self.numel)

    def __xor__(self, other: Mask) -> Mask:
        self._check_peer(other)
        return _with_rank(self.words ^ other.words, self.numel)

    def __invert__(self) -> Mask:
        return _with_rank(~self.words & Mask.full(self.numel, self.device).words, self.numel)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        _checks.check_device("other", other.words, self.device)
        return (
            self.numel == other.numel
            and self.nnz == other.nnz
            and torch.equal(self.words, other.words)
        )

    def __hash__(self) -> int:
        return hash(self.digest())

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy: a view would be saved with all of its storage.
        return _unpickle, (self.words.detach().cpu().clone(), self.numel)

    def __repr__(self) -> str:
        return f"Mask(numel={self.numel}, nnz={self.nnz}, density={self.density:.4g})"

    def _check_peer(self, other: Mask) -> None:
        check_mask("other", other, self.numel)
        _checks.check_device("other", other.words, self.device)


def _size(numel: int) -> int:
    numel = _checks.number(numel)
    if isinstance(numel, bool) or not isinstance(numel, int):
        raise TypeError(f"numel: expected an int, got {type(numel).__name__}")
    if numel < 0:
        raise ValueError(f"numel: expected at least 0, got {numel}")
    return numel


def _unpickle(words: Tensor, numel: int) -> Mask:
    return Mask.from_words(words, numel)


# What `torch.load(weights_only=True)` may call: it checks the words as `from_words` does.
torch.serialization.add_safe_globals([_unpickle])


def _with_rank(words: Tensor, numel: int) -> Mask:
    rank = rank_index(words, numel, _backends.pick(None, words.device))
    return Mask(words, rank, numel, int(rank[-1]))


def rank_index(words: Tensor, numel: int, backend: str) -> Tensor:
    """Survivors before each block of 2048 elements, and in all: int64. O(numel / 32)."""
    if backend == "cpu":
        rank = torch.empty(num_ranks(numel), dtype=torch.int64, device="cpu")
        native.rank_index(words, numel, rank, _backends.threads())
        return rank
    if backend == "triton":
        scan = _backends.kernels("_scan").rank_index
        index: Tensor = _backends.on_device(scan, (words, numel))
        return index
    rank = torch.zeros(num_ranks(numel), dtype=torch.int64, device=words.device)
    if numel:
        bits = bool_from_words(words, 32 * words.numel())
        padded = torch.nn.functional.pad(bits, (0, -bits.numel() % BLOCK))
        rank[1:] = torch.cumsum(padded.view(-1, BLOCK).sum(1), 0)
    return rank


def settle(words: Tensor, numel: int, *more: Tensor) -> tuple[Mask, list[int]]:
    """A mask of words that a device may still be writing, none past `numel`, whose digest is known,
    and further numbers (integers or bools, one each); the device is waited for once."""
    rank = rank_index(words, numel, _backends.pick(None, words.device))
    parts = [rank[-1:], digest_sums(words), *(t.view(1).to(torch.int64) for t in more)]
    nnz, middle, final, *rest = _transfer.fetch(torch.cat(parts))
    mask = Mask(words, rank, numel, nnz)
    mask._digest = digest_of((middle, final), numel)
    return mask, rest


def _digest(words: Tensor, numel: int) -> bytes:
    backend = _backends.pick(None, words.device)
    if backend == "cpu":
        return bytes(native.mask_digest(words, numel, _backends.threads()))
    if backend == "triton":
        return digest_of(_transfer.fetch(digest_sums(words)), numel)
    return digest_reference(words, numel)


def digest_sums(words: Tensor) -> Tensor:
    """What `digest_of` makes a digest of: int64[2] on the words' device, which goes on.

    On an H200 its kernel takes 2.6 us of 26 M bits, a caller who waits for the number 54.
    """
    if _backends.pick(None, words.device) == "triton":
        sums: Tensor = _backends.on_device(_backends.kernels("_digest").digest_sums, (words,))
        return sums
    return _sums_reference(words)


def digest_of(sums: Sequence[int], numel: int) -> bytes:
    """The digest of a mask over `numel` elements with these sums."""
    both = ((h + numel * k) & ((1 << 64) - 1) for h, k in zip(sums, (1, _K0), strict=True))
    return b"".join(h.to_bytes(8, "little") for h in both)


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
    """Reference of `Mask.digest`, on any device."""
    return digest_of(_sums_reference(words).tolist(), numel)


def _sums_reference(words: Tensor) -> Tensor:
    """torch's int64 wraps, and its >> keeps the sign."""
    even = torch.nn.functional.pad(words, (0, words.numel() % 2))
    j = torch.arange(1, even.numel() // 2 + 1, device=words.device)
    t = even.view(torch.int64) + j * _signed(_K0)
    t = (t ^ ((t >> 30) & ((1 << 34) - 1))) * _signed(_K1)
    t ^= (t >> 27) & ((1 << 37) - 1)
    u = t * _signed(_K2)
    u ^= (u >> 31) & ((1 << 33) - 1)
    return torch.stack([t.sum(), u.sum()])


def _signed(k: int) -> int:
    return k - (1 << 64) if k >> 63 else k
