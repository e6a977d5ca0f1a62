"""Artifacts on the Hub, against a small one on this machine: what is fetched, what opens offline, what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

import lfm2_export
from lfm2_export.cli import main
from lfm2_export.errors import ArtifactError, Lfm2ExportError
from lfm2_export.hub_artifacts import name_of, needed_files, open_artifact
from lfm2_export.manifest import FileEntry
from lfm2_export.source import ASSETS
from tests.artifacts import program
from tests.fake_hub import COMMIT, Hub, closed_port, files_of, own_cache, serving, use_endpoint

PROMPT = [[1, 30, 40]]
RUN = ["run", "org/model", "--prompt", "What is a list?", "--max-new-tokens", "4", "--kernels", "stock"]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_cache(tmp_path, monkeypatch)


@pytest.fixture
def made(artifact: Callable[[str], Path]) -> Path:
    return artifact("tiny-dense")


@pytest.fixture
def hub(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = files_of(made) | {"evil.py": b"x", "onnx/pickled.bin": b"x"}
    with serving(files, monkeypatch) as running:
        yield running


def refusal(name: str, **options: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        open_artifact(name, **options)
    print(caught.value)
    return str(caught.value)


def test_a_program_by_its_repository_is_the_folders(hub: Hub, made: Path) -> None:
    expected = lfm2_export.load_runner(made, scheme="q4", kernels="stock").prefill(PROMPT)
    found = lfm2_export.load_runner("org/model", scheme="q4", kernels="stock").prefill(PROMPT)
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, lfm2_export.load_runner("org/model", scheme="q8", kernels="stock").prefill(PROMPT))


def test_only_what_the_program_needs_is_fetched_and_once(hub: Hub) -> None:
    found = open_artifact("org/model", scheme="q4")
    wanted = found.program(scheme="q4")
    shared = found.manifest.files
    assert set(hub.asked) == {"lfm2_export.json", *shared, *wanted.files}
    assert len(hub.asked) == len(set(hub.asked))
    assert hub.asked[0] == "lfm2_export.json"
    assert {name for name in hub.asked if name in wanted.files} == set(hub.asked[-len(wanted.files) :])
    assert "onnx/model.onnx_data" in hub.files  # another program's
    hub.asked.clear()
    open_artifact("org/model", scheme="q4")
    assert hub.asked == []
    open_artifact(f"org/model@{COMMIT}", scheme="q8")
    assert set(hub.asked) == set(found.program(scheme="q8").files)


def test_what_was_fetched_opens_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert main([*RUN, "--scheme", "q8"]) == 0
    said = capsys.readouterr().out
    use_endpoint(monkeypatch, f"http://127.0.0.1:{closed_port()}")
    assert main([*RUN, "--scheme", "q8"]) == 0  # no network
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main([*RUN, "--scheme", "q8"]) == 0
    assert main(RUN) == 0  # the program that is there
    assert capsys.readouterr().out == 3 * said
    assert "onnx q4 is not (completely) in the cache, and offline" in refusal("org/model", scheme="q4")


def test_without_network_it_is_known_at_the_first_attempt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Hub's library waits half a minute for it, where nothing of the repository is in the cache."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    for words in (
        RUN,
        ["inspect", "org/model"],
        ["inspect", "org/model/model.gguf"],
        ["parity", "org/model", "tiny-dense"],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        print(error)
        assert "no such directory, and the Hub cannot be reached (no network) nor is it in the cache" in error
        assert error.count("\n") == 1


def test_a_hub_that_is_out_of_order_is_told_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    assert "org/broken: the Hub could not give it (Server error '500" in refusal("org/broken")


def test_attempts_of_the_hubs_library_are_not_told_one_by_one(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    attempts, made = logging.getLogger("huggingface_hub.utils._http"), []

    def attempt(*_: object, **__: object) -> None:
        made.append(attempts.warning("Retrying in 1s"))
        raise OSError("no network")

    monkeypatch.setattr(attempts, "handlers", [caplog.handler])
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", attempt)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", attempt)
    assert refusal("org/model").startswith("org/model: ")
    assert made
    assert "Retrying in 1s" not in caplog.messages


def test_the_verbs_take_a_repository(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--prompt-tokens", "8", "--new-tokens", "2", "--rounds", "1", "--kernels", "stock", "--json"]
    assert main(["bench", "org/model", *size]) == 0
    assert json.loads(capsys.readouterr().out)["program"] == "onnx q4"
    folder = open_artifact("org/model").path
    assert folder.name == COMMIT
    assert name_of("org/model@main", folder) == "model"  # what `serve` calls it


def test_inspect_takes_a_repository_and_fetches_its_manifest_alone(
    hub: Hub, made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("org/model", f"org/model@{COMMIT}"):
        assert main(["inspect", name, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["inspect", str(made), "--json"]) == 0
        assert found == json.loads(capsys.readouterr().out) | {"name": name}
    assert set(hub.asked) == {"lfm2_export.json"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["inspect", "org/model"]) == 0
    assert "onnx q4" in capsys.readouterr().out
    assert main(["inspect", "org/model", "--lora", "x"]) == 2
    assert "--lora: is for checkpoints, and 'org/model' is an artifact" in capsys.readouterr().err


def test_inspect_takes_a_checkpoint_for_one(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files = files_of(ASSETS / "tiny-lfm3")
    assert main(["inspect", "org/model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "checkpoint"


def test_a_damaged_manifest_is_not_taken_for_a_checkpoints_lack_of_one(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files["lfm2_export.json"] = b"{}"
    assert main(["inspect", "org/model"]) == 2
    error = capsys.readouterr().err
    assert "lfm2_export.json" in error
    assert error.count("\n") == 1


def test_parity_and_quality_take_a_repository(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In the empty cache of these tests our operators would be compiled anew.
    monkeypatch.setattr("lfm2_export.backends.onnx.variants.own_library", lambda: None)
    report = lfm2_export.measure_parity("org/model", "tiny-dense", scheme=["q4", "q8"], max_tokens=256, threads=1)
    assert [measured.program.scheme for measured in report.programs] == ["q4", "q8"]
    assert report.artifact == "model"
    assert not {"onnx/model.onnx_data", "onnx/model_fp16.onnx_data"} & set(hub.asked)
    assert main(["parity", "org/model", "tiny-dense", "--record"]) == 2
    assert "--record: org/model is on the Hub; download it into a folder" in capsys.readouterr().err
    assert main(["parity", "org/model", "tiny-moe", "-s", "q4"]) == 2
    assert "was made of tiny-dense, and tiny-moe has another config" in capsys.readouterr().err
    command = ["quality", "org/model", "--checkpoint", "tiny-dense", "--max-tokens", "256", "-t", "1", "--json"]
    assert main(command) == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)["models"]}
    assert {"model q4", "model q8"} <= models.keys()
    assert 0 < models["model q8"]["kl"] < models["model q4"]["kl"] < 0.1


def test_from_pretrained_takes_a_repository(hub: Hub, made: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    opened = lfm2_export.ExportedModelForCausalLM.from_pretrained
    ids = torch.tensor(PROMPT)
    options = {"scheme": "q4", "kernels": "stock", "threads": 1}
    expected = opened(made, **options).generate(ids, max_new_tokens=6)
    model = opened("org/model", revision="main", token=None, **options)
    assert torch.equal(model.generate(ids, max_new_tokens=6), expected)
    assert "onnx/model.onnx_data" not in hub.asked
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(opened(tmp_path / "saved", **options).generate(ids, max_new_tokens=6), expected)
    assert opened("org/model", local_files_only=True, **options).name_or_path == model.name_or_path
    for given, fault in (
        ({"subfolder": "x"}, "an artifact on the Hub is a whole repository"),
        ({"token": "hf_x"}, "token: is not followed for org/model; log in with `hf auth login`"),
        ({"force_download": True}, "force_download: is not followed for org/model; delete it from the cache"),
        ({"revision": "v9"}, "org/model@v9: the Hub has no revision v9"),
        ({"revision": 3}, "revision=3: give a branch, a tag or a commit"),
        ({"scheme": "q8", "local_files_only": True}, "onnx q8 is not \\(completely\\) in the cache, and offline"),
    ):
        with pytest.raises(Lfm2ExportError, match=fault):
            opened("org/model", **{**options, **given})
    with pytest.raises(ArtifactError, match="no such directory or Hub id; check the spelling"):
        opened("org/nothing")


REFUSED = {
    "org/nothing": "org/nothing: no such directory or Hub id; check the spelling",
    "org/gated": "org/gated: is gated; accept its terms on https://huggingface.co/org/gated",
    "org/model@v9": "org/model@v9: the Hub has no revision v9",
}


@pytest.mark.parametrize(("name", "text"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_had_is_one_line(hub: Hub, name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    quality = ["quality", name, "--checkpoint", "tiny-dense"]
    for words in (
        ["run", name, "--prompt", "a"],
        ["parity", name, "tiny-dense"],
        quality,
        ["embed", name, "--text", "a"],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1


def test_a_repository_without_an_artifact_is_told_what_to_do(hub: Hub) -> None:
    for name in [name for name in hub.files if name == "lfm2_export.json" or name.startswith("onnx/")]:
        del hub.files[name]
    expected = (
        "org/model: has no lfm2_export.json; if it is a checkpoint, export it first (`lfm2-export export org/model"
    )
    assert expected in refusal("org/model")


def test_sizes_are_checked_before_anything_large_is_fetched(hub: Hub) -> None:
    manifest, hub.files["lfm2_export.json"] = hub.files["lfm2_export.json"], b" " * (33 << 20)
    assert f"more than the {32 << 20} that such a file may have" in refusal("org/model")
    assert hub.asked == []
    hub.files["lfm2_export.json"] = manifest
    hub.files["onnx/model_q4.onnx_data"] += b"x"
    assert "onnx/model_q4.onnx_data has " in refusal("org/model", scheme="q4")
    assert "onnx/model_q4.onnx_data" not in hub.asked


def test_other_bytes_of_the_same_size_are_refused_when_the_program_is_opened(hub: Hub) -> None:
    whole = hub.files["onnx/model_q4.onnx_data"]
    hub.files["onnx/model_q4.onnx_data"] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(ArtifactError, match=r"model_q4\.onnx_data: was changed since the export"):
        lfm2_export.load_runner("org/model", scheme="q4")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\\..\\b"])
def test_a_manifest_that_names_what_lies_elsewhere_is_refused(hub: Hub, name: str) -> None:
    manifest = json.loads(hub.files["lfm2_export.json"])
    manifest["files"][name] = manifest["files"]["config.json"]
    hub.files["lfm2_export.json"] = json.dumps(manifest).encode()
    assert "leaves the artifact's folder" in refusal("org/model")
    assert hub.asked == ["lfm2_export.json"]


def test_of_two_files_with_all_weights_the_one_that_any_runtime_opens_is_needed() -> None:
    def entry(size: int) -> FileEntry:
        return FileEntry(bytes=size, sha256="0" * 64)

    made = program("executorch", "8da4w")
    own = "executorch/model_8da4w_lfm2.pte"
    large = {made.graphs["model"]: entry(1 << 30), own: entry(1 << 30)}
    fields = {**vars(made), "graphs": {**made.graphs, "lfm2": own}}
    assert needed_files(type(made)(**{**fields, "files": large})) == [made.graphs["model"]]
    assert needed_files(type(made)(**{**fields, "files": {**large, own: entry(1 << 20)}})) == [
        made.graphs["model"],
        own,
    ]


def test_a_folder_of_that_name_is_taken(hub: Hub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").symlink_to(made)
    monkeypatch.chdir(tmp_path)
    assert open_artifact("org/model").path == Path("org/model")
    assert hub.asked == []
