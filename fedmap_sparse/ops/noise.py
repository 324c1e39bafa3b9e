"""Gaussian noise from a counter-based generator, the same bits on every backend.

Element e belongs to pair p = 128 (e // 256) + e % 128, and takes the first of the pair's two
normal numbers where e % 256 < 128, else the second. Philox4x32-10 (Salmon et al. 2011) of the
counter (p, stream) and the key `seed`, each as two 32-bit words, the lower one first, gives 128
bits for the pair. Box and Muller's method (1958) in float64 makes two normal numbers of them:

- radius² = -2 ln u, u = 2 - x, where x in [1, 2) has the upper 52 of the first 64 bits as mantissa.
  u is at least 2^-52, so no number is beyond 8.49 standard deviations: of a true normal one in
  4 × 10^16 is.
- ln(2^k m) with m in [sqrt(1/2), sqrt(2)): k ln 2 + 2 atanh((m - 1) / (m + 1)), a series
  of 11 terms.
- the angle is (x - 3/2) pi/2 in one of four quarters, x from the last 64 bits but two, and the
  quarter from those; cosine and sine are series of 9 and 8 terms. The error of a number is below
  2 × 10^-15.

All of that is +, -, ×, /, sqrt and integers, rounded as IEEE 754 says, each by itself: hence the
same bits anywhere. Not a cryptographic generator.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedmap_sparse import _backends, _checks
from fedmap_sparse.ops._library import Op, direct
from fedmap_sparse.ops._rules import FLOAT32, Dense, Number

#: Elements that share 128 pairs.
GROUP = 256
PAIRS = 128
_LOW = 0xFFFFFFFF
_MANTISSA = (1 << 52) - 1
_ONE = 0x3FF << 52
_MAGIC = 0x433 << 52  # 2^52, whose mantissa counts ones
_SQRT2 = 1.4142135623730951
_LN4 = 1.3862943611198906
_QUARTER = 1.5707963267948966
_ATANH = [1.0 / k for k in range(21, 0, -2)]
_SIN = [(-1.0) ** (k // 2) / math.factorial(k) for k in range(15, 0, -2)]
_COS = [(-1.0) ** (k // 2) / math.factorial(k) for k in range(16, -1, -2)]


def philox_reference(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four int64 tensors of 32-bit words to four more."""
    a, b, c, d = counter
    for i in range(10):
        k0, k1 = ((k + i * w) & _LOW for k, w in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64
        a, c = (second >> 32 & _LOW) ^ b ^ k0, (first >> 32 & _LOW) ^ d ^ k1
        b, d = second & _LOW, first & _LOW
    return [a, b, c, d]


def _polynomial(x: Tensor, terms: list[float]) -> Tensor:
    total = torch.full_like(x, terms[0])
    for term in terms[1:]:
        total = total * x + term
    return total


def _mantissa(bits: Tensor) -> Tensor:
    """Numbers in [1, 2) of 52 bits."""
    return (bits & _MANTISSA | _ONE).view(torch.float64)


def normal_reference(
    numel: int, seed: int, stream: int, device: torch.device | str = "cpu"
) -> Tensor:
    """float64[numel]: the normal numbers of a seed and a stream."""
    groups = -(-numel // GROUP)
    pair = torch.arange(groups * PAIRS, dtype=torch.int64, device=device)
    far = [torch.full_like(pair, word) for word in (stream & _LOW, stream >> 32)]
    words = philox_reference([pair & _LOW, pair >> 32, *far], (seed & _LOW, seed >> 32))
    first, second = words[0] | words[1] << 32, words[2] | words[3] << 32
    bits = (2.0 - _mantissa(first >> 12)).view(torch.int64)
    m = _mantissa(bits)
    upper = m > _SQRT2
    m = torch.where(upper, m * 0.5, m)
    k = (bits >> 52 | _MAGIC).view(torch.float64) - (2.0**52 + 1023)
    k = torch.where(upper, k + 1.0, k)
    s = (m - 1.0) / (m + 1.0)
    radius = (-(k * _LN4) - 4.0 * s * _polynomial(s * s, _ATANH)).sqrt()
    angle = (_mantissa(second >> 10) - 1.5) * _QUARTER
    square = angle * angle
    cosine, sine = radius * _polynomial(square, _COS), radius * (angle * _polynomial(square, _SIN))
    cosine = torch.where((second >> 63 & 1) == 1, -cosine, cosine)
    swap = (second >> 62 & 1) == 1
    both = torch.stack(
        [
            torch.where(swap, sine, cosine).view(-1, PAIRS),
            torch.where(swap, cosine, sine).view(-1, PAIRS),
        ],
        1,
    )
    return both.reshape(-1)[:numel]


def _add_reference(values: Tensor, std: float, seed: int, stream: int) -> None:
    noise = normal_reference(values.numel(), seed, stream, values.device)
    values.copy_((values.reshape(-1).double() + noise * std).float().view(values.shape))


_add = Op(
    "add_gaussian_(Tensor(a!) values, float std, int seed, int stream) -> ()",
    lambda values, std, seed, stream: None,
    reference=_add_reference,
    cpu="add_gaussian",
    triton=lambda *a: _backends.kernels("noise").add_gaussian_(*a),
    rules=(
        Dense("values", FLOAT32),
        Number("std", least=0),
        Number("seed", least=0, below=2**63, whole=True),
        Number("stream", least=0, below=2**63, whole=True),
    ),
)


def _is_count(value: Any) -> bool:
    """Whether C++ may take it; what is no such number is for `Op.check` to judge."""
    return type(value) is int and 0 <= value < 1 << 63


def add_gaussian_(
    values: Tensor, std: float, *, seed: int, stream: int = 0, backend: str | None = None
) -> None:
    """Add normal numbers of a standard deviation, in place.

    They depend on `seed`, `stream` and an element's index alone: not on the backend, the ISA level
    or the number of threads. One value gets `float32(value + std * normal)`, computed in float64.

    Args:
        values: contiguous float32 tensor, any shape.
        std: finite, at least 0.
        seed: the generator's key, 0 <= seed < 2^63.
        stream: which of the seed's streams, 0 <= stream < 2^63; a round's number, say.
        backend: "reference", "cpu" or "triton"; None: by device.

    Raises:
        TypeError: another dtype.
        ValueError: a tensor not contiguous, a number out of range.

    O(n), one read and one write. Philox4x32-10 and Box-Muller; the module's docstring has the
    method to the bit, its tail and its sources.

    >>> import torch
    >>> import fedmap_sparse as fs
    >>> values = torch.zeros(3)
    >>> fs.ops.add_gaussian_(values, 1.0, seed=1)
    >>> values
    tensor([-1.8176, -1.9971,  0.3680])
    """
    plain = type(std) in (int, float) and _is_count(seed) and _is_count(stream)
    if plain and direct(values, backend) and _add.attempt(values, std, seed, stream) is not None:
        return
    _add.check(values=values, std=std, seed=seed, stream=stream)
    _add(_checks.plain(values), std, seed, stream, backend=backend)
