"""Sizes and variants of the kernels that only a device can judge, one constant each.

They are read at each launch, so that `tools/measure_gpu.py` can try others and `tests/gpu_free` can
run both. No value changes a result. Of a shape: mask words of a program, survivors that it takes at
a time, its warps, and the elements that it takes at a time where a tile has no holes.
"""

from __future__ import annotations

Shape = tuple[int, int, int, int]

# Packing. Measured on an H100: one warp 9 us instead of 23 at density 0.01, but 233 instead of 145
# at density 1.
PACK_DENSE: Shape = (128, 1024, 4, 2048)
PACK_MIDDLE: Shape = (256, 1024, 4, 2048)
PACK_SPARSE: Shape = (128, 64, 1, 128)

#: Densities from which lanes stand for elements and not for survivors, who each search theirs. The
#: search was 60 instructions a survivor: on an H200 87 us of 26 M float32 at density 0.5, whose
#: bytes take 37. By elements it is 18 an element, counted in the machine code.
PACK_ROWS = 0.25
UNPACK_ROWS = 0.0
#: Warps per program of those: 64 words, of which a warp takes one at a time.
ROWS_WARPS = 4

# Masked steps. A program of one warp waits at no barrier. Measured on an H200 (SGD and AdamW, us):
#                        density 0.5    0.1          0.01
#   (64, 64, 1, 256)     137, 167       79.5, 87.1   26.3, 26.7
#   (128, 64, 1, 256)    166, 183       84.9, 90.5   26.6, 28.2
#   (128, 32, 1, 256)    180, 211       83.4, 89.9   26.8, 28.1
#   (256, 256, 8, 2048)  151, 204       78.1, 86.5   26.7, 33.6
# Where nothing is pruned eight warps were measured at 1.05 times the floor.
# From STEP_ROWS on SGD's lanes stand for elements, in the shape STEP_BY_ROWS: 64 survivors took 366
# instructions, 128 elements of density 0.5 fewer. Counted, not timed.
STEP_ROWS = 0.25
STEP_BY_ROWS: Shape = (64, 128, 1, 256)
STEP_WHOLE: Shape = (128, 256, 8, 2048)
STEP_DENSE: Shape = (64, 64, 1, 256)
STEP_MIDDLE: Shape = (64, 64, 1, 256)
STEP_SPARSE: Shape = (64, 64, 1, 256)

#: Words of the parent per program of `extract`.
EXTRACT_WORDS = 256
#: Warps per program of `deposit`, which takes 256 words: each asks for the rank index again.
DEPOSIT_WARPS = 2

#: Of trimmed means of more than 16 vectors: warps, and values that a thread takes of each.
TRIMMED_MANY = (4, 1)

# Selection.
#: Values of the sample, at most: with a quarter, twice as many become candidates.
SAMPLES = 65536
#: Copies of the radix histogram of the candidates, at most; of the histogram of the sample.
HISTOGRAMS = 16
SAMPLE_COPIES = 4
#: Registers per thread of the read, at most; None: as the compiler likes.
READ_REGISTERS: int | None = None
#: Copies of the histogram that one program loads at a time, and its warps.
DECIDE_ROWS = 8
DECIDE_WARPS = 16
REFINE_ROWS = 4
#: Programs that refine the candidates, at most, and keys that one takes at a time.
REFINE_PROGRAMS = 264
REFINE_LANES = 1024
#: Candidates that a program takes at a time as it settles or trims a block, and blocks per program.
SETTLE_LANES = 32
TRIM_BLOCKS = 4

# Entropy coding.
#: Values of which a program that describes a chunk stores the planes at a time, tiles of 256 values
#: whose symbols it stores at a time, and its warps.
DESCRIBE = (2048, 32, 8)
#: Tiles that a program joins, and its warps: four values a thread suit streams of any width.
JOIN = (32, 8)


def pack_shape(density: float) -> Shape:
    """Of packing."""
    if density > 0.25:
        return PACK_DENSE
    return PACK_MIDDLE if density > 0.0625 else PACK_SPARSE


def step_shape(density: float) -> Shape:
    """Of the masked steps."""
    if density > 0.98:
        return STEP_WHOLE
    if density > 0.25:
        return STEP_DENSE
    return STEP_MIDDLE if density > 0.0625 else STEP_SPARSE
