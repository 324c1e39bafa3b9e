"""Data sets for experiments: Fashion-MNIST, scikit-learn's digits, and .npz files.

Every data set has three splits. Training is what clients share out; validation is where schedules
and rates are chosen; test is reported once, at the end. Where a source has no validation split, it
is a tenth of each class of its training images, drawn with a seed of its own, so that every run and
every machine has the same one. Fashion-MNIST's files are in a random order, so there it is the last
tenth of each class.
"""

import gzip
import hashlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmap_sparse import _command
from fedmap_sparse._text import shown
from fedmap_sparse.errors import DataError
from fedmap_sparse.experiments import npz

Array = NDArray[Any]
Index = NDArray[np.int64]
Labelled = tuple[Array, Array]

NAMES = ("fashion-mnist-subset", "fashion-mnist", "digits")
SUBSET_DIR = Path(__file__).with_name("fashion_mnist")
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
HOW_TO_GET = (
    "Debian and Ubuntu have it as the package dataset-fashion-mnist; its authors' copy is at "
    "github.com/zalandoresearch/fashion-mnist. The data set fashion-mnist-subset needs no files."
)


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images: ``images`` float32 [n, channels, height, width], ``labels`` int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as it was loaded.

    Images are normalised to mean 0 and standard deviation 1 per channel, by the statistics of the
    training split. ``name`` and ``provenance`` say what was really loaded and from where.
    """

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    provenance: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all splits, in hexadecimal: equal digests mean equal data in equal order."""
        state = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            state.update(str(tuple(split.images.shape)).encode())
            state.update(split.images.numpy().data)
            state.update(split.labels.numpy().data)
        return state.hexdigest()


def load(name: str = "fashion-mnist-subset", data_dir: Path | str | None = None) -> Dataset:
    """Load a data set by name, or from the path of an .npz file.

    - ``fashion-mnist-subset``: 9,000 training, 1,000 validation and 2,000 test images, equally many
      of each class, shipped with the package.
    - ``fashion-mnist``: all 54,000 + 6,000 + 10,000 images, from ``data_dir`` if given, else from
      where Debian's package puts them, else the shipped subset: ``name`` of the result tells.
    - ``digits``: scikit-learn's 1,797 images of 8×8, for quick checks.
    - a path that ends in ``.npz``: ``x_train, y_train, x_test, y_test`` and, if present, ``x_val,
      y_val``. Images are [n, height, width] or [n, channels, height, width], labels are integers
      from 0.

    Raises:
        DataError: something is missing, damaged, or not of the form it should have.
    """
    if data_dir is not None and name != "fashion-mnist":
        raise DataError(f"a data folder ({data_dir}) goes with fashion-mnist, not with {name}")
    if name == "fashion-mnist-subset":
        return _fashion_mnist(SUBSET_DIR, name, "the subset shipped with fedmap_sparse")
    if name == "fashion-mnist":
        folder = Path(data_dir) if data_dir is not None else DEBIAN_DIR
        if data_dir is None and not folder.is_dir():
            origin = f"the subset shipped with fedmap_sparse; {folder} was not found"
            return _fashion_mnist(SUBSET_DIR, "fashion-mnist-subset", origin)
        return _fashion_mnist(folder, name, str(folder))
    if name == "digits":
        return _digits()
    if name.endswith(".npz"):
        return _npz(Path(name))
    raise DataError(
        f"no data set {shown(name)}: it is one of {', '.join(NAMES)}, or a path to an .npz"
    )


