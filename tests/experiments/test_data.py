"""experiments/data.py: what is loaded, how it is split, and what is refused."""

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmap_sparse.errors import DataError
from fedmap_sparse.experiments import data, idx

ROOT = Path(__file__).parent.parent.parent
# SHA-256 of the uncompressed files: what Zalando's bytes give, whatever wrote the gzip around them.
SUBSET_SHA256 = {
    "train-images-idx3-ubyte": "d33512cfdc636a0d8972818e6659995be209a88891df7fa2109d7895922c8985",
    "train-labels-idx1-ubyte": "620cb8e3b9348037c5ff9a07b02d773ab165330e072dfd19e0d21c59f8042dcf",
    "t10k-images-idx3-ubyte": "15a92dd1e9b16ea361928086e77df4dfa890c255c00b5a8c8162c1040ce8eef1",
    "t10k-labels-idx1-ubyte": "234596aeb6eb48133ec99a62541f90bc0728c9559a681f1e0638037462458f2c",
}


def to_idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A small Fashion-MNIST: 20 training and 10 test images of each class, 3×2 pixels, plain."""
    rng = np.random.default_rng(0)
    for stem, count in (("train", 200), ("t10k", 100)):
        labels = np.repeat(np.arange(10, dtype=np.uint8), count // 10)
        images = rng.integers(0, 256, (count, 3, 2), np.uint8)
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(to_idx(labels))
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(to_idx(images))
    return tmp_path


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """What an .npz holds: two channels of 5×4, three classes in file order 0 1 2 0 1 2 ..."""
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.normal(3, 2, (60, 2, 5, 4)),
        "y_train": np.arange(60) % 3,
        "x_test": rng.normal(3, 2, (9, 2, 5, 4)),
        "y_test": np.arange(9) % 3,
    }


def load_npz(folder: Path, arrays: dict[str, np.ndarray]) -> data.Dataset:
    np.savez(folder / "some.npz", **arrays)
    return data.load(str(folder / "some.npz"))


class TestSubset:
    def test_is_the_default_and_balanced(self) -> None:
        loaded = data.load()
        assert loaded.name == "fashion-mnist-subset"
        assert (loaded.classes, loaded.shape) == (10, (1, 28, 28))
        for split, per_class in (
            (loaded.train, 900),
            (loaded.validation, 100),
            (loaded.test, 200),
        ):
            assert torch.bincount(split.labels).tolist() == [per_class] * 10
            assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)
            assert split.images.shape == (10 * per_class, 1, 28, 28)
            assert len(split) == 10 * per_class

    def test_no_image_is_in_two_splits(self) -> None:
        loaded = data.load()
        seen = [
            {hashlib.sha256(image.numpy()).digest() for image in split.images}
            for split in (loaded.train, loaded.validation, loaded.test)
        ]
        assert [len(images) for images in seen] == [9_000, 1_000, 2_000]
        assert len(set.union(*seen)) == 12_000

    @pytest.mark.parametrize("name", idx.IDX_FILES)
    def test_bytes_are_the_published_ones(self, name: str) -> None:
        content = gzip.decompress((data.SUBSET_DIR / f"{name}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == SUBSET_SHA256[name]

    def test_gzip_headers_hold_no_time_and_no_name(self) -> None:
        for name in idx.IDX_FILES:
            header = (data.SUBSET_DIR / f"{name}.gz").read_bytes()[:8]
            assert header == b"\x1f\x8b\x08\x00\0\0\0\0"

    @pytest.mark.skipif(
        not data.DEBIAN_DIR.is_dir(), reason=f"no {data.DEBIAN_DIR} (dataset-fashion-mnist)"
    )
    def test_is_what_the_script_builds(self) -> None:
        script = ROOT / "tools" / "build_fashion_mnist_subset.py"
        done = subprocess.run(
            [sys.executable, script, "--check"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 0

    def test_takes_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cifar100, not with fashion-mnist-sub"):
            data.load("fashion-mnist-subset", tmp_path)


class TestFull:
    @pytest.mark.parametrize("compressed", [False, True])
    def test_from_a_folder(self, idx_folder: Path, compressed: bool) -> None:
        if compressed:
            for path in list(idx_folder.iterdir()):
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
        loaded = data.load("fashion-mnist", idx_folder)
        assert loaded.name == "fashion-mnist"
        assert str(idx_folder) in loaded.provenance
        assert [len(s) for s in (loaded.train, loaded.validation, loaded.test)] == [180, 20, 100]
        assert loaded.shape == (1, 3, 2)

    def test_validation_is_the_last_tenth_of_each_class(self, idx_folder: Path) -> None:
        raw = idx.read_idx(idx_folder / "train-images-idx3-ubyte", 3)
        loaded = data.load("fashion-mnist", str(idx_folder))
        train = np.concatenate([raw[20 * c : 20 * c + 18] for c in range(10)]).astype(np.float64)
        held = np.concatenate([raw[20 * c + 18 : 20 * c + 20] for c in range(10)])
        expected = (held - train.mean()) / train.std()
        np.testing.assert_allclose(loaded.validation.images[:, 0], expected, rtol=1e-5, atol=1e-6)

    def test_debian_folder_is_used_where_it_is(
        self, idx_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data, "DEBIAN_DIR", idx_folder)
        loaded = data.load("fashion-mnist")
        assert (loaded.name, len(loaded.train)) == ("fashion-mnist", 180)

    def test_without_it_the_subset_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data, "DEBIAN_DIR", tmp_path / "absent")
        loaded = data.load("fashion-mnist")
        assert (loaded.name, len(loaded.train)) == ("fashion-mnist-subset", 9_000)
        assert str(tmp_path / "absent") in loaded.provenance
        assert loaded.digest == data.load("fashion-mnist-subset").digest

    def test_a_damaged_debian_folder_is_not_passed_over(
        self, idx_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (idx_folder / "train-images-idx3-ubyte").unlink()
        monkeypatch.setattr(data, "DEBIAN_DIR", idx_folder)
        with pytest.raises(DataError, match="no train-images-idx3-ubyte"):
            data.load("fashion-mnist")

    def test_missing_files_are_named_with_how_to_get_them(self, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            data.load("fashion-mnist", tmp_path)
        for part in ("train-images-idx3-ubyte", str(tmp_path), "dataset-fashion-mnist", "subset"):
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "array", "message"),
        [
            ("train-labels-idx1-ubyte", np.zeros(199, np.uint8), "200 images need as many"),
            ("t10k-labels-idx1-ubyte", np.full(100, 10, np.uint8), "labels of test run from 10"),
            ("train-labels-idx1-ubyte", np.zeros(200, np.uint8), "no training image of class 1"),
            ("t10k-images-idx3-ubyte", np.zeros((100, 2, 3), np.uint8), r"\[1, 2, 3\]|\[2, 3\]"),
        ],
    )
    def test_files_that_disagree(
        self, idx_folder: Path, name: str, array: np.ndarray, message: str
    ) -> None:
        (idx_folder / name).write_bytes(to_idx(array))
        with pytest.raises(DataError, match=message):
            data.load("fashion-mnist", idx_folder)


class TestIdx:
    IMAGES = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)

    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_reads_back(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"images{suffix}"
        content = to_idx(self.IMAGES)
        path.write_bytes(gzip.compress(content) if suffix else content)
        np.testing.assert_array_equal(idx.read_idx(path, 3), self.IMAGES)

    def test_every_truncation_is_refused(self, tmp_path: Path) -> None:
        plain, packed = tmp_path / "images", tmp_path / "images.gz"
        content = to_idx(self.IMAGES)
        compressed = gzip.compress(content)
        for path, whole in ((plain, content), (packed, compressed)):
            for length in range(len(whole)):
                path.write_bytes(whole[:length])
                with pytest.raises(DataError, match=str(path)):
                    idx.read_idx(path, 3)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (to_idx(IMAGES) + b"\0", "needs 24 bytes, the file has more"),
            (to_idx(IMAGES[0]), "starts with 00000802, not 00000803"),
            (b"\0\0\x0d\x03" + to_idx(IMAGES)[4:], "starts with 00000d03"),
            (b"\x89PNG" + to_idx(IMAGES)[4:], "starts with 89504e47"),
            (b"\0\0\x08\x03" + b"\xff" * 12, "more than the 2 GiB"),
        ],
    )
    def test_malformed(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "images").write_bytes(content)
        with pytest.raises(DataError, match=message):
            idx.read_idx(tmp_path / "images", 3)

    def test_not_gzip(self, tmp_path: Path) -> None:
        (tmp_path / "images.gz").write_bytes(to_idx(self.IMAGES))
        with pytest.raises(DataError, match="cannot be read"):
            idx.read_idx(tmp_path / "images.gz", 3)


class TestNpz:
    def test_channels_are_normalised_by_training(
        self, tmp_path: Path, arrays: dict[str, np.ndarray]
    ) -> None:
        arrays["x_train"][:, 1] = 7.0  # constant: becomes zeros, not NaN
        loaded = load_npz(tmp_path, arrays)
        assert (loaded.name, loaded.classes, loaded.shape) == ("some", 3, (2, 5, 4))
        assert [len(s) for s in (loaded.train, loaded.validation, loaded.test)] == [54, 6, 9]
        first = loaded.train.images[:, 0].double()
        assert abs(first.mean()) < 1e-6
        assert abs(first.std(correction=0) - 1) < 1e-6
        assert torch.equal(loaded.train.images[:, 1], torch.zeros(54, 5, 4))

    def test_own_validation_split(self, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
        arrays["x_val"], arrays["y_val"] = arrays["x_test"], arrays["y_test"]
        loaded = load_npz(tmp_path, arrays)
        assert [len(s) for s in (loaded.train, loaded.validation)] == [60, 9]
        assert torch.equal(loaded.validation.images, loaded.test.images)

    def test_grey_images_need_no_channel_axis(
        self, tmp_path: Path, arrays: dict[str, np.ndarray]
    ) -> None:
        grey = {k: a[:, 0] if k.startswith("x") else a for k, a in arrays.items()}
        assert load_npz(tmp_path, grey).shape == (1, 5, 4)

    def test_channels_that_come_last_are_put_first_and_said(
        self, tmp_path: Path, arrays: dict[str, np.ndarray]
    ) -> None:
        first = {k: a.repeat(4, 2)[:, [0, 1, 0]] if k[0] == "x" else a for k, a in arrays.items()}
        last = {k: a.transpose(0, 2, 3, 1) if k[0] == "x" else a for k, a in first.items()}
        one, other = load_npz(tmp_path, first), load_npz(tmp_path, last)
        assert one.shape == (3, 20, 4)
        assert one.digest == other.digest
        assert other.provenance == one.provenance + " (channels came last, and were put first)"

    def test_tables_are_normalised_by_feature(
        self, tmp_path: Path, arrays: dict[str, np.ndarray]
    ) -> None:
        table = {k: a.reshape(len(a), -1) if k[0] == "x" else a for k, a in arrays.items()}
        table["x_train"] = table["x_train"] * np.arange(1, 41)
        loaded = load_npz(tmp_path, table)
        assert loaded.shape == (40,)
        images = loaded.train.images.double()
        assert images.mean(0).abs().max() < 1e-6
        assert (images.std(0, correction=0) - 1).abs().max() < 1e-5

    def test_sequences_are_normalised_by_channel(
        self, tmp_path: Path, arrays: dict[str, np.ndarray]
    ) -> None:
        series = {k: a[:, 0] * [1, 10, 100, 1000] if k[0] == "x" else a for k, a in arrays.items()}
        loaded = load_npz(tmp_path, {**series, "kind": np.array("sequence")})
        assert loaded.shape == (5, 4)  # length, channels
        images = loaded.train.images.double()
        assert images.mean((0, 1)).abs().max() < 1e-6
        assert (images.std((0, 1), correction=0) - 1).abs().max() < 1e-5

    def test_groups_follow_their_samples(
        self, tmp_path: Path, arrays: dict[str, np.ndarray]
    ) -> None:
        sites = np.array(["b", "a", "c"])[np.arange(60) // 20]
        arrays["x_train"][:, 0] = (np.arange(60) // 20)[:, None, None]  # tells the site
        loaded = load_npz(tmp_path, {**arrays, "g_train": sites})
        assert loaded.groups is not None
        assert len(loaded.groups) == len(loaded.train) == 54
        seen = loaded.train.images[:, 0, 0, 0]
        for site, number in enumerate((1, 0, 2)):  # in order of their names
            assert len(seen[loaded.groups == number].unique()) == 1, site
        assert load_npz(tmp_path, arrays).groups is None
        assert load_npz(tmp_path, arrays).digest != loaded.digest

    def test_digest_tells_data_apart(self, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
        before = load_npz(tmp_path, arrays).digest
        assert load_npz(tmp_path, arrays).digest == before
        arrays["y_test"] = arrays["y_test"][::-1].copy()
        assert load_npz(tmp_path, arrays).digest != before

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("x_train", np.zeros(60), r"samples are numbers of shape .* not float64 of shape"),
            (
                "x_train",
                np.zeros((60, 40)),
                r"images of test are \[2, 5, 4\], those of train \[40\]",
            ),
            ("x_train", np.full((60, 2, 5, 4), "a"), "samples are numbers"),
            ("kind", np.array("sequence"), "kind is one of table, .* not 'sequence' with 4"),
            ("kind", np.array("sound"), "not 'sound' with 4"),
            ("g_train", np.zeros(9, int), "g_train names a group for each of the 60 training"),
            ("g_train", np.zeros(60), "by a number or text, not float64"),
            ("x_train", np.full((60, 2, 5, 4), np.nan), "NaN, infinity or"),
            ("x_test", np.full((9, 2, 5, 4), 1e39), "too large for float32"),
            ("x_train", np.zeros((0, 2, 5, 4)), "0 images need as many"),
            ("y_train", np.zeros(60), "integer labels in one dimension, not float64"),
            ("y_train", np.zeros((60, 3), int), "integer labels in one dimension"),
            ("y_train", np.arange(60) % 3 * 2, "no training image of class 1"),
            ("y_train", np.arange(60) % 3 + 2**40, "no training image of class 0"),
            ("y_train", np.arange(60) % 3 - 1, "run from -1"),
            ("y_test", np.full(9, 3), "labels of test run from 3 to 3"),
            ("x_test", np.zeros((9, 1, 5, 4)), r"images of test are \[1, 5, 4\]"),
            ("x_test", np.array([None]), "x_test holds Python objects, not numbers"),
        ],
    )
    def test_malformed(
        self,
        tmp_path: Path,
        arrays: dict[str, np.ndarray],
        key: str,
        value: np.ndarray,
        message: str,
    ) -> None:
        with pytest.raises(DataError, match=message):
            load_npz(tmp_path, {**arrays, key: value})

    def test_missing_keys_are_named(self, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
        del arrays["y_test"]
        with pytest.raises(DataError, match="no y_test; it holds x_train, y_train, x_test"):
            load_npz(tmp_path, arrays)

    def test_half_a_validation_split(self, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
        with pytest.raises(DataError, match="x_val and y_val go together"):
            load_npz(tmp_path, {**arrays, "y_val": arrays["y_test"]})

    def test_not_an_archive(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no file"):
            data.load(str(tmp_path / "absent.npz"))
        np.save(tmp_path / "array.npy", np.zeros(3))
        (tmp_path / "array.npy").rename(tmp_path / "array.npz")
        with pytest.raises(DataError, match=r"not an \.npz file"):
            data.load(str(tmp_path / "array.npz"))

    def test_damaged_archives_are_data_errors(
        self, tmp_path: Path, arrays: dict[str, np.ndarray]
    ) -> None:
        np.savez_compressed(tmp_path / "some.npz", **arrays)
        whole = (tmp_path / "some.npz").read_bytes()
        damaged = tmp_path / "damaged.npz"
        for position in range(0, len(whole), 97):
            content = bytearray(whole)
            content[position] ^= 0xFF
            damaged.write_bytes(content)
            try:
                loaded = data.load(str(damaged))
            except DataError:
                continue
            assert loaded.digest == load_npz(tmp_path, arrays).digest


class TestDigits:
    def test_splits(self) -> None:
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
        loaded = data.load("digits")
        assert (loaded.name, loaded.classes, loaded.shape) == ("digits", 10, (1, 8, 8))
        sizes = [len(s) for s in (loaded.train, loaded.validation, loaded.test)]
        assert sum(sizes) == 1_797
        assert sizes == [1_302, 140, 355]

    def test_without_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn", None)
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(DataError, match="pip install scikit-learn"):
            data.load("digits")

    def test_by_scikit_learn_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
        read = data.load("digits").digest
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert data.load("digits").digest == read


def test_unknown_name() -> None:
    with pytest.raises(DataError, match=r"'cifar'.*fashion-mnist-subset, fashion-mnist, digits"):
        data.load("cifar")


def test_hold_out_keeps_a_class_of_one() -> None:
    stay, held = data.hold_out(np.array([0, 1, 1, 0, 2, 0]), 3)
    assert (stay.tolist(), held.tolist()) == ([0, 1, 3, 4], [2, 5])
