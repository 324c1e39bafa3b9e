"""NumPy users: its numbers where numbers are wanted, and arrays of every kind, unharmed."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fedmap_sparse as fs

W = np.arange(12, dtype=np.float32).reshape(3, 4)


def frozen():
    return np.frombuffer(W.tobytes(), np.float32).reshape(3, 4)


ARRAYS = {
    "read-only": frozen,
    "strided": lambda: np.repeat(W, 2, axis=1)[:, ::2],
    "fortran": lambda: np.asfortranarray(W),
    "reversed": lambda: W[::-1, ::-1].copy()[::-1, ::-1],
    "big-endian": lambda: W.astype(">f4"),
    "float64": lambda: W.astype(np.float64),
    "big-endian float64": lambda: W.astype(">f8"),
    "float16": lambda: W.astype(np.float16),
    "unaligned": lambda: np.frombuffer(b"x" + W.tobytes(), np.float32, offset=1).reshape(3, 4),
}


@pytest.mark.parametrize("make", ARRAYS.values(), ids=list(ARRAYS))
def test_arrays_are_encoded_as_they_are_and_come_back(make):
    array = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = fs.encode_state_dict({"w": array})
    got = fs.decode_state_dict(data, like={"w": array})["w"]
    assert got.dtype == array.dtype
    assert np.array_equal(got, W)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_numbers_of_numpy(kind):
    flat = fs.flatten(nn.Linear(8, 8))
    assert fs.ops.magnitude_mask(flat.prunable, kind(5)).nnz == 5
    data = fs.encode(flat, flat.mask, num_samples=kind(5), meta={"loss": np.float32(0.5)})
    message = fs.decode(data, flat.layout)
    assert message.num_samples == 5
    assert message.meta["loss"] == 0.5
    assert fs.Mask.full(kind(7)).numel == 7


def test_a_flat_model_shares_its_memory_with_numpy():
    flat = fs.flatten(nn.Linear(8, 8))
    flat.values.numpy()[:] = 2.0
    assert flat.module.weight.eq(2).all()
    assert torch.from_numpy(flat.module.weight.detach().numpy()).eq(2).all()
