"""What benchmarks/gpu_report.py makes of a run of tools/measure_gpu.py."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_RECORD = {
    "op": "select", "density": 0.1, "n": 1000, "median_s": 8e-5, "floor_s": 3e-5, "call_s": 2e-4,
    "peers": {
        "torch.sort": {"median_s": 1.2e-3, "speedup": 15.0, "call_s": 1.3e-3},
        "torch.topk": {"median_s": 6e-4, "speedup": 7.5, "call_s": 6.5e-4},
    },
}  # fmt: skip
_FILES: dict[str, Any] = {
    "run": {"time": "2026-11-26T22:00:00Z", "commit": "abcdef0123", "mode": [],
            "steps": {"baseline": {"state": "timed out", "seconds": 65.0, "output": "long"}}},
    "machine": {"dry": False, "card": "NVIDIA H200", "versions": {"torch": "2.11"},
                "bandwidth": {"copy 105 MB": {"us": 100.0, "GB/s": 1900.0},
                              "copy 420 MB": {"us": 100.0, "GB/s": 2000.0},
                              "read 420 MB": {"us": 100.0, "GB/s": 3000.0}}},
    "baseline": {"dry": False, "n": 1000, "left_out": "from x on: no time left", "workloads": {
        "pack": {"us": 40.0, "floor_bytes": 40_000_000, "kernels_us": {"_pack": 38.0}},
        "select float32 (CUDA C++)": {"us": 80.0, "floor_bytes": 40_000_000, "kernels_us": {
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int> >": 1.0,
            "select_32(Job)": 70.0}},
        "select float32": {"us": 122.0, "floor_bytes": 40_000_000},
        "cast": {"error": "out | of registers"}}},
    "sweeps": {"sweeps": {
        "A": {"default": [1, 2], "chosen": [3, 4],
              "us": {"(1, 2)": {"pack": 9.0}, "(3, 4)": {"pack": 8.0}, "(5, 6)": "failed"}},
        "B": {"default": 1, "us": {"1": {"pack": 9.0}, "2": {"pack": 9.5}, "3": {"pack": 9.1}}}},
        "l2_fetch": {"32": {"accepted": 32, "pack": 7.0}}},
    "ties": {"ties": {"normal float32 0.1 (CUDA C++)": {"us": 60.0, "of normal": 1.0},
                      "constant float32 0.1 (CUDA C++)": {"us": 90.0, "of normal": 1.5},
                      "constant float32 0.1": {"us": 180.0, "of normal": 2.0}}},
    "waits": {"captures": {"pack": "refused: E: a | b\nmore"}, "syncs": {"cast": ["quantize.py:9"]},
              "host_us": {"cast": 12.0, "select": 49.0}, "profile": {"select": ["long"]}},
    "chunks": {"chunks": {"1024": {"bytes": 99, "encode_mask": 70.0, "decode_mask": 130.0}}},
    "graphs": {"wall_us": {"local step": {"direct": 300.0, "replay": 40.0}}},
    "peers": {"records": [_RECORD], "peers_left_out": ["torch.kthvalue"]},
    "contracts": {"tests": "1 failed, 99 passed", "failures": {"test_a": "x\nE  assert 1 == 2\n"},
                  "stress": {"selections": 10000, "wrong": 0}},
    "counters": {"launches": [{"workload": "pack", "kernel": "_pack", "dram__bytes_read.sum": 5e6,
                               "gpu__time_duration.sum": 30000.0}]},
}  # fmt: skip


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    return importlib.import_module("gpu_page"), importlib.import_module("gpu_picture")


def run_in(folder: Path, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in {**copy.deepcopy(_FILES), **changed}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_run_becomes_a_page(tmp_path: Path, modules: Any) -> None:
    page, _ = modules
    text = page.section(page.read(run_in(tmp_path / "run")), "A first run.")
    flat = " ".join(text.split())
    for part in (
        "NVIDIA H200; torch 2.11; commit abcdef0, 2026-11-26. A first run.", "(2,000 GB/s)",
        "baseline timed out", "| pack | 40.0 | 20.0 | 2.00 | | pack 38.0 |",
        "| select float32 (CUDA C++) | 80.0 | 20.0 | 4.00 | 85, met | fill 1.0, select_32 70.0 |",
        "| select float32 | 122 | 20.0 | 6.10 | 85, **missed** |", "out / of registers",
        "| A | (1, 2) | (3, 4), (5, 6) (failed) | **(3, 4)** | pack 9.0 → 8.0 |",
        "| B | 1 | 2, 3 | | pack 9.0, others 9.1 to 9.5 |", "| 32 | 7.0 |",
        "| input | float32 0.1 | float32 0.1 (CUDA C++) |",
        "| constant | 180 (×2); goal 170, **missed** | 90.0 (×1.5); goal 170, met |",
        "| select, 0.1 | 80.0 (200) | 30.0 | torch.topk 600 (650), ×7.5; torch.sort 1,200",
        "| pack | | | | refused: E: a / b |", "| cast | 12.0 | | 1 | |",
        "| select | 49.0 | 50, met |", "| 1024 | 99 | 70.0 | 130.0 |",
        "| local step | 300.0 | 40.0 | ×7.5 |", "from x on: no time left", "torch.kthvalue",
        "1 failed, 99 passed; 10,000 selections beside a stream that writes, 0 wrong.",
        "test_a: E assert 1 == 2", "| pack: pack | 30.0 | 5.0 |",
    ):  # fmt: skip
        assert part in flat
    once = page.put("head\n\n## Measured on an H100\ntail", text)
    assert once.startswith("head")
    assert once.endswith("## Measured on an H100\ntail")
    assert page.put(once, text) == once


def test_what_was_not_measured_is_refused(tmp_path: Path, modules: Any) -> None:
    page, _ = modules
    dry = run_in(tmp_path / "dry", run={**_FILES["run"], "mode": ["--dry-run"]})
    with pytest.raises(ValueError, match="a dry run measures nothing"):
        page.read(dry)
    with pytest.raises(ValueError, match=r"expected run\.json"):
        page.read(tmp_path)


def test_files_of_the_last_run_go(tmp_path: Path, modules: Any) -> None:
    page, _ = modules
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "old.json").write_text("{}")
    unnamed = {"launches": [{"kernel": "_pack"}]}
    found = page.read(run_in(tmp_path / "run", counters=unnamed))
    assert page.keep(found, tmp_path) == tmp_path / "h200"
    kept = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "h200").iterdir()}
    assert set(kept) == set(_FILES) - {"counters"}
    assert kept["graphs"] == _FILES["graphs"]
    assert "profile" not in kept["waits"]
    assert "output" not in kept["run"]["steps"]["baseline"]


def test_the_readme_shows_it(tmp_path: Path, modules: Any) -> None:
    page, picture = modules
    found = page.read(run_in(tmp_path / "run"))
    text = " ".join(picture.paragraph(found, "NVIDIA H200").split())
    assert "On an H200" in text
    assert "a selection with its mask 80.0 us (torch.topk 600)" in text
    del found["peers"]
    assert "a selection with its mask 80.0 us." in " ".join(
        picture.paragraph(found, "NVIDIA H200").split()
    )
    readme = f"head\n{picture.BEGIN}\nold\n{picture.END}\ntail"
    assert picture.put(readme, text) == f"head\n{text}\ntail"
    with pytest.raises(ValueError, match="expected <!-- figures"):
        picture.put("head", text)


def test_the_picture_has_every_bar(tmp_path: Path, modules: Any) -> None:
    pytest.importorskip("matplotlib")
    page, picture = modules
    drawn = picture.picture(page.read(run_in(tmp_path / "run")), "NVIDIA H200")
    for part in ("select a tenth", "80.0; torch.topk 600", "the floor", "prefers-color-scheme"):
        assert part in drawn
