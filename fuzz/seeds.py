"""Writes seeds for the fuzzer: `python fuzz/seeds.py FOLDER`. Sound payloads of each kind."""

import sys
from pathlib import Path

import torch

import fedmap_sparse as fs
from fedmap_sparse.ops import entropy

# As kShapes of entropy_fuzz.cpp.
SHAPES = [
    ([0], [1000], 1024),
    ([0, 128, 256, 384], [5, 0, 127, 300], 768),
    ([0, 515, 150965, 150968], [515, 150450, 3, 728], 151696),
    ([3], [300001], 300004),
    ([3, 2000], [1, 500001], 502004),
]


def seeds() -> dict[str, bytes]:
    torch.manual_seed(0)
    out = {}
    for shape, (starts, numels, bits) in enumerate(SHAPES):
        for density in (0.0, 0.01, 0.3, 0.9, 1.0):
            keep = torch.zeros(bits, dtype=torch.bool)
            for start, n in zip(starts, numels, strict=True):
                keep[start : start + n] = torch.rand(n) < density
            mask = fs.Mask.from_bool(keep)
            runs = entropy.Runs(torch.tensor(starts), torch.tensor(numels))
            ends = entropy.ranks_at(mask, runs.start + runs.numel)
            nnz = ends - entropy.ranks_at(mask, runs.start)
            payload = entropy.encode_mask(mask.words, runs, nnz, 1 << 20)
            assert payload is not None
            head = bytes([3, shape, shape == 4])
            out[f"mask-{shape}-{density}"] = head + payload.numpy().tobytes()
    for code, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        for n in (1, 33, 1000, 40_000):
            for kind in ("normal", "odd"):
                x = torch.randn(n) * 0.02
                if kind == "odd":
                    x[::3], x[1::7] = 0.0, float("nan")
                payload = entropy.encode_values(x.to(dtype), 1 << 20)
                assert payload is not None
                head = bytes([code]) + (n - 1).to_bytes(2, "little")
                out[f"values-{code}-{n}-{kind}"] = head + payload.numpy().tobytes()
    return out


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (folder / name).write_bytes(data)
