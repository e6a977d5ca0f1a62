"""Medians, ratios, the bandwidth's share, the table, the JSON and the plot."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.figures import Comparison, Row, Run, spread, table

LLAMA = Row(
    system="llama.cpp",
    name="Q4_0",
    bits_per_weight=4.5,
    artifact_bytes=4_700_000_000,
    resident_bytes=8_000_000_000,
    load_s=5.0,
    prefill_tps=50.0,
    decode_tps=10.0,
)
OURS = replace(LLAMA, system="onnx", name="q4 group 32", load_s=2.5, prefill_tps=125.0, decode_tps=25.0)
FOUND = Comparison(
    shape="8b-a1b",
    date="2026-11-01T10:00:00+00:00",
    cpu="A CPU",
    threads=2,
    versions={"llama.cpp": "0c1e570"},
    read_gb_per_s=20.0,
    rows=(LLAMA, OURS),
)
KEYS = ["system", "name", "bits_per_weight", "artifact_bytes", "resident_bytes", "load_s", "prefill_tps", "decode_tps"]


def run(prefill: float, decode: float, load: float = 1.0, resident: int = 10) -> Run:
    return Run(load_s=load, resident_bytes=resident, prefill_tps=prefill, decode_tps=decode)


def test_a_row_holds_medians_of_each_figure() -> None:
    runs = [run(1.0, 30.0, 3.0, 7), run(2.0, 10.0, 1.0, 9), run(90.0, 20.0, 2.0, 8)]
    row = Row.of("onnx", "q4", 4.56789, 11, runs)
    assert (row.prefill_tps, row.decode_tps, row.load_s, row.resident_bytes) == (2.0, 20.0, 2.0, 8)
    assert (row.bits_per_weight, row.artifact_bytes) == (4.568, 11)


def test_ratios_are_against_llama_cpp() -> None:
    assert FOUND.ratios() == {"onnx q4 group 32": {"prefill": 2.5, "decode": 2.5}}
    assert replace(FOUND, rows=(OURS,)).ratios() == {}


def test_the_share_of_the_bandwidth_is_what_a_step_reads() -> None:
    # 1.6 billion weights of 4.5 bits are 0.9 GB a step; ten steps a second are 9 of 20 GB/s.
    assert math.isclose(FOUND.bandwidth_share(LLAMA, 1.6e9), 0.45)


def test_the_table_is_markdown_with_a_line_for_each_row() -> None:
    lines = table(FOUND, 1.6e9).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == (
        "| llama.cpp Q4_0 | 4.50 | 4.70 GB | 5.00 s | 8.00 GB | 50.0 tok/s | 10.0 tok/s | 45% | 1.00 | 1.00 |"
    )
    assert lines[3].endswith("| 112% | 2.50 | 2.50 |")
    assert table(replace(FOUND, rows=(OURS,)), 1.6e9).splitlines()[-1].endswith("|  |  |")


def test_spread_shows_how_far_runs_lie_apart() -> None:
    (line,) = spread({"onnx q4": [run(3.0, 9.0), run(1.0, 8.0), run(2.0, 7.5)]})
    assert line == "onnx q4: prefill 1.0 to 3.0, decode 7.5 to 9.0 tok/s"


def test_the_json_has_exactly_the_agreed_fields(tmp_path: Path) -> None:
    path = FOUND.write(tmp_path / "results" / "8b-a1b.json")
    raw = json.loads(path.read_text())
    assert list(raw) == ["shape", "date", "cpu", "threads", "versions", "read_gb_per_s", "rows"]
    assert [list(row) for row in raw["rows"]] == [KEYS, KEYS]
    assert Comparison.read(path) == FOUND
    assert [entry.name for entry in path.parent.iterdir()] == ["8b-a1b.json"]


def test_a_figure_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    broken = replace(FOUND, rows=(replace(LLAMA, decode_tps=math.nan),))
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.write(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_the_plot_is_a_png_and_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    first = plot.draw(FOUND, 1.6e9, tmp_path / "new" / "a.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert first == plot.draw(FOUND, 1.6e9, tmp_path / "b.png").read_bytes()


def test_kept_results_read_back() -> None:
    """The files under benchmarks/results are those that this code writes."""
    for path in sorted((Path(__file__).parents[2] / "benchmarks/results").glob("*.json")):
        found = Comparison.read(path)
        assert found.shape == path.stem
        assert found.rows
        print(f"{path.name}: {len(found.rows)} rows of {found.date}")
