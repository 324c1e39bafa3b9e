"""`fedmap-sparse bench compare`: cells that moved, cells of one file, other files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fedmap_sparse import cli
from fedmap_sparse.bench import compare, main

pytest.importorskip("rich", reason="rich prints the table")

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
HEADER: dict[str, Any] = {
    "machine": "one", "cores": 2, "isa": "avx2", "threads": 2, "commit": "abc",
    "versions": {"torch": "2.13.0"}, "others_cpus": 0.01,
}  # fmt: skip


def record(op: str, median: float, spread: float = 0.01, **changes: Any) -> dict[str, Any]:
    return {
        "op": op, "n": 1000, "density": 0.1, "dtype": "float32", "device": "cpu", "threads": 2,
        "inputs": "normal", "median_s": median, "p20_s": median * (1 - spread),
        "p80_s": median * (1 + spread), "floor_s": 1.0, "peers": {},
    } | changes  # fmt: skip


def write(path: Path, *records: dict[str, Any], refused: Any = (), **header: Any) -> str:
    found = {"header": HEADER | header, "records": records, "refused": list(refused)}
    path.write_text(json.dumps(found))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "a.json", tmp_path / "b.json"


def run(*words: str) -> int:
    return cli.main(["bench", "compare", *words])


@pytest.mark.parametrize(
    ("median", "spread", "threshold", "moved"),
    [
        (1.06, 0.01, 1.05, "slower"),
        (1.04, 0.01, 1.05, None),
        (1.04, 0.01, 1.03, "slower"),
        (1.06, 0.04, 1.05, None),  # 1.0176 to 1.1024 beside 0.96 to 1.04
        (0.94, 0.01, 1.05, "faster"),  # 1 / 1.05 = 0.952
        (0.96, 0.01, 1.05, None),
        (0.94, 0.04, 1.05, None),
    ],
)
def test_moved_beyond_both_threshold_and_spread(
    files: tuple[Path, Path], median: float, spread: float, threshold: float, moved: str | None
) -> None:
    a, b = files
    left = compare.read(Path(write(a, record("pack", 1, spread))))
    right = compare.read(Path(write(b, record("pack", median, spread, floor_s=1.5))))
    found = compare.compare(left, right, threshold)
    (change,) = found.changes
    assert change.moved == moved
    assert change.ratio == pytest.approx(median)
    assert change.least == pytest.approx(median * (1 - spread) / (1 + spread))
    assert change.most == pytest.approx(median * (1 + spread) / (1 - spread))
    assert change.floor == 1.5
    assert found.slower == (moved == "slower")
    assert run(str(a), str(b), "--threshold", str(threshold)) == int(moved == "slower")


def test_a_line_for_each_cell_that_moved(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    a, b = files
    write(a, record("pack", 1), record("select", 2), record("unpack", 3), record("gone", 1))
    wrong = {"op": "gone", "n": 1000, "density": 0.1, "dtype": "float32", "inputs": "normal",
             "reason": "CheckFailed: [red]1 of 2[/red] differ\x1b[2K"}  # fmt: skip
    write(
        b, record("pack", 0.5), record("select", 3), record("unpack", 3.03), record("new", 1),
        record("pack", 9, density=0.5), refused=[wrong],
    )  # fmt: skip
    assert run(str(a), str(b), "--json", str(tmp_path / "out.json")) == 1
    text = capsys.readouterr().out
    rows = {line.split()[0]: line for line in text.splitlines() if "×" in line}
    assert "×1.500" in rows["select"]
    assert "slower" in rows["select"]
    assert "1.470–1.530" in rows["select"]
    assert "×0.500" in rows["pack"]
    assert "faster" in rows["pack"]
    assert "unpack" not in rows
    assert "1 of 3 cells did not move" in text
    assert "only in A: gone" in text
    assert "[red]1 of 2[/red] differ\\x1b[2K" in text
    assert "only in B: new" in text
    assert "only in B: pack n=1,000 density=0.5" in text
    assert text.index("select") < text.index("faster")

    found = json.loads((tmp_path / "out.json").read_text())
    assert {c["op"]: c["moved"] for c in found["cells"]} == {
        "pack": "faster", "select": "slower", "unpack": None,
    }  # fmt: skip
    assert [c["op"] for c in found["only_a"]] == ["gone"]
    assert [(c["op"], c["density"]) for c in found["only_b"]] == [("new", 0.1), ("pack", 0.5)]
    assert found["threshold"] == 1.05
    assert found["a"]["header"] == HEADER


@pytest.mark.parametrize(
    ("field", "other"),
    [("n", 2000), ("density", 0.2), ("dtype", "float16"), ("device", "cuda"), ("threads", 1),
     ("inputs", "ties"), ("op", "unpack")],
)  # fmt: skip
def test_records_match_by_every_field(files: tuple[Path, Path], field: str, other: Any) -> None:
    a, b = files
    write(a, record("pack", 1), record("select", 1))
    write(b, record("pack", 5) | {field: other}, record("select", 1))
    assert run(str(a), str(b)) == 0
    found = compare.compare(compare.read(a), compare.read(b))
    assert [c.cell.op for c in found.changes] == ["select"]
    assert len(found.only_a) == len(found.only_b) == 1


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"machine": "two"}, "machine differs: one in A, two in B"),
        ({"isa": "scalar"}, "isa differs: avx2 in A, scalar in B"),
        ({"threads": 1}, "threads differs: 2 in A, 1 in B"),
        ({"versions": {"torch": "2.12.0"}}, "torch differs: 2.13.0 in A, 2.12.0 in B"),
        ({"others_cpus": 0.3}, "others kept 0.3 CPUs busy during B"),
        ({}, None),
    ],
)
def test_warnings(
    files: tuple[Path, Path], header: dict[str, Any], words: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    a, b = files
    write(a, record("pack", 1))
    write(b, record("pack", 1), **header)
    assert run(str(a), str(b)) == 0
    text = capsys.readouterr().out
    assert len(compare.compare(compare.read(a), compare.read(b)).warnings) == (words is not None)
    assert (words or "1 of 1 cells did not move") in text


def bent(change: str) -> Any:
    whole = {"header": copy.deepcopy(HEADER), "records": [record("pack", 1), record("select", 1)]}
    exec(change, {"whole": whole})
    return whole


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 200_000, "no JSON"),
        (b"[1]", r"got [1]"),
        (b"{}", "keys none"),
        (json.dumps(bent("whole['header'].pop('isa')")).encode(), "header lacks isa"),
        (json.dumps(bent("whole['header']['versions'] = 3")).encode(), "header lacks versions"),
        (json.dumps(bent("whole['records'][1] = 3")).encode(), "record 1 is 3"),
        (json.dumps(bent("whole['records'][1].pop('op')")).encode(), "record 1 has op None"),
        (json.dumps(bent("whole['records'][0]['n'] = '9'")).encode(), "record 0 has n '9'"),
        (json.dumps(bent("whole['records'][0]['p80_s'] = 0")).encode(), "has p80_s 0"),
        (json.dumps(bent("whole['records'][0]['p20_s'] = float('nan')")).encode(), "p20_s nan"),
        (json.dumps(bent("whole['records'][0]['median_s'] = 10**400")).encode(), "has median_s"),
    ],
    ids=range(13),
)
def test_foreign_files_exit_with_2(
    files: tuple[Path, Path], content: bytes | None, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = files
    write(a, record("pack", 1))
    if content is not None:
        b.write_bytes(content)
    for words in ((str(a), str(b)), (str(b), str(a))):
        assert run(*words) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert message.startswith(f"bench compare: {b}: expected ")
        assert named in message


def test_other_json_of_this_project_is_foreign(capsys: pytest.CaptureFixture[str]) -> None:
    kernels = str(RESULTS / "h100" / "kernels.json")
    assert main(["compare", kernels, kernels]) == 2
    assert "kernels.json: expected a header and records" in capsys.readouterr().err


def test_no_cell_in_common_is_no_success(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = files
    write(a, record("pack", 1))
    write(b, record("pack", 1, threads=1))
    assert run(str(a), str(b)) == 2
    assert "they share none" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_did_not_move_against_themselves(file: Path) -> None:
    one = compare.read(file)
    found = compare.compare(one, one, threshold=1)
    assert len(found.changes) == len(json.loads(file.read_text())["records"])
    assert found.moved == []
    assert found.warnings == ()


@pytest.mark.parametrize("threshold", ["0.9", "nan", "inf", "some"])
def test_thresholds(threshold: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("a", "b", "--threshold", threshold)
    assert stop.value.code == 2
    assert "--threshold" in capsys.readouterr().err


def test_what_bench_writes_can_be_compared(tmp_path: Path) -> None:
    written = str(tmp_path / "r.json")
    words = ["--ops", "pack", "--sizes", "4000", "--quick", "--json", written]
    assert cli.main(["bench", *words]) == 0
    assert main(["compare", written, written]) == 0
