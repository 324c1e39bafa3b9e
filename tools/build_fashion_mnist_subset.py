"""Builds the subset of Fashion-MNIST that ships with the package.

    python tools/build_fashion_mnist_subset.py [--source DIR] [--check]

Of each class the first 1,000 images of the training file and the first 200 of the test file, in
file order, written as IDX files of the same names. There is no chance in it, and the gzip headers
hold no time, so that building again gives the same bytes. ``--check`` writes nothing and fails if
what ships differs. The source is where Debian's package dataset-fashion-mnist puts it.

The loader then holds out the last tenth of each class of the training file, as it does with the
full set: 9,000 training, 1,000 validation and 2,000 test images. The subset's test images are test
images of the full set too, so that nothing learnt or chosen on either has seen the other's test.
"""

import argparse
import gzip
import io
import sys
from pathlib import Path

import numpy as np

from fedmap_sparse.experiments.data import DEBIAN_DIR, SUBSET_DIR
from fedmap_sparse.experiments.idx import IDX_FILES, read_fashion_mnist

TRAIN_PER_CLASS = 1_000
TEST_PER_CLASS = 200


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of the first ``count`` samples of each of the ten classes."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)]))


def to_idx_gz(array: np.ndarray) -> bytes:
    """``array`` of bytes as a compressed IDX file, without name or time in the gzip header."""
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", compresslevel=9, fileobj=buffer, mtime=0) as stream:
        stream.write(header + array.tobytes())
    return buffer.getvalue()


def build(source: Path) -> dict[str, bytes]:
    """The four files of the subset by name."""
    images, labels, test_images, test_labels = read_fashion_mnist(source)
    train = first_of_each_class(labels, TRAIN_PER_CLASS)
    test = first_of_each_class(test_labels, TEST_PER_CLASS)
    arrays = (images[train], labels[train], test_images[test], test_labels[test])
    return {f"{name}.gz": to_idx_gz(a) for name, a in zip(IDX_FILES, arrays, strict=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the shipped subset of Fashion-MNIST.")
    parser.add_argument("--source", type=Path, default=DEBIAN_DIR, help="folder of the full set")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    files = build(options.source)
    if options.check:
        differing = [n for n, data in files.items() if (SUBSET_DIR / n).read_bytes() != data]
        print(f"differs: {', '.join(differing)}" if differing else "the subset is as built")
        return 1 if differing else 0
    for name, data in files.items():
        (SUBSET_DIR / name).write_bytes(data)
        print(f"{SUBSET_DIR / name}: {len(data):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
