"""Names of checkpoints: bundled, directories, and Hub ids against a small Hub on this machine."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lfm2_export import paths, source, template_files
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import CheckpointError, Lfm2ExportError, ResourceError
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.source import resolve
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.encoder_checkpoints import COLBERT, write_encoder
from tests.fake_hub import COMMIT, closed_port, files_of, own_cache, serving, sha256, use_endpoint


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_cache(tmp_path, monkeypatch)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A running Hub; the files of ``org/model``, which a test may change."""
    files = files_of(write_random_checkpoint(tmp_path / "remote", tiny_config("lfm2"), seed=1, shards=2))
    files |= {"LICENSE": b"the licence", "tokenizer.json": b"{}", "chat_template.jinja": b"x"}
    files |= {"modeling_x.py": b"evil", "pytorch_model.bin": b"evil", "onnx/model.safetensors": b"other"}
    with serving(files, monkeypatch) as running:
        yield running.files


def refusal(name: str, kind: type[Lfm2ExportError] = CheckpointError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        resolve(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    print(message)
    return message


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)).path == tmp_path
    assert resolve(str(tmp_path)).revision is None


def test_a_bundled_name_wins_over_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "assets" / "tiny-moe").mkdir(parents=True)
    (tmp_path / "here" / "tiny-moe").mkdir(parents=True)
    monkeypatch.setattr(source, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path / "here")
    assert resolve("tiny-moe").path == tmp_path / "assets" / "tiny-moe"
    assert "for the folder of this name say ./tiny-moe" in caplog.text
    assert resolve("./tiny-moe").path == Path("tiny-moe")


def test_bundled_checkpoints_are_found_in_the_distribution_that_carries_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "ASSETS", tmp_path / "nothing")
    remedy = "tiny-dense: the small checkpoints are not installed; pip install 'lfm2-export[demo]'"
    assert refusal("tiny-dense") == remedy
    (tmp_path / source.COMPANION / "tiny-dense").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("tiny-dense").path == tmp_path / source.COMPANION / "tiny-dense"
    assert "tiny-moe: the small checkpoints are not installed" in refusal("tiny-moe")


def test_a_bundled_checkpoint_of_which_an_installer_made_links_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny-moe").mkdir()
    for path in (source.ASSETS / "tiny-moe").iterdir():
        (tmp_path / "tiny-moe" / path.name).symlink_to(path)
    monkeypatch.setattr(source, "ASSETS", tmp_path)
    assert "LICENSE" in {path.name for path in open_checkpoint("tiny-moe").files()}


@pytest.mark.parametrize("name", ["/no/such/folder", "./models/x", "../x/y", "nothing", "a/b/c", "", "org/na me"])
def test_names_that_can_be_no_hub_id_are_refused_without_network(name: str) -> None:
    message = refusal(name)
    assert message.startswith(
        f"{name}: no such directory, and neither a bundled checkpoint (tiny-moe, tiny-dense, tiny-lfm3)"
    )
    assert "nor a Hub id (organization/name, or organization/name/file.gguf)" in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 5000, "File name too long"), ("y" * 300, "File name too long"), ("a\0b", "embedded null byte")],
    ids=["path", "name", "nul"],
)
def test_names_that_no_path_can_have(name: str, reason: str) -> None:
    message = refusal(name)
    assert f"cannot be looked at ({reason}); check the name and the rights of its folders" in message
    assert len(message) < 500
    assert "\0" not in message


def test_a_folder_that_may_not_be_searched_is_no_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, locked = os.stat, str(tmp_path / "locked" / "model")

    def stat(path: Any, **options: Any) -> os.stat_result:
        if str(path) == locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(paths.os, "stat", stat)
    assert f"{locked}: cannot be looked at (Permission denied); check" in refusal(locked)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "is a file, not a checkpoint; give the folder" in refusal(str(tmp_path / "config.json"))


def test_a_revision_is_refused_where_there_is_none(tmp_path: Path) -> None:
    assert f"{tmp_path}: is a directory, which has no revision v1" in refusal(str(tmp_path), revision="v1")
    assert "tiny-moe: is a bundled checkpoint, which has no" in refusal("tiny-moe", revision="v1")


def test_fetches_data_files_from_the_hub_and_nothing_else(hub: dict[str, bytes], hub_cache: Path) -> None:
    checkpoint = open_checkpoint("org/model")
    assert checkpoint.revision == COMMIT
    assert checkpoint.name == "org/model"
    fetched = {path.relative_to(checkpoint.path).as_posix() for path in checkpoint.path.rglob("*")}
    print(sorted(fetched))
    assert fetched == set(hub) - {"modeling_x.py", "pytorch_model.bin", "onnx/model.safetensors"}
    assert (checkpoint.path / "model-00001-of-00002.safetensors").is_symlink()
    assert checkpoint.shard_hashes()["model-00001-of-00002.safetensors"] == sha256(
        hub["model-00001-of-00002.safetensors"]
    )


