"""CIFAR's binary archives, from files made here: what is read, and what is refused."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmap_sparse.errors import DataError
from fedmap_sparse.experiments import cifar, data


def made(name: str, each: int = 40) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """The files of a source with every class in each, and the images and labels in them."""
    source = cifar.SOURCES[name]
    rng = np.random.default_rng(0)
    files, found = {}, {}
    for file in (*source.train, *source.test):
        labels = np.arange(max(each, source.classes)) % source.classes
        images = rng.integers(0, 256, (len(labels), 3 * 32 * 32), np.uint8)
        columns = [labels[:, None].astype(np.uint8)]
        if source.labels == 2:
            columns.insert(0, np.full((len(labels), 1), 255, np.uint8))  # coarse: is not looked at
        files[file] = np.concatenate([*columns, images], axis=1).tobytes()
        found[file] = images.reshape(-1, 3, 32, 32)
    return files, found


def archive(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    source = cifar.SOURCES[name]
    path = folder / source.archive
    with tarfile.open(path, "w:gz") as tar:
        for file, content in {"readme.html": b"hello", **files}.items():
            member = tarfile.TarInfo(f"{source.folder}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", cifar.SOURCES)
@pytest.mark.parametrize("form", ["archive", "folder", "folder of folder"])
def test_images_and_labels_are_those_of_the_files(name: str, form: str, tmp_path: Path) -> None:
    files, images = made(name)
    source = cifar.SOURCES[name]
    if form == "archive":
        archive(tmp_path, name, files)
    else:
        place = tmp_path / source.folder if form == "folder of folder" else tmp_path
        place.mkdir(exist_ok=True)
        for file, content in files.items():
            (place / file).write_bytes(content)
    x, y, x_test, y_test = cifar.read(name, tmp_path)
    np.testing.assert_array_equal(x, np.concatenate([images[f] for f in source.train]))
    np.testing.assert_array_equal(x_test, images[source.test[0]])
    np.testing.assert_array_equal(y_test, np.arange(len(y_test)) % source.classes)
    assert len(y) == len(x)


def test_as_a_data_set(tmp_path: Path) -> None:
    files, _ = made("cifar10")
    archive(tmp_path, "cifar10", files)
    loaded = data.load("cifar10", tmp_path)
    assert (loaded.name, loaded.classes, loaded.shape) == ("cifar10", 10, (3, 32, 32))
    assert [len(s) for s in (loaded.train, loaded.validation, loaded.test)] == [180, 20, 40]
    assert torch.equal(loaded.validation.labels.bincount(), torch.full((10,), 2))
    assert loaded.train.images.mean((0, 2, 3)).abs().max() < 1e-5


def test_without_a_folder_or_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cifar10: name the folder of its binary archive, by data="):
        data.load("cifar10")
    with pytest.raises(DataError, match=r"no cifar-10-binary.tar.gz, and no data_batch_1.bin, in"):
        data.load("cifar10", tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    files, _ = made("cifar10")
    path = archive(tmp_path, "cifar10", {k: v for k, v in files.items() if k != "test_batch.bin"})
    with pytest.raises(DataError, match=r"no test_batch\.bin in it"):
        cifar.read("cifar10", tmp_path)
    archive(tmp_path, "cifar10", {**files, "data_batch_3.bin": files["data_batch_3.bin"][:-1]})
    with pytest.raises(DataError, match=r"data_batch_3\.bin: expected records of 3073 bytes, got"):
        cifar.read("cifar10", tmp_path)
    archive(tmp_path, "cifar10", {**files, "test_batch.bin": bytes([10]) + bytes(3072)})
    with pytest.raises(DataError, match="expected labels below 10, got 10"):
        cifar.read("cifar10", tmp_path)
    archive(tmp_path, "cifar10", files)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive", whole[:50_000] + bytes(1000)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz"):
            cifar.read("cifar10", tmp_path)
