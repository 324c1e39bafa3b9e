"""Growth: which points are measured, what is skipped, and the curves that records hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmap_sparse import backends, ops
from fedmap_sparse.bench import expected, growth, inputs, main, report
from fedmap_sparse.bench.case import CLIENTS

needs_cpu = pytest.mark.skipif(
    backends()["cpu"] != "available", reason=f"cpu backend: {backends()['cpu']}"
)


def record(**changes: Any) -> dict[str, Any]:
    found = {
        "op": "pack", "n": 1000, "density": 0.1, "dtype": "float32", "device": "cpu", "threads": 2,
        "inputs": "normal", "median_s": 1.0, "bytes": 1000, "floor_s": 0.5,
    }  # fmt: skip
    return {**found, **changes}


def test_points() -> None:
    found = growth.points(6)
    assert len(set(found)) == len(found)
    of_sgd = [p for p in found if p.op == "masked_sgd"]
    assert {p.n for p in of_sgd} == set(growth.SIZES)
    assert {p.density for p in of_sgd} == set(growth.DENSITIES)
    assert {p.threads for p in of_sgd} == {1, 2, 4, 6}
    assert {p.dtype for p in of_sgd} == {torch.float32}
    largest = {p.op: p.n for p in found if p.dtype == torch.bfloat16}
    assert largest == {"select": 10**9, "pack": 10**9, "encode": 10**9}
    assert {p.density for p in found if p.op == "encode"} == {growth.DENSITY}
    of_clients = {p.clients for p in found if p.op == "accumulate" and p.n == growth.CLIENTS_AT}
    assert of_clients == {*growth.CLIENTS, CLIENTS}
    assert {
        (p.op, p.n) for p in growth.points(1, ops=["pack"], sizes=[30, 20], densities=[0.5])
    } == {
        ("pack", 20),
        ("pack", 30),
    }


def test_what_does_not_fit_is_skipped() -> None:
    point = growth.Point("select", 10**9, 0.1, torch.bfloat16, 2)
    assert point.need == 12 * 10**9
    assert growth.skip(point, None) is None
    assert growth.skip(point, point.need) is None
    line = growth.skip(point, point.need - 1)
    assert line == (
        "select n=1,000,000,000 bfloat16 was skipped: it takes 12 GB of memory, and 12 GB are free"
    )


@needs_cpu
def test_a_skipped_point_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("rich", reason="rich prints the table")
    monkeypatch.setattr(growth, "available", lambda: 10**6)
    out = tmp_path / "r.json"
    words = ["--growth", "--quick", "--ops", "pack", "--sizes", "20000,40000000"]
    assert main([*words, "--densities", ".1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {r["n"] for r in found["records"]} == {20000}
    assert {r["threads"] for r in found["records"]} >= {1}
    assert all(r["peers"] == {} for r in found["records"])
    (line,) = found["header"]["skipped"]
    assert "pack n=40,000,000 float32 was skipped" in line
    printed = " ".join(capsys.readouterr().out.split())
    assert line in printed
    assert "exponent" in printed


@pytest.mark.parametrize("words", [["--round"], ["--ops", "unpack"], ["--ops", "latency"]])
def test_wrong_values_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="rich prints the table")
    assert main(["--growth", "--quick", *words]) == 2
    assert words[-1] in capsys.readouterr().err


def test_curves_and_exponents() -> None:
    records = [record(n=n, bytes=n, median_s=1e-3 + 1e-9 * n) for n in growth.SIZES]
    records += [record(op="half", density=d, median_s=d**0.5) for d in growth.DENSITIES]
    records += [record(op="sum", threads=t, median_s=1 / t) for t in (4, 1, 2)]
    records += [record(op="mean", clients=c, median_s=c) for c in (1, 100, 3, 30)]
    records += [record(op="mean", median_s=10)]  # one that does not say has the usual number
    records += [record(op="few", n=n) for n in (1, 2, 3, 4)]
    records += [record(op="other", n=n, dtype=f"float{n}") for n in range(1, 9)]
    by_n, by_density, by_threads, by_clients = growth.series(records)
    assert by_clients.values("clients") == [1, 3, 10, 30, 100]
    assert by_clients.exponent(0) == pytest.approx(1)
    assert by_n.values("n") == sorted(growth.SIZES)
    everything, beyond = by_n.exponent(0), by_n.exponent(9e6)
    assert everything is not None
    assert everything < 0.6
    assert beyond == pytest.approx(0.97, abs=0.02)
    assert by_n.exponent(5e7) is None
    assert by_density.exponent(1e18) == pytest.approx(0.5)
    assert by_threads.values("threads") == [1, 2, 4]
    assert by_threads.exponent(0) == pytest.approx(-1)
    rows = report.growth_rows(records, 9_000_000)
    assert rows[0][:4] == ["pack float32", "n", "10,000", "100,000,000"]
    assert rows[0][5] == f"{beyond:.2f}"
    assert rows[1][1:4] == ["density", "0.001", "1"]
    assert rows[3][1:4] == ["clients", "1", "100"]


@pytest.mark.parametrize("bad", [{"floor_s": None}, {"n": 0}, {"bytes": "x"}, {"threads": 10**400}])
def test_records_that_cannot_be_drawn_are_left_out(bad: dict[str, Any]) -> None:
    records = [record(n=n) for n in range(1, 6)]
    assert len(growth.series(records)) == 1
    assert growth.series([{**records[0], **bad}, *records[1:]]) == []


def test_large_16_bit_selections_are_checked_by_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "SORTABLE", 10)
    monkeypatch.setattr(expected, "CHUNK", 700)
    for dtype in (torch.bfloat16, torch.float16):
        for kind in inputs.SYNTHETIC:
            values = inputs.values(kind, 3001, dtype=dtype)
            for keep in (1, 300, 3000, 3001):
                sorted_ = ops.magnitude_mask(values, keep, backend="reference")
                assert expected.expected_mask(values, keep) == sorted_, (dtype, kind, keep)
