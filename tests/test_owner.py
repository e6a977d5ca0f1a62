"""An artifact's text files are its owner's, and a download may hold a part of it."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.artifact_writer import ArtifactWriter
from lfm2_export.cli import main
from lfm2_export.errors import ArtifactError
from tests.artifacts import record, write_program

PROMPT = [[1, 30, 40]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owner") / "made"
    lfm2_export.export("tiny-dense", scheme=["q4", "fp32"], output=folder)
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "own")
    return tmp_path / "own"


def json_edit(name: str, **values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=4))

    return edit


def windows_line_ends(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and path.name != "lfm2_export.json":
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


EDITS = {
    "genai_config.json": json_edit("genai_config.json", search={"max_length": 8192}),
    "generation_config.json": json_edit("generation_config.json", temperature=0.3),
    "config.json": json_edit("config.json", note="mine"),
    "line ends": windows_line_ends,
    "chat_template.jinja": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"),
    "LICENSE": lambda folder: (folder / "LICENSE").write_text("mine"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_text_file_is_no_damage_but_noted(own: Path, capsys: pytest.CaptureFixture, edit) -> None:
    edit(own)
    assert np.isfinite(lfm2_export.load_runner(own).prefill(PROMPT)).all()
    assert main(["inspect", str(own)]) == 0
    assert "edited since the export: " in capsys.readouterr().out
    assert main(["inspect", str(own), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["edited_files"]


def test_a_further_export_keeps_what_was_edited(own: Path) -> None:
    json_edit("genai_config.json", search={"max_length": 8192})(own)
    (own / "chat_template.jinja").write_text("mine")
    (own / "LICENSE").unlink()
    kept = {name: (own / name).read_bytes() for name in ("genai_config.json", "chat_template.jinja")}
    lfm2_export.export("tiny-dense", scheme="q8", output=own)
    assert {name: (own / name).read_bytes() for name in kept} == kept
    assert (own / "LICENSE").is_file()
    assert lfm2_export.Artifact.open(own).edited() == sorted(kept)
    assert {program.scheme for program in lfm2_export.Artifact.open(own).programs} == {"q4", "fp32", "q8"}


def test_a_further_chat_template_is_the_owners_too(tmp_path: Path) -> None:
    name, folder = "additional_chat_templates/tool_use.jinja", tmp_path / "made"

    def export(scheme: str) -> None:
        with ArtifactWriter(folder, record()) as writer:
            write_program(writer, scheme=scheme)
            writer.write_text(name, "theirs")
            writer.commit()

    export("q4")
    (folder / name).write_text("mine\r\n")
    assert Artifact.open(folder).edited() == [name]
    export("fp32")
    assert (folder / name).read_bytes() == b"mine\r\n"
    (folder / name).unlink()
    Artifact.open(folder)
    (folder / name).write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match=r"tool_use\.jinja: byte 0 is not UTF-8"):
        Artifact.open(folder)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("genai_config.json", b"{", "genai_config.json: is not JSON"),
        ("config.json", b"[]", "config.json: holds [], not a JSON object"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: byte 0 is not UTF-8"),
    ],
)
def test_a_text_file_that_can_no_longer_be_read_is_named(own: Path, name: str, content: bytes, text: str) -> None:
    (own / name).write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        lfm2_export.load_runner(own)
    assert text in str(caught.value)


PARTS = {
    "one quantization and the JSON files": ["*.json", "onnx/model_q4*"],
    "the portable graph, its data, the JSON files": ["*.json", "onnx/model_q4.onnx", "onnx/model_q4.onnx_data*"],
    "the manifest and another program": ["lfm2_export.json", "onnx/model.onnx*"],
}


@pytest.mark.parametrize("patterns", PARTS.values(), ids=PARTS)
def test_a_part_of_an_artifact_opens_for_what_it_holds(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture, patterns: list[str]
) -> None:
    for path in made.rglob("*"):
        inside = path.relative_to(made).as_posix()
        if path.is_file() and any(fnmatch.fnmatch(inside, pattern) for pattern in patterns):
            (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / inside)
    scheme = "fp32" if "onnx/model.onnx*" in patterns else "q4"
    expected = lfm2_export.load_runner(made, scheme=scheme, kernels="stock").prefill(PROMPT)
    found = lfm2_export.load_runner(tmp_path, kernels="stock")  # the program that is there is taken
    assert np.abs(found.prefill(PROMPT) - expected).max() < 0.05 * np.abs(expected).max()
    assert main(["inspect", str(tmp_path)]) == 0
    assert "not in this folder: onnx" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match=r"is missing, but lfm2_export.json names it for onnx"):
        lfm2_export.load_runner(tmp_path, scheme="q4" if scheme == "fp32" else "fp32")


def test_weights_that_are_missing_or_changed_are_still_refused(own: Path) -> None:
    data = own / "onnx" / "model_q4.onnx_data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"model_q4.onnx_data: was changed since the export"):
        lfm2_export.load_runner(own, scheme="q4")
    data.unlink()
    with pytest.raises(ArtifactError, match=r"model_q4.onnx_data: is missing"):
        lfm2_export.load_runner(own, scheme="q4")
    assert lfm2_export.Artifact.open(own).program().scheme == "fp32"


def test_adopted_edits_are_recorded_and_kept_by_further_exports(own: Path, capsys: pytest.CaptureFixture) -> None:
    json_edit("genai_config.json", search={"max_length": 8192})(own)
    (own / "chat_template.jinja").write_text("mine")
    (own / "README.md").write_bytes(b"# mine, in Latin-1: \xe9")
    names = ["README.md", "chat_template.jinja", "genai_config.json"]
    kept = {name: (own / name).read_bytes() for name in names}
    assert lfm2_export.Artifact.open(own).edited() == names
    assert main(["adopt", str(own)]) == 0
    assert capsys.readouterr().out == "adopted: README.md, chat_template.jinja, genai_config.json\n"
    assert lfm2_export.Artifact.open(own).edited() == []
    assert main(["inspect", str(own)]) == 0
    printed = capsys.readouterr().out
    assert "adopted: README.md, chat_template.jinja, genai_config.json" in printed
    assert "edited since" not in printed
    assert main(["adopt", str(own), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"adopted": [], "adopted_files": names}

    (own / "chat_template.jinja").unlink()  # to have it made anew
    lfm2_export.export("tiny-dense", scheme="fp32", output=own)
    found = lfm2_export.Artifact.open(own)
    assert (own / "chat_template.jinja").read_bytes() != kept.pop("chat_template.jinja")
    assert {name: (own / name).read_bytes() for name in kept} == kept
    assert (found.edited(), list(found.manifest.adopted_files)) == ([], sorted(kept))


def test_an_artifact_without_adopted_files_is_read_by_versions_that_know_of_none(own: Path) -> None:
    assert "adopted_files" not in json.loads((own / "lfm2_export.json").read_text())


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("config.json", b"{", "config.json: is not JSON"),
        ("onnx/model_q4.onnx", b"\x08", "model_q4.onnx: has 1 bytes where the export wrote"),
    ],
)
def test_what_is_no_text_any_more_or_a_program_is_not_adopted(
    own: Path, capsys: pytest.CaptureFixture, name: str, content: bytes, text: str
) -> None:
    manifest = (own / "lfm2_export.json").read_bytes()
    (own / name).write_bytes(content)
    assert main(["adopt", str(own)]) == 2
    assert text in capsys.readouterr().err
    assert (own / "lfm2_export.json").read_bytes() == manifest


def test_a_manifest_may_not_adopt_what_it_does_not_list(own: Path, capsys: pytest.CaptureFixture) -> None:
    json_edit("lfm2_export.json", adopted_files=["onnx/model_q4.onnx"])(own)
    assert main(["inspect", str(own)]) == 2
    assert "adopted_files names 'onnx/model_q4.onnx', which is not among the shared files" in capsys.readouterr().err