def read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes with ``rank`` dimensions, gzip-compressed if it ends so.

    Format: two zero bytes, the type (8), the rank, then each dimension as a big-endian uint32, then
    the bytes. Raises DataError for anything else, truncation and trailing bytes included.
    """
    try:
        on_disk = path.stat().st_size
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * rank)
            if len(header) < 4 + 4 * rank:
                raise DataError(f"{path}: the header has {len(header)} of {4 + 4 * rank} bytes")
            if header[:4] != bytes((0, 0, 8, rank)):
                raise DataError(
                    f"{path}: not an IDX file of bytes with {rank} dimensions: it starts with "
                    f"{header[:4].hex()}, not {bytes((0, 0, 8, rank)).hex()}"
                )
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
            size = math.prod(shape)
            if size > 2**31:
                raise DataError(f"{path}: claims {size} bytes, more than the 2 GiB allowed")
            # Deflate makes a byte of 1,032 at most.
            if size > on_disk * (1032 if path.suffix == ".gz" else 1):
                raise DataError(f"{path}: shape {shape} needs {size} bytes, the file has less")
            data = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(data) != size:
        found = "more" if len(data) > size else f"{len(data)}"
        raise DataError(f"{path}: shape {shape} needs {size} bytes, the file has {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_fashion_mnist(folder: Path) -> tuple[Array, Array, Array, Array]:
    """Training images [n, h, w] and labels [n], test images and labels, from four IDX files."""
    paths = []
    for name in IDX_FILES:
        found = [p for p in (folder / name, folder / f"{name}.gz") if p.is_file()]
        if not found:
            raise DataError(f"no {name} or {name}.gz in {folder}. {HOW_TO_GET}")
        paths.append(found[0])
    images, labels, test_images, test_labels = (
        read_idx(path, rank) for path, rank in zip(paths, (3, 1, 3, 1), strict=True)
    )
    return images, labels, test_images, test_labels


def hold_out(labels: Array, share: int) -> tuple[Index, Index]:
    """Indices that stay and indices held out: of each class the last 1/``share``, at least one.

    Both are ascending. A class of one sample keeps it. For Fashion-MNIST alone, whose files are in
    a random order already.
    """
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            held[members[-max(1, len(members) // share) :]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def draw_out(
    labels: Array, count: Callable[[int], int], rng: np.random.Generator
) -> tuple[Index, Index]:
    """Indices that stay and indices held out: ``count(n)`` of each class of n, drawn by ``rng``.

    Both are ascending. Each class keeps at least one sample.
    """
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: min(count(len(members)), len(members) - 1)]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _fashion_mnist(folder: Path, name: str, origin: str) -> Dataset:
    images, labels, test_images, test_labels = read_fashion_mnist(folder)
    _check_split(f"{folder}, train", images, labels)
    stay, held = hold_out(labels, 10)
    return _dataset(
        name,
        (images[stay], labels[stay]),
        (images[held], labels[held]),
        (test_images, test_labels),
        f"Fashion-MNIST (Zalando SE, MIT licence): {origin}",
        classes=10,
    )


def _digits() -> Dataset:
    try:
        with _command.held():
            from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits comes with scikit-learn: pip install scikit-learn") from error
    source = load_digits()
    rest, test = _split("digits", source.images, source.target, 5)
    train, validation = _split("digits", *rest, 10)
    return _dataset("digits", train, validation, test, "digits of scikit-learn", classes=10)


def _npz(path: Path) -> Dataset:
    wanted = ("x_train", "y_train", "x_test", "y_test")
    arrays, found = npz.read(path, (*wanted, "x_val", "y_val"))
    if missing := [key for key in wanted if key not in arrays]:
        raise DataError(
            f"{path}: no {', '.join(missing)}; it holds {', '.join(found[:20]) or 'nothing'}"
        )
    if ("x_val" in arrays) != ("y_val" in arrays):
        raise DataError(f"{path}: x_val and y_val go together, and only one of them is there")
    x_train, y_train, x_test, y_test = (arrays[key] for key in wanted)
    if "x_val" in arrays:
        train, validation = (x_train, y_train), (arrays["x_val"], arrays["y_val"])
    else:
        train, validation = _split(f"{path}: x_train", x_train, y_train, 10)
    return _dataset(path.stem, train, validation, (x_test, y_test), f"{path}")


def _split(what: str, images: Array, labels: Array, share: int) -> tuple[Labelled, Labelled]:
    """What stays and what is held out: of each class 1/``share``, at least one, drawn by seed 0.

    Drawn, because a file may be sorted by site or time, and its tail would be another population.
    """
    _check_split(what, images, labels)
    rng = np.random.Generator(np.random.PCG64(0))
    stay, held = draw_out(labels, lambda n: max(1, n // share), rng)
    return (images[stay], labels[stay]), (images[held], labels[held])


def _check_split(what: str, images: Array, labels: Array) -> None:
    if images.ndim not in (3, 4) or images.dtype.kind not in "uif":
        raise DataError(
            f"{what}: images are numbers of shape [n, height, width] or [n, channels, height, "
            f"width], not {images.dtype} of shape {list(images.shape)}"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "ui" or len(labels) != len(images):
        raise DataError(
            f"{what}: {len(images)} images need as many integer labels in one dimension, not "
            f"{labels.dtype} of shape {list(labels.shape)}"
        )
    if images.size == 0:
        raise DataError(f"{what}: no images (shape {list(images.shape)})")
    if images.dtype.kind == "f" and not np.abs(images).max() <= np.finfo(np.float32).max:
        raise DataError(f"{what}: images hold NaN, infinity or what is too large for float32")


def _dataset(
    name: str,
    train: Labelled,
    validation: Labelled,
    test: Labelled,
    provenance: str,
    classes: int | None = None,
) -> Dataset:
    """Check the three splits against each other and normalise them; classes from labels if None."""
    splits = dict(zip(("train", "validation", "test"), (train, validation, test), strict=True))
    for part, (images, labels) in splits.items():
        _check_split(f"{name}, {part}", images, labels)
        if images.shape[1:] != train[0].shape[1:]:
            raise DataError(
                f"{name}: images of {part} are {list(images.shape[1:])}, "
                f"those of train {list(train[0].shape[1:])}"
            )
    classes = classes if classes is not None else int(train[1].max()) + 1
    for part, (_, labels) in splits.items():
        if labels.min() < 0 or labels.max() >= classes:
            raise DataError(
                f"{name}: labels of {part} run from {labels.min()} to {labels.max()}, "
                f"those of {classes} classes from 0 to {classes - 1}"
            )
    present = set(train[1].tolist())
    if len(present) < classes:
        absent = next(c for c in range(classes) if c not in present)
        raise DataError(f"{name}: no training image of class {absent}")
    channels = _with_channels(train[0])
    mean = channels.mean(axis=(0, 2, 3), dtype=np.float64, keepdims=True).astype(np.float32)
    std = channels.std(axis=(0, 2, 3), dtype=np.float64, keepdims=True).astype(np.float32)
    std[std == 0] = 1  # a constant channel becomes zeros
    parts = [_normalised(images, labels, mean, std) for images, labels in splits.values()]
    return Dataset(name, classes, parts[0], parts[1], parts[2], provenance)


def _with_channels(images: Array) -> Array:
    return images if images.ndim == 4 else images[:, None]


def _normalised(images: Array, labels: Array, mean: Array, std: Array) -> Split:
    scaled = _with_channels(images).astype(np.float32)
    scaled -= mean
    scaled /= std
    return Split(torch.from_numpy(scaled), torch.from_numpy(labels.astype(np.int64)))
