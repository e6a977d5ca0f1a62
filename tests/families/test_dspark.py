"""Drafters' configs and checkpoints that do not fit: one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from lfm2_export.artifact import Artifact
from lfm2_export.artifact_writer import ArtifactWriter
from lfm2_export.cli import main
from lfm2_export.errors import ConfigError
from lfm2_export.families import find_family
from lfm2_export.hashing import sha256_file
from lfm2_export.manifest import MANIFEST
from tests.checkpoints import tiny_config
from tests.conftest import Exported
from tests.drafters import TARGET, drafter_config, write_drafter

Refused = Callable[..., str]


@pytest.fixture
def refused(random_artifact: Callable[..., Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line that an export of a drafter ends with."""

    def exported(folder: Path, target: Path | None = None, *more: str) -> str:
        target = target or random_artifact(TARGET, ("q4",)).artifact
        out = tmp_path / "out"
        code = main(["export", str(folder), "--output", str(out), "--target", str(target), *more])
        error = capsys.readouterr().err
        print(error)
        assert (code, error.count("\n"), out.exists()) == (2, 1, False)
        return error

    return exported


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("block_size", 0, "block_size=0 is not supported"),
        ("block_size", None, "block_size=None is not supported"),
        ("markov_rank", None, "markov_rank=None is not supported"),
        ("markov_head_type", "gated", "markov_head_type='gated' is not supported"),
        ("hidden_act", "gelu", "hidden_act='gelu' is not supported"),
        ("attention_bias", True, "attention_bias=True is not supported"),
        ("use_sliding_window", True, "use_sliding_window=True is not supported"),
        ("num_key_value_heads", 3, "num_key_value_heads=3 is not supported; expected a divisor"),
        ("layer_types", ["conv", "full_attention"], "layer_types="),
        ("dflash_config", None, "dflash_config=None is not supported; expected an object"),
        ("dflash_config", {"num_target_layers": 5, "mask_token_id": 3}, "target_layer_ids=None is not supported"),
        (
            "dflash_config",
            {"num_target_layers": 5, "mask_token_id": 3, "target_layer_ids": [5]},
            "target_layer_ids=[5] is not supported; expected a list of integers from 0 to 4",
        ),
        (
            "dflash_config",
            {"num_target_layers": 5, "mask_token_id": 3, "target_layer_ids": [1, 1]},
            "target_layer_ids=[1, 1] is not supported; expected some layers",
        ),
        (
            "dflash_config",
            {"num_target_layers": 5, "mask_token_id": 131, "target_layer_ids": [1]},
            "mask_token_id=131 is not supported",
        ),
        ("dflash_config", {"num_target_layers": 5, "target_layer_ids": [1]}, "mask_token_id is missing"),
    ],
)
def test_a_config_that_is_none_is_named(key: str, value: Any, text: str):
    raw = drafter_config(**{key: value})
    with pytest.raises(ConfigError) as caught:
        find_family(raw, "config.json").parse_config(raw)
    assert text in str(caught.value)


def test_a_drafter_is_told_by_its_class():
    raw = drafter_config()
    config = find_family(raw, "config.json").parse_config(raw)
    assert (config.model_type, config.encoder) == ("lfm2_dspark", None)
    assert config.drafter is not None
    assert (config.drafter.interleaved_rope, config.drafter.target_layers) == (True, (0, 2, 3))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"hidden_size": 96}, "hidden size 64, not 96"),
        ({"vocab_size": 132}, "vocabulary 131, not 132"),
        ({"num_hidden_layers": 6, "layer_types": ["conv"] * 5 + ["full_attention"]}, "layers 5, not 6"),
    ],
)
def test_a_drafter_of_another_model_is_refused(
    refused: Refused, random_artifact: Callable[..., Exported], tmp_path: Path, overrides: dict[str, Any], text: str
):
    other = random_artifact(tiny_config("lfm2", **overrides), ("fp32",)).artifact
    error = refused(write_drafter(tmp_path / "d"), other)
    assert "drafts for another model than --target" in error
    assert text in error


