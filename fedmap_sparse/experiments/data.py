"""Data sets for experiments: Fashion-MNIST, CIFAR, scikit-learn's digits, and .npz files.

Every data set has three splits. Training is what clients share out; validation is where schedules
and rates are chosen; test is reported once, at the end. Where a source has no validation split, it
is a tenth of each class of its training images, drawn with a seed of its own, so that every run and
every machine has the same one. Fashion-MNIST's files are in a random order, so there it is the last
tenth of each class.
"""

import hashlib
import importlib.util
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
from fedmap_sparse.experiments import cifar, npz
from fedmap_sparse.experiments.idx import read_fashion_mnist

Array = NDArray[Any]
Index = NDArray[np.int64]
Labelled = tuple[Array, Array]

NAMES = ("fashion-mnist-subset", "fashion-mnist", "digits", "cifar10", "cifar100")
#: What the samples of an .npz can be, by the dimensions of x_train.
KINDS = {"table": (2,), "sequence": (3,), "image": (3, 4)}
SUBSET_DIR = Path(__file__).with_name("fashion_mnist")
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled samples: ``images`` float32 [n, channels, height, width], ``labels`` int64 [n].

    Tables are [n, features], sequences [n, length, channels].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as it was loaded.

    Images and sequences are normalised to mean 0 and standard deviation 1 per channel, tables per
    feature, by the statistics of the training split. ``name`` and ``provenance`` say what was
    really loaded and from where. ``groups`` is whom each training sample comes from, a site or a
    writer say: int64 [n], or None where that is not known.
    """

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    provenance: str
    groups: NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample; channels, height and width of an image."""
        return tuple(self.train.images.shape[1:])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all splits, in hexadecimal: equal digests mean equal data in equal order."""
        state = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            state.update(str(tuple(split.images.shape)).encode())
            state.update(split.images.numpy().data)
            state.update(split.labels.numpy().data)
        if self.groups is not None:
            state.update(self.groups.data)
        return state.hexdigest()


def load(name: str = "fashion-mnist-subset", data_dir: Path | str | None = None) -> Dataset:
    """Load a data set by name, or from the path of an .npz file.

    - ``fashion-mnist-subset``: 9,000 training, 1,000 validation and 2,000 test images, equally many
      of each class, shipped with the package.
    - ``fashion-mnist``: all 54,000 + 6,000 + 10,000 images, from ``data_dir`` if given, else from
      where Debian's package puts them, else the shipped subset: ``name`` of the result tells.
    - ``digits``: scikit-learn's 1,797 images of 8×8, for quick checks.
    - ``cifar10``, ``cifar100``: from their binary archives, or what those unpack to, in
      ``data_dir``.
    - a path that ends in ``.npz``: ``x_train, y_train, x_test, y_test`` and, if present, ``x_val,
      y_val``, ``g_train`` (whom each training sample comes from: numbers or text) and ``kind``.
      Images are [n, height, width] or [n, channels, height, width], tables [n, features]; with
      ``kind="sequence"`` samples are [n, length, channels]. Labels are integers from 0.

    Raises:
        DataError: something is missing, damaged, or not of the form it should have.
    """
    if data_dir is not None and name not in ("fashion-mnist", *cifar.SOURCES):
        wanted = ", ".join(("fashion-mnist", *cifar.SOURCES))
        raise DataError(f"a data folder ({data_dir}) goes with {wanted}, not with {name}")
    if name in cifar.SOURCES:
        return _cifar(name, data_dir)
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
    images, labels = _digits_of_sklearn()
    rest, test = _split("digits", images, labels, 5)
    train, validation = _split("digits", *rest, 10)
    return _dataset("digits", train, validation, test, "digits of scikit-learn", classes=10)


def _digits_of_sklearn() -> Labelled:
    """What `load_digits` gives, read from its file where that is in its place: the import of
    scikit-learn takes as much CPU as half of a run."""
    found = importlib.util.find_spec("sklearn")
    folders = [] if found is None else found.submodule_search_locations or []
    for folder in folders:
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            table = np.loadtxt(path, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
    try:
        with _command.held():
            from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits comes with scikit-learn: pip install scikit-learn") from error
    source = load_digits()
    return source.images, source.target


def _cifar(name: str, data_dir: Path | str | None) -> Dataset:
    if data_dir is None:
        raise DataError(f"{name}: name the folder of its binary archive, by data= or --data")
    images, labels, *test = cifar.read(name, Path(data_dir))
    stay, held = _drawn(name, images, labels, 10)
    return _dataset(
        name,
        (images[stay], labels[stay]),
        (images[held], labels[held]),
        (test[0], test[1]),
        f"{name} (Krizhevsky, 2009): {data_dir}",
        classes=cifar.SOURCES[name].classes,
    )


def _npz(path: Path) -> Dataset:
    wanted = ("x_train", "y_train", "x_test", "y_test")
    arrays, found = npz.read(path, (*wanted, "x_val", "y_val", "g_train", "kind"))
    if missing := [key for key in wanted if key not in arrays]:
        raise DataError(
            f"{path}: no {', '.join(missing)}; it holds {', '.join(found[:20]) or 'nothing'}"
        )
    if ("x_val" in arrays) != ("y_val" in arrays):
        raise DataError(f"{path}: x_val and y_val go together, and only one of them is there")
    origin = f"{path}"
    kind = _kind(path, arrays)
    if kind == "image" and _is_nhwc(arrays["x_train"]):
        origin += " (channels came last, and were put first)"
        for key in arrays.keys() & {"x_train", "x_val", "x_test"}:
            if arrays[key].ndim == 4:
                arrays[key] = np.ascontiguousarray(arrays[key].transpose(0, 3, 1, 2))
    x_train, y_train, x_test, y_test = (arrays[key] for key in wanted)
    groups = _groups(path, arrays.get("g_train"), len(x_train))
    train = x_train, y_train
    if "x_val" in arrays:
        validation = arrays["x_val"], arrays["y_val"]
    else:
        stay, held = _drawn(f"{path}: x_train", x_train, y_train, 10)
        train, validation = (x_train[stay], y_train[stay]), (x_train[held], y_train[held])
        groups = None if groups is None else groups[stay]
    return _dataset(
        path.stem, train, validation, (x_test, y_test), origin, groups=groups, kind=kind
    )


def _kind(path: Path, arrays: dict[str, Array]) -> str:
    """What the samples are: said by the file, or by their dimensions."""
    rank = arrays["x_train"].ndim
    if "kind" not in arrays:
        return "table" if rank == 2 else "image"
    kind = str(arrays["kind"][()])[:50]
    if rank not in KINDS.get(kind, ()):
        raise DataError(
            f"{path}: kind is one of table, sequence and image, with x_train of 2, 3, and 3 or 4 "
            f"dimensions, not {shown(kind)} with {rank}"
        )
    return kind


def _is_nhwc(images: Array) -> bool:
    """Whether 4-D images have their channels last: 1, 3 or 4 there, and no such number first."""
    return images.ndim == 4 and images.shape[3] in (1, 3, 4) and images.shape[1] > 4


def _groups(path: Path, given: Array | None, samples: int) -> Index | None:
    """The group of each sample, numbered from 0 in order of their names."""
    if given is None:
        return None
    if given.ndim != 1 or len(given) != samples or given.dtype.kind not in "uiUS":
        raise DataError(
            f"{path}: g_train names a group for each of the {samples} training samples, by a "
            f"number or text, not {given.dtype} of shape {list(given.shape)}"
        )
    return np.unique(given, return_inverse=True)[1].astype(np.int64)


def _split(what: str, images: Array, labels: Array, share: int) -> tuple[Labelled, Labelled]:
    """What stays and what is held out; see `_drawn`."""
    stay, held = _drawn(what, images, labels, share)
    return (images[stay], labels[stay]), (images[held], labels[held])


def _drawn(what: str, images: Array, labels: Array, share: int) -> tuple[Index, Index]:
    """Which stay and which are held out: of each class 1/``share``, at least one, drawn by seed 0.

    Drawn, because a file may be sorted by site or time, and its tail would be another population.
    """
    _check_split(what, images, labels)
    rng = np.random.Generator(np.random.PCG64(0))
    return draw_out(labels, lambda n: max(1, n // share), rng)


def _check_split(what: str, images: Array, labels: Array) -> None:
    if images.ndim not in (2, 3, 4) or images.dtype.kind not in "uif":
        raise DataError(
            f"{what}: samples are numbers of shape [n, features], [n, height, width] or [n, "
            f"channels, height, width], not {images.dtype} of shape {list(images.shape)}"
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
    groups: Index | None = None,
    kind: str = "image",
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
    # Per channel; per feature of a table.
    axes = {"image": (0, 2, 3), "sequence": (0, 1), "table": (0,)}[kind]
    values = _with_channels(train[0], kind)
    mean = values.mean(axis=axes, dtype=np.float64, keepdims=True).astype(np.float32)
    std = values.std(axis=axes, dtype=np.float64, keepdims=True).astype(np.float32)
    std[std == 0] = 1  # a constant channel becomes zeros
    parts = [
        _normalised(_with_channels(images, kind), labels, mean, std)
        for images, labels in splits.values()
    ]
    return Dataset(name, classes, parts[0], parts[1], parts[2], provenance, groups)


def _with_channels(images: Array, kind: str) -> Array:
    return images[:, None] if kind == "image" and images.ndim == 3 else images


def _normalised(images: Array, labels: Array, mean: Array, std: Array) -> Split:
    scaled = images.astype(np.float32)
    scaled -= mean
    scaled /= std
    return Split(torch.from_numpy(scaled), torch.from_numpy(labels.astype(np.int64)))
