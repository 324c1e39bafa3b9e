"""The page of benchmarks: whole, alone, escaped, and alive in a browser."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pages import Reader, in_chromium, needs_chromium, references

pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
pytest.importorskip("rich", reason="rich prints the table")

from fedmap_sparse import backends
from fedmap_sparse.bench import compare, main, page
from fedmap_sparse.bench.case import PHASES

ROOT = Path(__file__).parent.parent
RESULTS = sorted(ROOT.glob("benchmarks/results/*.json"))
COMMITTED = ROOT / "docs/_static/benchmarks.html"
HEADER = {
    "machine": "some CPU", "cores": 2, "last_level_cache": 1000, "isa": "avx2", "threads": 2,
    "versions": {"torch": "2.13.0"}, "commit": "0123456789abcdef", "others_cpus": 0.25,
    "time": "2026-01-01T00:00:00Z", "arguments": [],
}  # fmt: skip


def record(op: str, n: int, seconds: float, /, **changes: Any) -> dict[str, Any]:
    found = {
        "op": op, "n": n, "density": 0.1, "dtype": "float32", "device": "cpu", "threads": 2,
        "inputs": "normal", "median_s": seconds, "p20_s": seconds, "p80_s": seconds, "bytes": 4 * n,
        "gbps": 4 * n / seconds / 1e9, "floor_s": seconds / 2, "ratio_to_floor": 2.0, "peers": {},
    }  # fmt: skip
    return {**found, **changes}


def a_round(name: str, seconds: float) -> dict[str, Any]:
    def arm(times: float) -> dict[str, Any]:
        phases = {phase: times * seconds / len(PHASES) for phase in PHASES}
        return {"median_s": times * seconds, "phases_s": phases, "payload_bytes": 10, "speedup": 1}

    found = record(f"round_{name}", 1000, seconds)
    for key in ("bytes", "gbps", "floor_s", "ratio_to_floor"):
        del found[key]
    return {**found, **arm(1), "peers": {"Boolean masks": arm(9)}}


def whole() -> list[dict[str, Any]]:
    peers = {"torch.topk": {"median_s": 0.3, "speedup": 60.0}}
    return [
        record("select", 10**6, 0.005, peers=peers),
        *(record("pack", 10**k, 1e-9 * 10**k) for k in range(4, 9)),
        a_round("resnet20", 0.02),
    ]


def drawn(records: list[dict[str, Any]], header: dict[str, Any] = HEADER) -> str:
    return page.render([compare.checked(Path("a.json"), {"header": header, "records": records})])


def test_all_parts() -> None:
    text = drawn(whole())
    found = Reader(text)
    for words in (
        "some CPU", "torch 2.13.0", "0123456789abcdef", "others kept 0.25 CPUs busy",
        "Bandwidth and its roof", "Faster than", "Growth with n", "Whole rounds",
        "Ops", "Beside peers", "Growth", "Rounds",
        "torch.topk", "×60", "resnet20", "Boolean masks", "1.00",
    ):  # fmt: skip
        assert words in found.text, words
    assert found.elements.count("svg") == 4
    assert found.elements.count("table") == 4
    assert found.elements.count("tr") == 4 + 7 - 1 + 1 + 1 + 2
    assert "prefers-color-scheme: dark" in text
    assert not re.search("#0000[01][0-9a-f]", text), "a colour that the page does not know"


def test_the_page_loads_nothing() -> None:
    assert references(drawn(whole())) == []


def test_the_same_records_give_the_same_bytes() -> None:
    assert drawn(whole()) == drawn(whole())


def test_numbers_are_as_they_were() -> None:
    """Coordinates are rounded, figures in labels are not; no label is taken for a formula."""
    found = Reader(drawn([record("select$x_1$", 1000, 0.005, density=0.00125)]))
    assert "select$x_1$ 0.00125" in found.text


EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)> $x_1$ -->]]>\x1b[2K'


def test_what_comes_from_a_file_is_escaped() -> None:
    peers = {EVIL: {"median_s": 1.0, "speedup": 2.0}}
    evil = a_round("m", 1.0)
    arms = {EVIL: evil["peers"]["Boolean masks"]}
    records = [
        record(EVIL, 1000, 0.1, dtype=EVIL, inputs=EVIL, peers=peers),
        *(record(EVIL + "2", n, 0.1) for n in range(1, 7)),
        {**evil, "op": f"round_{EVIL}", "peers": arms},
    ]
    refused = [{"op": EVIL, "n": EVIL, "density": EVIL, "reason": EVIL}]
    header = {
        **HEADER, "machine": EVIL, "isa": EVIL, "commit": EVIL, "time": EVIL, "skipped": [EVIL],
        "others_cpus": EVIL, "versions": {EVIL: EVIL},
    }  # fmt: skip
    run = compare.checked(
        Path(f"{EVIL.replace('/', '')}.json"),
        {"header": header, "records": records, "refused": refused},
    )
    found = Reader(page.render([run, run]))
    assert found.elements.count("script") == 1
    assert "img" not in found.elements
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "alert" in found.text
    assert "\x1b" not in found.text


@pytest.mark.parametrize(
    "changes",
    [
        {"gbps": None},
        {"floor_s": "fast"},
        {"bytes": -1},
        {"peers": [1]},
        {"peers": {"topk": {}}},
        {"peers": {"topk": {"median_s": float("nan"), "speedup": float("inf")}}},
        {"phases_s": {"prune": 1}},
        {"n": -5},
        {"n": 10**400},
        {"density": float("nan")},
        {"threads": 0},
    ],
)
def test_what_a_record_lacks_is_left_out(changes: dict[str, Any]) -> None:
    records = [record("select", 1000, 0.1, **changes), record("unpack", 1000, 0.1)]
    found = Reader(drawn(records))
    assert "unpack" in found.text


def test_no_records() -> None:
    assert "some CPU" in Reader(drawn([])).text


def test_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(file) for file in RESULTS[:2]]
    out = tmp_path / "page.html"
    assert page.main([*files, "--out", str(out)]) == 0
    found = Reader(out.read_text())
    for file in RESULTS[:2]:
        assert file.stem in found.text
    (tmp_path / "b.json").write_text("[]")
    assert page.main([str(tmp_path / "b.json"), "--out", str(out)]) == 2
    assert "b.json: expected a header and records" in capsys.readouterr().err


def test_a_picture_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "a.json", tmp_path / "p.svg"
    source.write_text(json.dumps({"header": HEADER, "records": whole()}))
    words = [str(source), "--out", str(out), "--picture"]
    assert page.main([*words, "Whole rounds"]) == 0
    root = ElementTree.fromstring(out.read_text())  # our own
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join(root.itertext())
    assert {"Whole rounds", "resnet20 0.1, ours"} <= set(root.itertext())
    assert "prefers-color-scheme: dark" in text
    used = set(re.findall(r"var\((--\w+)\)", out.read_text()))
    assert used <= set(re.findall(r"(--\w+):", text))
    assert page.main([*words, "Whole rounds", "--density", "0.5"]) == 2
    assert "expected one of none" in capsys.readouterr().err
    assert page.main([*words, "Roof"]) == 2
    assert "expected one of Whole rounds, Growth with n" in capsys.readouterr().err


def test_missing_packages_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("fedmap_sparse.page.find_spec", lambda name: None)
    out = tmp_path / "p.html"
    assert page.main([str(RESULTS[0]), "--out", str(out)]) == 2
    assert main(["--quick", "--ops", "pack", "--html", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("matplotlib and jinja2" in line and "pip install" in line for line in lines)
    assert not out.exists()


@pytest.mark.skipif(backends()["cpu"] != "available", reason="no C++ kernels to time")
def test_of_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "p.html"
    assert main(["--quick", "--ops", "pack,latency", "--sizes", "5000", "--html", str(out)]) == 0
    found = Reader(out.read_text())
    assert {"pack 0.1\n", "masked_select\n"} <= {f"{line}\n" for line in found.text.splitlines()}
    assert "others kept" in found.text


@pytest.mark.skipif(backends()["cpu"] != "available", reason="no C++ kernels to time")
@pytest.mark.parametrize("name", ["", "none/p.html"])
def test_where_no_page_can_be_written_nothing_is_measured(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    assert main(["--quick", "--ops", "pack", "--html", str(out)]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert str(out) in found.err


def test_the_committed_page_is_of_the_committed_results() -> None:
    """`python -m fedmap_sparse.bench.page benchmarks/results/*.json --out` writes it."""
    text = COMMITTED.read_text()
    found = Reader(text)
    runs = [compare.read(file) for file in RESULTS]
    assert len(text.encode()) < 50_000 * len(runs)
    for run in runs:
        assert run.path.stem in found.text
        assert run.header["time"] in found.text
    keys = {value for name, value in found.attributes if name == "data-key"}
    for run in runs:
        for r in run.records.values():
            assert f"{r['median_s']:.9g}" in keys, (run.path.name, r["op"])


@needs_chromium
def test_in_chromium(tmp_path: Path) -> None:
    text = drawn(whole())
    backs = []
    for width, options in ((390, ()), (1400, ("--blink-settings=preferredColorScheme=0",))):
        found = in_chromium(text, width, tmp_path, "Ops", (0, 1, 6), *options)
        assert found["errors"] == []
        assert found["width"] == width or found["width"] > width - 20  # a scroll bar
        assert found["needs"] <= found["width"], "the page scrolls sideways"
        assert len(found["pictures"]) == 4
        assert min(found["pictures"]) > 50
        backs.append(found["back"])
        names, sizes, times = (found["columns"][at] for at in "016")
        assert names[0] == sorted(names[0]) != names[1] == sorted(names[0], reverse=True)
        counts = [int(size.replace(",", "")) for size in sizes[0]]
        assert counts == sorted(counts)
        assert sizes[1] == sizes[0][::-1] or counts.count(10**6) > 1
        assert times[0] == ["10 µs", "100 µs", "1 ms", "5 ms", "10 ms", "100 ms"]
        assert times[1] == times[0][::-1]
        assert sizes[2:] == ["ascending", "descending"]
    assert backs[0] != backs[1], "light and dark look the same"
