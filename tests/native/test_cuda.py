"""CUDA C++ without a GPU: threads as fibers, and what Python has to know of its structs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fedmap_sparse import Mask, _backends, ops
from fedmap_sparse.cuda_kernels import _driver, select

HERE = Path(__file__).parent / "cuda"
CXX = os.environ.get("CXX", "g++")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which(CXX):
        pytest.skip(f"no C++ compiler {CXX}")
    out = tmp_path_factory.mktemp("cuda") / "select"
    # Fibers change stacks, which GCC takes for longjmp.
    flags = ["-O2", "-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    done = subprocess.run(
        [CXX, *flags, "-o", out, HERE / "select.cpp"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def test_select_agrees_with_a_sort(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "all right\n"


def test_python_knows_the_structs(program: Path) -> None:
    done = subprocess.run([program, "layout"], capture_output=True, text=True, check=True)
    theirs = [int(word) for word in done.stdout.split()]
    assert theirs == [select._JOB, select._PART.size, select._SHARE, select._STATE,
                      select.MOST_PARTS]  # fmt: skip


def test_a_forced_backend_that_cannot_serve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(100)
    with pytest.raises(ValueError, match="backend 'cuda' serves CUDA tensors, got a tensor on cpu"):
        ops.magnitude_mask(values, 10, backend="cuda")
    if not torch.cuda.is_available():
        assert _backends.backends()["cuda"] == "no CUDA device is available"
    monkeypatch.setattr(_driver, "_nvrtc", lambda: None)
    with pytest.raises(RuntimeError, match="libnvrtc of CUDA"):
        _driver.compile_cubin({"none.cu": b""}, "sm_90")


def test_the_source_is_found_and_too_much_is_left_to_others() -> None:
    files = _driver.source("select")
    assert next(iter(files)) == "select.cu"
    assert b"select_32" in files["select.cu"]
    assert "select_job.h" in files
    with pytest.raises(RuntimeError, match=r"nothing\.cu: not found"):
        _driver.source("nothing")
    many = [torch.randn(1)] * (select.MOST_PARTS + 1)
    assert select.magnitude_mask(many, [None] * len(many), len(many), 3) is NotImplemented


def test_where_cuda_is_forced_other_ops_take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pack` has no CUDA C++: its Triton form is asked, which wants a device."""
    op = ops._library.OPS["pack_out"]
    asked: list[str] = []
    monkeypatch.setattr(_backends, "forced", lambda backend, device: backend)
    monkeypatch.setitem(op._forms, "triton", lambda *a: asked.append("triton"))
    mask = Mask.from_bool(torch.tensor([True, False]))
    ops.pack(torch.ones(2), mask, backend="cuda")
    assert asked == ["triton"]
