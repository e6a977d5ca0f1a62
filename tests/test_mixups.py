"""What was given in the place of something else is taken for what it must be, or told what it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lfm2_export
from lfm2_export import cli
from lfm2_export.errors import ArtifactError
from tests.artifacts import write_artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("mixups") / "made", {"q4": "a", "fp32": "b"}).path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The one line of a command that fails with code 2."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> str:
        assert cli.main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line

    return run


@pytest.mark.parametrize("scheme", ["q4", "fp32"])
def test_a_programs_file_stands_for_its_folder(folder: Path, scheme: str) -> None:
    graph = folder / ("onnx/model_q4.onnx" if scheme == "q4" else "onnx/model.onnx")
    artifact = lfm2_export.Artifact.open(graph)
    assert artifact.path == folder
    assert artifact.program().scheme == scheme
    assert [program.scheme for program in artifact.select()] == [scheme]
    assert len(artifact.programs) == 2
    other = "fp32" if scheme == "q4" else "q4"
    with pytest.raises(ArtifactError, match=f"has no {other} program in {graph.relative_to(folder)}, only: "):
        artifact.program(scheme=other)


def test_a_programs_file_may_be_named_from_anywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, name in (
        (folder, "onnx/model.onnx"),
        (folder / "onnx", "model.onnx"),
        (folder.parent, "made/onnx/model.onnx"),
    ):
        monkeypatch.chdir(place)
        assert lfm2_export.Artifact.open(name).program().scheme == "fp32"
        assert cli.main(["inspect", name]) == 0
        out = capsys.readouterr().out
        assert "onnx fp32" in out
        assert "onnx q4" not in out


def test_a_programs_file_without_its_folder_is_told_so(folder: Path, said, tmp_path: Path) -> None:
    shutil.copy(folder / "onnx/model_q4.onnx", tmp_path / "alone.onnx")
    assert "alone.onnx: is a program without its artifact, no directory; give the folder" in said("bench", "alone.onnx")
    assert "alone.onnx: is an exported program, not a checkpoint" in said("export", "alone.onnx", "-o", "made")


def test_a_checkpoint_where_an_artifact_belongs(said, tmp_path: Path) -> None:
    line = said("run", "tiny-dense", "hello")
    assert (
        "tiny-dense: is a bundled checkpoint, not an artifact; export it first (`lfm2-export export tiny-dense" in line
    )
    assert (
        "a Hub id is a checkpoint's: export it first (`lfm2-export export LiquidAI/LFM2-1.2B --output lfm2-1.2b-q4`)"
        in said("adopt", "LiquidAI/LFM2-1.2B")
    )
    (tmp_path / "LFM2-Q4_0.gguf").write_bytes(b"GGUF")
    assert "LFM2-Q4_0.gguf: is a checkpoint, not an artifact; export it first" in said("bench", "LFM2-Q4_0.gguf")


def test_an_artifact_where_a_checkpoint_belongs(folder: Path, said) -> None:
    for arguments in (
        ("export", folder, "-o", "made"),
        ("quality", folder, "--checkpoint", folder),
        ("parity", folder, folder),
    ):
        assert f"{folder}: is an artifact, which an export wrote, not a checkpoint; give the checkpoint" in said(
            *arguments
        )


def test_swapped_arguments_are_told_the_right_order(folder: Path, said) -> None:
    assert f"say `lfm2-export parity {folder} tiny-dense`" in said("parity", "tiny-dense", folder)
    assert f"say `lfm2-export run {folder} 'What is it?'`" in said("run", "What is it?", folder)