def test_a_folder_is_for_the_drafter_of_one_target(
    random_artifact: Callable[..., Exported],
    random_drafter: Callable[..., Exported],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Another target of the same shapes: the line names both, and the folder stays as it is."""
    target = random_artifact(TARGET, ("q4",)).artifact
    made = random_drafter(target)
    other, out = (Path(shutil.copytree(one, tmp_path / one.parent.name)) for one in (target, made.artifact))
    manifest = json.loads((other / MANIFEST).read_text())
    manifest["checkpoint"] |= {"name": "another", "config_sha256": "0" * 64}
    (other / MANIFEST).write_text(json.dumps(manifest))
    before = sha256_file(out / MANIFEST)
    assert main(["export", str(made.checkpoint), "--output", str(out), "--target", str(other)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    print(line)
    assert (
        "holds a drafter for 'checkpoint', and --target is another now (another model); give another --output" in line
    )
    assert sha256_file(out / MANIFEST) == before
    drafter, model = (Artifact.open(one, verify=False).manifest.checkpoint for one in (out, target))
    with ArtifactWriter(out, drafter, target=model) as writer:  # the control: its own may have further schemes
        assert writer.existing is not None


def test_a_drafter_without_its_heads_is_refused(refused: Refused, tmp_path: Path):
    folder = write_drafter(tmp_path / "d")
    kept = load_file(folder / "model.safetensors")
    for head in ("markov_head", "confidence_head"):
        save_file({k: v for k, v in kept.items() if not k.startswith(head)}, folder / "model.safetensors")
        error = refused(folder)
        assert f"2 missing: {head}." in error
    save_file({**kept, "layers.2.input_layernorm.weight": kept["norm.weight"]}, folder / "model.safetensors")
    assert "1 left over: layers.2.input_layernorm.weight" in refused(folder)


def test_without_its_model_it_is_of_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, out = write_drafter(tmp_path / "d"), tmp_path / "out"
    for command in (["export", str(folder), "--output", str(out)], ["inspect", str(folder)]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "is a drafter for speculative decoding, of no use without its model; export it with --target" in error
        assert error.count("\n") == 1
    assert not out.exists()


def test_a_target_that_gives_no_streams_is_refused(
    refused: Refused, random_artifact: Callable[..., Exported], tmp_path: Path
):
    target = Path(shutil.copytree(random_artifact(TARGET, ("q4",)).artifact, tmp_path / "target"))
    manifest = json.loads((target / MANIFEST).read_text())
    (program,) = manifest["programs"]
    program |= {"backend": "executorch", "scheme": "8da4w"}
    (target / MANIFEST).write_text(json.dumps(manifest))
    error = refused(write_drafter(tmp_path / "d"), target)
    assert "executorch 8da4w gives no residual streams, which a drafter reads; export the model to onnx" in error


def test_a_target_is_for_drafters(refused: Refused, tmp_path: Path, random_artifact: Callable[..., Exported]):
    made = random_artifact(TARGET, ("q4",))
    assert "is no drafter; leave --target out" in refused(made.checkpoint)
    folder = write_drafter(tmp_path / "d")
    assert "nowhere: no such directory" in refused(folder, tmp_path / "nowhere")
    assert "scheme 'fp16': backend onnx has no drafters of it, only: fp32, q8, q4" in refused(
        folder, None, "--scheme", "fp16"
    )
    assert "backend executorch has no drafters of it" in refused(
        folder, None, "--backend", "executorch", "--scheme", "8da4w"
    )
    assert "--target-bits 5.0: is not for drafters" in refused(folder, None, "--target-bits", "5")


def test_another_vocabulary_than_the_targets_is_refused(refused: Refused, artifact, tmp_path: Path):
    """A drafter that brings a tokenizer of its own must bring the target's."""
    target = artifact("tiny-dense")
    raw = json.loads((target / "config.json").read_text())
    flash = {"mask_token_id": 3, "target_layer_ids": [1], "num_target_layers": raw["num_hidden_layers"]}
    folder = write_drafter(tmp_path / "d", drafter_config(raw, dflash_config=flash))
    tokenizer = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token, place in vocabulary.items() if place in (900, 901)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "has another vocabulary than --target" in refused(folder, target)
