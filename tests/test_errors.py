"""Errors: one base, built-in bases that callers rely on, and they survive a pickle."""

import pickle

import pytest

import fedmap_sparse as fs
from fedmap_sparse import codec, errors, experiments, federated

EXAMPLES = {
    errors.FormatError("expected a, got b", 7): ValueError,
    errors.NeedsMask(b"w" * 16, None, 32): ValueError,
    errors.NeedsMask(b"w" * 16, b"h" * 16): errors.FormatError,
    errors.AuthenticationError("expected a known key"): errors.FormatError,
    errors.PayloadError("words run out", 3): ValueError,
    errors.RoundFailed("round 3: too few", {1: "not finite", "b": "late"}): RuntimeError,
    errors.StateError("round: expected an int"): ValueError,
    errors.CheckpointError("not a checkpoint"): errors.StateError,
    errors.ConfigError("rounds: expected at least 1"): ValueError,
    errors.DataError("no images"): ValueError,
    errors.BackendError("no triton"): RuntimeError,
    errors.WorkerDied("worker process 7 was ended by SIGKILL"): RuntimeError,
}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_each_error_has_both_bases_and_pickles(error: errors.FedMapError) -> None:
    assert isinstance(error, errors.FedMapError)
    assert isinstance(error, EXAMPLES[error])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_every_error_of_the_module_is_an_example() -> None:
    found = {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)}
    assert found - {errors.FedMapError} == {type(e) for e in EXAMPLES}


def test_errors_are_found_where_they_are_met() -> None:
    assert fs.FormatError is codec.FormatError is errors.FormatError
    assert fs.NeedsMask is codec.NeedsMask is federated.NeedsMask is errors.NeedsMask
    assert fs.RoundFailed is federated.RoundFailed is errors.RoundFailed
    assert experiments.ConfigError is errors.ConfigError
    assert experiments.DataError is errors.DataError
