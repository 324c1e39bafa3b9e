"""A server that prunes by the clients' training loss, and goes on from its state."""

from typing import Any

import pytest
import torch

import fedmap_sparse as fs
from fedmap_sparse.errors import StateError
from fedmap_sparse.schedule import Adaptive, Dense

SCHEDULE = Adaptive(0.9, start=1, end=6)


def server() -> fs.FedMapServer:
    torch.manual_seed(0)
    return fs.FedMapServer(fs.flatten(torch.nn.Linear(20, 10)), SCHEDULE)


def play(one: fs.FedMapServer, loss: float | None) -> int:
    """A round in which nothing is learned, and the client tells this loss; the survivors."""
    client = fs.FedMapClient(fs.flatten(torch.nn.Linear(20, 10)))
    one.begin_round()
    client.receive(one.broadcast())
    one.aggregate([(0, client.update(5, loss))])
    return one.mask.nnz


def test_it_prunes_when_the_loss_recovers_and_not_before() -> None:
    one = server()
    found = [play(one, loss) for loss in (2.0, 1.9, 1.0, 1.5, 1.6, 1.05, 1.0, 0.5)]
    # Round 3 is the first one after a loss of at most 0.6 of the first; 1.05 is within the margin.
    assert found[:3] == [200, 200, 200]
    assert found[3] == found[4] == found[5] == 112  # 200 * 0.1 ** (1 / 4)
    assert found[6] == 56  # half at most
    assert found[7] == 56  # after the last round that prunes


@pytest.mark.parametrize("form", ["dict", "bytes"])
def test_it_goes_on_from_a_state(form: str) -> None:
    one, other = server(), server()
    for loss in (2.0, 1.0, None, 1.0):
        play(one, loss)
    if form == "dict":
        other.load_state_dict(one.state_dict())
    else:
        other.from_bytes(one.to_bytes())
    for loss in (0.9, 0.8, 0.7):
        assert play(one, loss) == play(other, loss)
    assert other.mask == one.mask
    assert one.mask.nnz < 200


@pytest.mark.parametrize(
    "past", [[[1.0]], [[float("nan"), 3]], [[1.0, "3"]], [["1", 3]], [[1.0, True]], 7]
)
def test_a_damaged_past_is_refused(past: Any) -> None:
    one = server()
    with pytest.raises(StateError, match="past: expected"):
        one.load_state_dict({**one.state_dict(), "past": past})


def test_other_schedules_keep_no_past() -> None:
    one = fs.FedMapServer(fs.flatten(torch.nn.Linear(20, 10)), Dense())
    assert "past" not in one.state_dict()
