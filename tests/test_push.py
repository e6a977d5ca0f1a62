"""Artifacts to the Hub, against a small one on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.cli import main
from tests.fake_hub import TOKEN, Hub, closed_port, files_of, own_cache, serving, use_endpoint


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return own_cache(tmp_path, monkeypatch)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving({}, monkeypatch) as running:
        yield running


@pytest.fixture
def own(artifact: Callable[[str], Path], tmp_path: Path) -> Path:
    """With things in it that are none of the artifact's."""
    shutil.copytree(artifact("tiny-dense"), tmp_path / "own")
    (tmp_path / "own/notes.txt").write_text("private")
    (tmp_path / "own/onnx/old.onnx").write_text("private")
    (tmp_path / "own/README.md").write_text("---\nlicense: other\n---\n# my words\n")
    return tmp_path / "own"


def vouched_for(folder: Path) -> dict[str, bytes]:
    names = {"lfm2_export.json", *Artifact.open(folder).manifest.all_files()}
    return {name: data for name, data in files_of(folder).items() if name in names}


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    print(error)
    assert error.count("\n") == 1
    return error


def test_what_is_pushed_is_what_the_manifest_lists_and_runs_from_there(
    own: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(own), "org/model", "--private", "--message", "first", "--json"]) == 0
    pushed = hub.pushed["org/model", "main"]
    expected = vouched_for(own)
    assert "README.md" in expected
    assert pushed == expected
    assert hub.objects  # the large ones, by LFS
    assert hub.settings["org/model"]["visibility"] == "private"
    assert hub.messages == ["first"]
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"] == {name: len(data) for name, data in expected.items()}
    assert answer["url"].startswith("http")
    hub.files.update(pushed)
    prompt = [[1, 30, 40]]
    expected_logits = lfm2_export.load_runner(own, kernels="stock").prefill(prompt)
    assert (lfm2_export.load_runner("org/model", kernels="stock").prefill(prompt) == expected_logits).all()


def test_a_branch_and_a_message_that_says_what_it_is(own: Path, hub: Hub) -> None:
    assert main(["push", str(own), "org/model", "--revision", "next"]) == 0
    assert hub.pushed.keys() == {("org/model", "next")}
    assert hub.messages == [f"Artifact of tiny-dense, by lfm2-export {lfm2_export.__version__}"]
    assert main(["push", str(own), "org/model", "--revision", "next"]) == 0  # what is there is no reason to fail


def test_a_dry_run_lists_and_asks_nothing(own: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(own), "org/model", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "onnx/model_q4.onnx_data" in out
    assert f"{len(vouched_for(own))} files" in out
    assert "nothing was pushed" in out
    assert "notes.txt" not in out
    assert (hub.pushed, hub.settings) == ({}, {})


def test_what_cannot_be_pushed_is_one_line(
    own: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = str(own)
    assert "nothing: is no repository's id; give organization/name" in said(["push", folder, "nothing"], capsys)
    assert "org/gated: the Hub does not let this token push" in said(["push", folder, "org/gated"], capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub does not let this token push there (401)" in said(["push", folder, "org/model"], capsys)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "there is no token to push with; `hf auth login`" in said(["push", folder, "org/model"], capsys)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "since HF_HUB_OFFLINE is set" in said(["push", folder, "org/model"], capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use_endpoint(monkeypatch, f"http://127.0.0.1:{closed_port()}")
    assert "org/model: the push failed (" in said(["push", folder, "org/model"], capsys)
    assert hub.pushed == {}


def test_a_damaged_artifact_or_a_link_to_elsewhere_is_not_pushed(
    own: Path, hub: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    (own / "LICENSE").unlink()
    (own / "LICENSE").symlink_to(tmp_path / "secret")
    assert "LICENSE: is a link that leaves its folder" in said(["push", str(own), "org/model"], capsys)
    (own / "LICENSE").unlink()
    (own / "onnx/model_q4.onnx").unlink()
    assert "lacks onnx/model_q4.onnx, which others open" in said(["push", str(own), "org/model"], capsys)
    (own / "onnx/model_q4.onnx").write_bytes(b"other")
    assert "model_q4.onnx: has 5 bytes" in said(["push", str(own), "org/model"], capsys)
    assert "no such directory" in said(["push", str(tmp_path / "none"), "org/model"], capsys)
    assert (hub.pushed, hub.settings) == ({}, {})
