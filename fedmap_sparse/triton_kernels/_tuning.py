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
#: bytes take 37. By elements it is 18 an element, counted in the machine code. Unpacking is by
#: elements at any density: of bfloat16 at 0.5 and 0.1 27.0 and 26.0 us on an H200, 46.9 and 33.3 by
#: survivors.
PACK_ROWS = 0.25
#: Warps per program of those: 64 words, of which a warp takes one at a time. With four and with one
#: packing at density 0.5 took 43.6 and 45.7 us on an H200 (bfloat16 31.2 and 34.7), unpacking 43.8
#: and 42.9 (31.6 and 27.0).
PACK_WARPS = 4
UNPACK_WARPS = 1

# Masked steps. A program of one warp waits at no barrier. Measured on an H200, in us, where lanes
# stand for survivors:
#                        AdamW 0.5    SGD and AdamW 0.1    0.01
#   (32, 64, 1, 256)     150          69.8, 77.8           23.9, 31.1
#   (64, 64, 1, 256)     161          72.5, 79.4           18.6, 20.9
#   (64, 128, 1, 512)    161          70.5, 78.5           20.9, 32.8
#   (128, 128, 2, 512)   158          73.8, 81.6           19.2, 22.2
#   (256, 256, 8, 2048)  199          71.5, 81.9           21.2, 28.4
# Where nothing is pruned they took 128 and 187, of which the bytes take 125 and 175.
# From STEP_ROWS on SGD's lanes stand for elements, in the shape STEP_BY_ROWS: 128 at density 0.5,
# by survivors 132.
STEP_ROWS = 0.25
STEP_BY_ROWS: Shape = (64, 128, 1, 256)
STEP_WHOLE: Shape = (128, 256, 8, 2048)
STEP_DENSE: Shape = (32, 64, 1, 256)
STEP_MIDDLE: Shape = (32, 64, 1, 256)
STEP_SPARSE: Shape = (64, 64, 1, 256)

#: Words of the parent per program of `extract`: on an H200 18.1 us, with 256 18.4, with 64 20.4.
EXTRACT_WORDS = 128
#: Warps per program of `deposit`, which takes 256 words: each asks for the rank index again.
DEPOSIT_WARPS = 2

#: Of trimmed means of more than 16 vectors: warps, and values that a thread takes of each. Of 50 on
#: an H200 1397 us, with (4, 1) 1672.
TRIMMED_MANY = (8, 2)

# Selection.
#: Values of the sample, at most: with a quarter, twice as many become candidates.
SAMPLES = 65536
#: Copies of the radix histogram of the candidates, at most; of the histogram of the sample. On an
#: H200 four took 121 us of float32 and 102 of bfloat16, 16 copies 122 and 105, one 117 and 135.
HISTOGRAMS = 4
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
#: Tiles that a program joins, and its warps. On an H200 decoding took 255, 229 and 224 us (float32,
#: float16, bfloat16), with (32, 8) 256, 231 and 227.
JOIN = (8, 1)


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