def test_a_retriever_comes_with_its_modules(
    hub: dict[str, bytes], hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders that modules.json names, online and off, and nothing else of what lies in folders."""
    folder = write_encoder(tmp_path / "colbert", COLBERT)
    hub.clear()
    hub |= {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub |= {"onnx/model.safetensors": b"other", "1_Dense/pytorch_model.bin": b"evil", "2_X/y.py": b"evil"}
    assert open_checkpoint("org/model").config.encoder == open_checkpoint(folder).config.encoder
    snapshot = resolve("org/model").path
    fetched = {p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()}
    assert fetched == set(hub) - {"onnx/model.safetensors", "1_Dense/pytorch_model.bin", "2_X/y.py"}
    assert (
        CheckpointRecord.of(open_checkpoint("org/model")).shards == CheckpointRecord.of(open_checkpoint(folder)).shards
    )
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    assert open_checkpoint("org/model", offline=True).config.encoder is not None


def test_what_is_cached_opens_offline(hub: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    online = resolve("org/model")
    use_endpoint(monkeypatch, f"http://127.0.0.1:{closed_port()}")
    assert resolve("org/model", offline=True) == online
    assert resolve("org/model", revision=COMMIT, offline=True) == online
    assert resolve("org/model") == online
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/model") == online


def test_a_cache_without_the_licence_opens_offline(hub: dict[str, bytes]) -> None:
    online = resolve("org/model")
    (online.path / "LICENSE").unlink()
    assert resolve("org/model", offline=True) == online
    (online.path / "model-00002-of-00002.safetensors").unlink()
    assert "not (completely) in the cache" in refusal("org/model", offline=True)


def test_an_altered_file_of_the_cache_is_named(hub: dict[str, bytes]) -> None:
    checkpoint = open_checkpoint("org/model")
    path = checkpoint.path / "model-00002-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.resolve().write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: its bytes were altered \(sha256"):
        open_checkpoint("org/model", offline=True).shard_hashes()


def test_not_cached_and_offline(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (
        f"org/model: not (completely) in the cache {hub_cache}, and offline; "
        "run once without --offline or HF_HUB_OFFLINE"
    )
    assert refusal("org/model", offline=True) == expected
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal("org/model") == expected


def test_no_network(hub_cache: Path) -> None:
    assert refusal("org/model") == (
        f"org/model: no such directory, and the Hub cannot be reached (no network) nor is it in the cache {hub_cache}"
    )


def test_hub_refusals_become_one_line_each(hub: dict[str, bytes]) -> None:
    assert "org/nothing: no such directory or Hub id; check the spelling" in refusal("org/nothing")
    assert "org/gated: is gated; accept its terms on https://huggingface.co/org/gated" in refusal("org/gated")
    message = refusal("org/model", revision="v9")
    assert "org/model@v9: the Hub has no revision v9; give a branch, tag or commit of org/model" in message
    assert "org/broken: the Hub could not give it (Server error '500" in refusal("org/broken")
    assert "org/a--b: no such directory, and not a valid Hub id" in refusal("org/a--b")


def test_a_full_disk_while_downloading_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(source, "_snapshot", full)
    message = refusal("org/model", ResourceError)
    assert "org/model: the disk of" in message
    assert "is full; free space or set HF_HOME elsewhere" in message


def test_other_failures_keep_their_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise RuntimeError("proxy says no\nand more")

    monkeypatch.setattr(source, "_snapshot", fail)
    assert "org/model: the Hub could not give it (proxy says no); try again" in refusal("org/model")


def test_templates_come_from_their_folder_and_nothing_else_does(hub: dict[str, bytes]) -> None:
    wanted = {"additional_chat_templates/tool_use.jinja": b"t", "additional_chat_templates/rag.jinja": b"r"}
    unwanted = [
        "additional_chat_templates/config.json",
        "additional_chat_templates/model.safetensors",
        "additional_chat_templates/deeper/x.jinja",
        "additional_chat_templates_2/x.jinja",
        "additional_chat_template/x.jinja",
        "additional/x.jinja",
        "a/x.jinja",
        "b/x.json",
        "b/additional_chat_templates/x.jinja",
        "LICENSES/MIT.txt",
        "onnx/tokenizer.json",
    ]
    hub |= wanted | dict.fromkeys(unwanted, b"unwanted")
    path = resolve("org/model").path
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert {name for name in found if "/" in name} == wanted.keys()
    assert {"config.json", "chat_template.jinja", "LICENSE"} <= found
    assert template_files.read(path, {}) == {"default": "x", "rag": "r", "tool_use": "t"}
    assert resolve("org/model", offline=True).path == path
