"""The whole way at a tiny size with a stand-in for llama-bench; options; refusals."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.figures import Comparison
from benchmarks.llama_cpp import LlamaBench
from benchmarks.synthetic import REAL_SHAPES
from tests.checkpoints import tiny_config

pytest.importorskip("gguf")
pytest.importorskip("matplotlib")

from benchmarks import programs

# Says what llama-bench says.
STAND_IN = """#!/bin/sh
echo 'llama-bench: benchmark 1/2: starting' >&2
sleep 0.3
echo 'llama-bench: benchmark 1/2: warmup prompt run' >&2
echo '[{"n_prompt": 512, "n_gen": 0, "avg_ts": 100.0, "build_commit": "abc"},'
echo ' {"n_prompt": 0, "n_gen": 128, "avg_ts": 10.0, "build_commit": "abc"}]'
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A shape that takes seconds, and a llama-bench that takes none."""
    config = tiny_config(vocab_size=160, hidden_size=128, moe_intermediate_size=128, max_position_embeddings=2048)
    config |= {"intermediate_size": 128}
    monkeypatch.setitem(REAL_SHAPES, "tiny", config)
    program = tmp_path / "llama-bench"
    program.write_text(STAND_IN)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    rival = LlamaBench(path=program, package="llama-cpp-python 0", compiler="gcc 12.2.0", flags=("-mno-amx-tile",))
    monkeypatch.setattr(compare.llama_cpp, "get_llama_bench", lambda compiler: rival)
    monkeypatch.setattr(compare.bandwidth, "BUFFER_BYTES", 1 << 24)
    monkeypatch.setattr(compare, "QUIET_CORES", 1e9)
    return "tiny"


def run(tmp_path: Path, *more: str) -> int:
    arguments = ["tiny", "--threads", "1", "--keep", str(tmp_path / "files"), "--output", str(tmp_path / "results")]
    return compare.main([*arguments, "--systems", "llama.cpp,onnx", "--onnx-groups", "32,64", *more])


def test_compare_times_all_systems_in_turn_and_writes_table_json_and_plot(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    shown = capsys.readouterr()
    assert "built by gcc 12.2.0 with -march=native, -mno-amx-tile" in shown.err
    turns = [line.split(":")[0].strip() for line in shown.err.splitlines() if line.startswith("  ")]
    assert turns == ["llama.cpp Q4_0", "onnx q4 group 32", "onnx q4 group 64", "onnx q4 group 64, stock kernels"] * 3
    found = Comparison.read(tmp_path / "results/tiny.json")
    assert [row.system for row in found.rows] == ["llama.cpp", "onnx", "onnx", "onnx"]
    assert found.rows[1].bits_per_weight > found.rows[2].bits_per_weight > 4
    assert all(row.decode_tps > 0 and row.resident_bytes > 0 and row.artifact_bytes > 0 for row in found.rows)
    assert found.versions["llama.cpp"].startswith("abc (llama-cpp-python 0; -march=native -mno-amx-tile")
    assert (tmp_path / "results/tiny.png").stat().st_size > 10_000
    assert "| onnx q4 group 64 |" in shown.out
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "files/tiny").rglob("*") if path.is_file()}
    assert run(tmp_path) == 0
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "files/tiny").rglob("*") if path.is_file()}
    print(shown.out)


def test_bits_are_what_a_decode_step_reads(tmp_path: Path) -> None:
    for shape in ("350m", "8b-a1b"):
        config = REAL_SHAPES[shape]
        active = programs.active_weights(config)
        print(f"{shape}: {active / 1e9:.3f} billion weights a token")
    assert 1.4e9 < programs.active_weights(REAL_SHAPES["8b-a1b"]) < 1.7e9
    assert 0.35e9 < programs.active_weights(REAL_SHAPES["350m"]) < 0.36e9


def test_disk_is_needed_only_for_what_is_missing(tmp_path: Path) -> None:
    config = REAL_SHAPES["350m"]
    everything = programs.disk_needed(tmp_path, config, compare.SYSTEMS, (32,))
    (tmp_path / "checkpoint").mkdir()
    without_checkpoint = programs.disk_needed(tmp_path, config, compare.SYSTEMS, (32,))
    for name in ("Q4_0.gguf", "onnx-q4-group32", "executorch-8da4w"):
        (tmp_path / name).mkdir()
    assert everything > without_checkpoint > 0 == programs.disk_needed(tmp_path, config, compare.SYSTEMS, (32,))


def test_a_full_disk_is_refused_with_exit_3(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm2_export.resources.free_disk", lambda folder: 10)
    assert run(tmp_path) == 3
    assert "compare: " in (said := capsys.readouterr().err)
    assert "this comparison needs" in said


def test_a_program_that_prints_no_figures_is_refused(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.bandwidth, "read_gb_per_s", lambda *_, **__: 1.0)
    watch = compare.watch
    monkeypatch.setattr(compare, "watch", lambda command, **options: watch(["true"], purpose="x"))
    assert run(tmp_path) == 3
    assert "onnx q4 group 32: printed no figures" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr(compare, "compare_one", missing)
    assert run(tmp_path) == 2
    assert "gguf is not installed; pip install 'lfm2-export[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["9b"], "invalid choice: '9b'"),
        (["350m", "--rounds", "2"], "medians want at least 3 rounds"),
        (["350m", "--threads", "0"], "0: at least 1"),
        (["350m", "--onnx-groups", "48"], "48: give some of 32,64,128"),
        (["350m", "--systems", "ollama"], r"ollama: give some of llama.cpp,onnx,executorch"),
        (["350m", "--threads", "many"], "invalid _positive value: 'many'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare.build_parser().parse_args(arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_help_says_how_to_keep_the_machine_quiet() -> None:
    text = compare.build_parser().format_help()
    assert "A quiet machine" in text
    assert "--launcher" in text


def test_results_are_one_json_a_shape() -> None:
    folder = Path(compare.__file__).parent / "results"
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["shape"] in REAL_SHAPES
        assert path.with_suffix(".png").is_file()
