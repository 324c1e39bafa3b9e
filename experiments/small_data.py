"""The small data of the experiments: `python experiments/small_data.py OUT.npz`.

2,700 of the 9,000 training images of the shipped Fashion-MNIST subset, equally many of each class,
drawn by seed 0; validation and test are the subset's own.
"""

import sys
from pathlib import Path

import numpy as np

from fedmap_sparse.experiments.data import draw_out, load

SAMPLES = 2_700


def main(out: Path) -> None:
    data = load("fashion-mnist-subset")
    labels = data.train.labels.numpy()
    each = SAMPLES // data.classes
    _, chosen = draw_out(labels, lambda n: each, np.random.default_rng(0))
    arrays = {"x_train": data.train.images[chosen].numpy(), "y_train": labels[chosen]}
    for key, split in (("val", data.validation), ("test", data.test)):
        arrays[f"x_{key}"], arrays[f"y_{key}"] = split.images.numpy(), split.labels.numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **arrays)
    print(f"{out}: {len(chosen):,} training images")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
