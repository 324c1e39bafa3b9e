"""NVFlare's simulator: jobs with the codec's filters, and FedMap's rounds."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedmap_sparse as fs
from fedmap_sparse.engines.in_process import InProcessEngine
from fedmap_sparse.errors import FormatError

pytest.importorskip("nvflare", reason="NVFlare is not installed: make test-engines installs it")

from nvflare.apis.dxo import DXO, DataKind, MetaKey

from fedmap_sparse.engines.nvflare import FedMapDecoder, FedMapEncoder

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[2] / "examples/nvflare"


def run(script: Path, *args: str, folder: Path) -> str:
    """A script in a process of its own, which finds its neighbours."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


slow = pytest.mark.skipif(
    not os.environ.get("FEDMAP_SPARSE_ENGINES"), reason="slow: make test-engines runs it"
)


@slow
def test_a_job_ends_with_the_same_model_with_and_without_the_filters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import nvflare_job

    models = {}
    for kind in ("plain", "coded"):
        said = run(HERE / "nvflare_job.py", str(tmp_path / kind), kind, folder=HERE)
        found = sorted((tmp_path / kind).rglob("FL_global_model.pt"))
        assert found, said
        models[kind] = torch.load(found[0], weights_only=True)["model"]
    assert list(models["plain"]) == list(models["coded"])
    start = nvflare_job.Net().state_dict()
    assert not torch.equal(
        torch.as_tensor(models["plain"]["layers.0.bias"]), start["layers.0.bias"]
    )
    for name, t in models["plain"].items():
        assert torch.equal(torch.as_tensor(t), torch.as_tensor(models["coded"][name])), name


@slow
def test_fedmaps_rounds_give_the_bits_of_the_in_process_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run(EXAMPLE / "job.py", str(tmp_path), folder=EXAMPLE)
    assert "round 4: density 0.10" in said
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import task

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clients = {f"site-{n + 1}": task.make_client() for n in range(task.CLIENTS)}
    alone = task.make_server()
    engine = InProcessEngine(
        alone, clients, lambda name, c, m: task.train(int(name.split("-")[1]) - 1, c, m)
    )
    for _ in range(task.ROUNDS):
        engine.round()
    torch.set_num_threads(threads)
    server = task.make_server()
    server.from_bytes((tmp_path / "server.state").read_bytes())
    assert torch.equal(server.params.values, alone.params.values)
    assert server.mask == alone.mask


def coded(dxo: DXO, **options: Any) -> DXO:
    out = FedMapEncoder(**options).process_dxo(dxo, None, None)
    assert out is not None
    return out


@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_filters_leave_the_weights_as_they_were(kind: str, framework: str) -> None:
    w = torch.randn(40, 50) * (torch.rand(40, 50) < 0.1) + 0.0
    data: dict[str, Any] = {"w": w, "b": torch.arange(40.0), "n": torch.tensor(7)}
    if framework == "numpy":
        data = {name: t.numpy() for name, t in data.items()}
    dxo = DXO(kind, data, {"weight": 3})
    sent = coded(dxo)
    assert dxo.data is data
    assert sent.data_kind == kind
    assert len(sent.data["message"]) < 2000 < w.numel() * 4
    back = FedMapDecoder().process_dxo(sent, None, None)
    assert back is not None
    assert back.meta == dxo.meta
    for name, value in data.items():
        assert np.array_equal(back.data[name], np.asarray(value)), name


def test_filters_let_pass_what_is_not_theirs() -> None:
    plain = DXO(DataKind.WEIGHTS, {"w": np.ones(3)})
    assert FedMapDecoder().process_dxo(plain, None, None) is None
    plain.set_meta_prop(MetaKey.PROCESSED_ALGORITHM, "homomorphic encryption")
    assert FedMapEncoder().process_dxo(plain, None, None) is None


def test_the_decoder_bounds_what_a_message_may_claim() -> None:
    sent = coded(DXO(DataKind.WEIGHTS, {"w": np.ones((10, 10), np.float32)}))
    with pytest.raises(FormatError, match="expected fewer elements"):
        FedMapDecoder(max_numel=99).process_dxo(sent, None, None)


def test_a_client_that_lost_its_mask_says_so() -> None:
    from nvflare.app_common.abstract.fl_model import FLModel

    from fedmap_sparse.engines.nvflare import fedmap_answer

    def make() -> fs.FlatParameters:
        return fs.flatten(torch.nn.Linear(8, 4))

    server = fs.FedMapServer(make(), fs.schedule.Iterative(0.5, start=0, end=1))
    server.begin_round()
    message = np.frombuffer(server.broadcast(server.mask.digest()), np.uint8)
    client = fs.FedMapClient(make())
    answer = fedmap_answer(FLModel(params={"message": message}), client, lambda c, m: (1, None))
    assert answer.meta == {"have": "", "needs_mask": True}
    full = np.frombuffer(server.broadcast(None), np.uint8)
    answer = fedmap_answer(FLModel(params={"message": full}), client, lambda c, m: (1, None))
    assert answer.meta == {"have": server.mask.digest().hex(), "needs_mask": False}
    assert server.aggregate([("site-1", answer.params["message"].tobytes())]).refused == {}
