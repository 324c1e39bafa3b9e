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


WRONG = {
    "structured": lambda: np.zeros(3, dtype=[("a", "f4")]),
    "objects": lambda: np.array([1, None], dtype=object),
    "text": lambda: np.array(["a"]),
    "dates": lambda: np.array(["2020"], dtype="datetime64[D]"),
    "longdouble": lambda: np.ones((2, 2), np.longdouble),
    "beyond 2^63": lambda: np.array([2**63], np.uint64),
    "complex": lambda: np.ones(3, np.complex64),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=list(WRONG))
def test_what_is_no_number_is_refused_by_name(make):
    with pytest.raises((TypeError, ValueError), match="odd: expected"):
        fs.encode_state_dict({"w": W, "odd": make()})


KINDS = {
    "bool": lambda: np.array([True, False]),
    "empty": lambda: np.ones((0, 4), np.float32),
    "big-endian float16": lambda: np.arange(4, dtype=">f2"),
    "matrix": lambda: np.asarray([[1.0, 2.0]]).view(np.matrix),
    "record": lambda: np.rec.array(np.ones(3, np.float32)),
    "int8": lambda: np.array([-3], np.int8),
    "big-endian int64": lambda: np.array([-3], ">i8"),
    "scalar": lambda: np.float32(2),
    "integer scalar": lambda: np.int64(2),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=list(KINDS))
def test_every_kind_comes_back(make):
    state = {"w": W, "odd": make()}
    got = fs.decode_state_dict(fs.encode_state_dict(state), like=state)["odd"]
    assert got.dtype == state["odd"].dtype
    assert np.array_equal(got, state["odd"])


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_schedules_take_numpys_numbers_as_they_print(kind):
    one = fs.schedule.OneShot(kind(0.1), at=np.int64(2))
    assert one == fs.schedule.OneShot(0.1, at=2)
    assert type(one.target) is float
    assert type(one.at) is int
    assert one.keep(np.int32(2), np.int64(1000)) == 900
    assert fs.schedule.Cubic(kind(0.9), np.int8(0), np.int8(4)).keep(4, 1000) == 100
    with pytest.raises(TypeError, match="target"):
        fs.schedule.OneShot(np.True_, at=0)


def test_weights_and_samples():
    ones = [torch.ones(3), torch.zeros(3)]
    assert torch.equal(fs.ops.weighted_mean(ones, np.array([1, 3])), torch.full((3,), 0.25))
    total = fs.ops.Accumulator(np.int64(3))
    total.add(ones[0], np.float32(1))
    total.add(ones[1], np.int16(3))
    assert torch.equal(total.mean(), torch.full((3,), 0.25))
    server = fs.FedMapServer(
        fs.flatten(nn.Linear(4, 4)), fs.schedule.Dense(), max_samples=np.int64(100)
    )
    client = fs.FedMapClient(fs.flatten(nn.Linear(4, 4)))
    server.begin_round()
    client.receive(server.broadcast(None))
    assert server.add(np.int64(3), client.update(np.int16(10)), weight=np.int32(3)) is None
    assert server.close_round().accepted == (3,)


def test_an_array_where_a_tensor_is_wanted():
    with pytest.raises(TypeError, match=r"values: expected a torch\.Tensor, got ndarray"):
        fs.ops.magnitude_mask(W.reshape(-1), 3)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({1: np.ones(3)}, "state: expected a dict of names to tensors, got .1."),
        ([np.ones(3)], "state: expected a dict"),
        (None, "state: expected a dict of names to tensors, got None"),
        ({"w": torch.ones(4, 4, device="meta")}, "w: expected elements in memory"),
        ({"w": np.ma.masked_equal(np.eye(4), 1)}, "w: expected an array without masked elements"),
    ],
)
def test_what_is_no_state_dict_is_refused_by_name(state, says):
    with pytest.raises((TypeError, ValueError), match=says):
        fs.encode_state_dict(state)
