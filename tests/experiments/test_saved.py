"""A checkpoint whose checksum is good and whose contents are not: one line, nothing changed."""

import copy
from pathlib import Path
from typing import Any

import pytest

from fedmap_sparse import cli
from fedmap_sparse.errors import StateError
from fedmap_sparse.experiments import checkpoint, saved

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

RUN = ["run", "dataset=digits", "model=mlp", "clients=2", "rounds=2", "batch_size=400", "threads=1",
       "baseline=false"]  # fmt: skip
GONE = object()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "run"
    assert cli.main([*RUN, "--out", str(out)]) == 0
    (out / "checkpoint.previous.safetensors").unlink()
    return out


def changed(state: Any, path: str, value: Any) -> Any:
    """A copy with another value at a place such as "records.0.arm"."""
    found = copy.deepcopy(state)
    inside, keys = found, [int(k) if k.isdigit() else k for k in path.split(".")]
    for key in keys[:-1]:
        inside = inside[key]
    if value is GONE:
        del inside[keys[-1]]
    else:
        inside[keys[-1]] = value
    return found


PLACES: list[tuple[str, Any]] = [
    *((name, GONE) for name in ("records", "arms", "config", "data", "python")),
    *((name, 5) for name in ("records", "arms", "config", "data", "python")),
    ("records", [1]), ("records.0", {}), ("records.0.accuracy", "high"),
    ("records.0.accuracy", float("nan")), ("records.0.accuracy", True), ("records.0.round", 1),
    ("records.0.arm", "other"), ("records.0.seconds", None), ("records.0.seconds.total", GONE),
    ("records.0.clients.worst", "none"), ("records.1", GONE), ("arms.fedmap", 5),
    ("arms.fedmap.server", GONE), ("arms.fedmap.server.round", 99), ("arms.more", {}),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), PLACES)
def test_contents_are_checked(place: str, value: Any, run: Path) -> None:
    state = checkpoint.load(run / "checkpoint.safetensors")
    saved.check(state)
    with pytest.raises(StateError, match=r"expected"):
        saved.check(changed(state, place, value))
    with pytest.raises(StateError, match="expected a dict"):
        saved.check([state])


@pytest.mark.parametrize(
    ("place", "value"),
    [("records", GONE), ("arms.fedmap.attempt", -1), ("arms.fedmap.clients.0", [0, 5]),
     ("arms.fedmap.server.values", None), ("config.rounds", "x"), ("config.\x1b[2J", 1)],
)  # fmt: skip
def test_a_run_with_such_a_checkpoint_is_one_line(
    place: str, value: Any, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoint.safetensors"
    good = path.read_bytes()
    checkpoint.save(path, changed(checkpoint.load(path), place, value))
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    try:
        capsys.readouterr()
        assert cli.main(["run", "--resume", "--out", str(run)]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        assert text[:-1].isprintable()
        assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    finally:
        path.write_bytes(good)
