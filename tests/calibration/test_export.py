"""An export with a calibration: what is asked for, kept, used again, refused, and what it gains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.backends.onnx import export as onnx_export
from lfm2_export.backends.weights.pieces import Piece
from lfm2_export.backends.weights.stream import WeightStream
from lfm2_export.calibration import request as requests
from lfm2_export.calibration.text import DEFAULT_TEXT
from lfm2_export.cli import main
from lfm2_export.errors import CalibrationError, ResourceError
from lfm2_export.families.tensors import EMBEDDING
from lfm2_export.progress import Progress
from tests.artifacts import snapshot
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.shows import shows

pytestmark = pytest.mark.usefixtures("one_thread")

# One layer: programs are traced here.
RAW_CONFIG = tiny_config("lfm2_moe", num_hidden_layers=1, layer_types=["conv"], num_dense_layers=0, vocab_size=2660)


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """All exports here are of one model: its graphs are the same, and tracing takes most of the time."""
    made: list[Any] = []
    real = onnx_export.make_graphs

    def make_graphs(*given: Any) -> Any:
        if not made:
            made.append(real(*given))
        return made[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnx_export, "make_graphs", make_graphs)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with a tokenizer."""
    folder = tmp_path_factory.mktemp("calibrated") / "checkpoint"
    return write_random_checkpoint(folder, RAW_CONFIG, seed=2, tokenizer_from="tiny-moe")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrated") / "text.txt"
    path.write_text(DEFAULT_TEXT.read_text()[:9_000])
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An artifact and the statistics that were kept."""
    folder = tmp_path_factory.mktemp("calibrated")
    lfm2_export.export(checkpoint, calibrate=text, statistics=folder / "kept", output=folder / "out")
    return folder / "out", folder / "kept"


@shows("ours", "calibration", family="lfm2_moe", scheme="q4")
def test_the_manifest_the_card_and_inspect_say_what_weights_were_fitted_to(exported, text, capsys) -> None:
    out, _ = exported
    artifact = Artifact.open(out)
    (program,) = artifact.programs
    made = program.options["calibration"]
    assert program.options["algorithm"] == "gptq"
    assert made["text"]["source"] == "text.txt"
    assert len(made["text"]["sha256"]) == 64
    tokens = made["text"]["tokens"]
    line = f"gptq on {tokens:,} tokens of text.txt (sha256 {made['text']['sha256'][:12]})"
    assert program.calibration == line
    assert f"onnx q4: {line}." in (out / "README.md").read_text()
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"onnx q4: {line}\n" in said
    by_name = {tensor.name: tensor for tensor in program.tensors}
    reason = by_name[EMBEDDING.removesuffix(".weight")].reason
    how = "the size of llama.cpp's Q4_K_M, judged by statistics of the layers' inputs"
    assert reason == f"mixed within {how}; refit: no input is multiplied with it"
    assert f"onnx q4: mixed within {how}\n" in said
    assert "refit" not in by_name["model.layers.0.conv.in_proj"].reason


def test_statistics_that_were_kept_give_the_same_files(exported, checkpoint, text, tmp_path) -> None:
    out, kept = exported
    before = kept.read_bytes()
    lfm2_export.export(checkpoint, statistics=kept, output=tmp_path / "alone")
    assert kept.read_bytes() == before
    assert snapshot(tmp_path / "alone") == snapshot(out)
    again = requests.Calibration.asked(lfm2_export.open_checkpoint(checkpoint), str(text), kept)
    assert again is not None
    assert again.existing(tmp_path) is not None, "the same text need not be run again"


def test_other_statistics_in_the_files_place_are_refused_and_left(exported, checkpoint, tmp_path) -> None:
    _, kept = exported
    before = kept.read_bytes()
    with pytest.raises(CalibrationError, match=r"holds statistics of another text \(text\.txt, .* leave --calibrate"):
        lfm2_export.export(checkpoint, calibrate="default", statistics=kept, output=tmp_path / "out")
    with pytest.raises(CalibrationError, match="holds statistics of another text"):
        lfm2_export.export(checkpoint, calibrate="self", statistics=kept, output=tmp_path / "out")
    other = write_random_checkpoint(tmp_path / "other", RAW_CONFIG, seed=3, tokenizer_from="tiny-moe")
    with pytest.raises(CalibrationError, match="holds statistics of another checkpoint than other"):
        lfm2_export.export(other, statistics=kept, output=tmp_path / "out")
    with pytest.raises(CalibrationError, match="its folder does not exist; make it, or name another file"):
        lfm2_export.export(checkpoint, calibrate="default", statistics=tmp_path / "no" / "kept", output=tmp_path / "o")
    assert kept.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["other"]


def test_the_command_refuses_in_one_line(exported, checkpoint, tmp_path, capsys) -> None:
    _, kept = exported
    broken = tmp_path / "broken"
    broken.write_bytes(kept.read_bytes()[:-1])
    assert main(["export", str(checkpoint), "--statistics", str(broken), "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert "cannot be used as statistics (is truncated" in line
    assert line.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["broken"]


def test_what_it_takes_is_said_before_it_starts(checkpoint, text, tmp_path, monkeypatch) -> None:
    said: list[str] = []

    def collect(*arguments: Any, **options: Any) -> None:
        assert len(said) == 1, "before"
        raise ResourceError("the disk is full")

    monkeypatch.setattr(requests, "collect", collect)
    with pytest.raises(ResourceError):
        lfm2_export.export(checkpoint, calibrate=text, output=tmp_path / "out", progress=Progress(told=said.append))
    print(said[0])
    assert "calibrating takes about " in said[0]
    assert " of memory and " in said[0]
    assert "quantizing then about " in said[0]


def test_a_machine_without_the_memory_for_it_is_told_so(checkpoint, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(requests, "available_memory", lambda: 10 << 20)
    monkeypatch.setattr("lfm2_export.resources.available_memory", lambda: 10 << 20)
    with pytest.raises(ResourceError, match=r"needs .* of memory, 10\.5 MB are available"):
        lfm2_export.export(checkpoint, calibrate=text, output=tmp_path / "out")
    needs = requests.Calibration.asked(lfm2_export.open_checkpoint(checkpoint), text, None)
    assert needs is not None
    assert needs.estimate().diagonal, "first the Hessians are left out"


def test_an_export_that_ran_out_of_room_does_not_calibrate_again(
    exported, checkpoint, text, tmp_path, monkeypatch
) -> None:
    collected: list[Any] = []
    monkeypatch.setattr(requests, "collect", lambda *a, real=requests.collect, **k: collected.append(real(*a, **k)))
    real = WeightStream.write_piece

    def write_piece(self: WeightStream, piece: Piece, files: Sequence[int]) -> Any:
        if piece.weight.name.endswith("experts.down"):
            raise OSError(28, "No space left on device", str(self.paths[0]))
        return real(self, piece, files)

    monkeypatch.setattr("lfm2_export.ledger.SYNC_SECONDS", 0.001)
    with monkeypatch.context() as patched:
        patched.setattr(WeightStream, "write_piece", write_piece)
        with pytest.raises(ResourceError, match="give the same command again"):
            lfm2_export.export(checkpoint, calibrate=text, output=tmp_path / "parent" / "out")
    lfm2_export.export(checkpoint, calibrate=text, output=tmp_path / "parent" / "out")
    assert len(collected) == 1
    assert snapshot(tmp_path / "parent" / "out") == snapshot(exported[0])
    assert [one.name for one in (tmp_path / "parent").iterdir()] == ["out"]


def test_a_manifest_that_lies_about_it_changes_nothing_else(exported) -> None:
    (program,) = Artifact.open(exported[0]).programs
    for lie in (5, {}, {"text": 5}, {"text": {"tokens": "many"}}, {"text": {"source": [], "sha256": "", "tokens": 1}}):
        assert replace(program, options={**program.options, "calibration": lie}).calibration is None
