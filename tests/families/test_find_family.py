"""``architectures`` decides together with ``model_type``: only decoders and encoders of text are taken for such."""

import json
import shutil
from pathlib import Path

import pytest

from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.cli import main
from lfm2_export.errors import CheckpointError
from lfm2_export.families import find_family
from lfm2_export.source import ASSETS
from tests.encoder_checkpoints import encoder_config

OTHERS = {
    "an encoder that routes": ("lfm2", "Lfm2BidirForSequenceRouting", "an encoder with a head that is not known"),
    "an encoder that classifies": ("lfm2", "Lfm2BidirectionalForTokenClassification", "an encoder with a head that"),
    "an encoder of another family": ("lfm2_moe", "Lfm2BidirectionalModel", "is no class of lfm2_moe"),
    "a drafter": ("qwen3", "Lfm2DSparkDraftModel", "a drafter"),
    "vision": ("lfm2_vl", "Lfm2VlForConditionalGeneration", "images and text"),
    "vision, by its class alone": ("lfm2", "Lfm2VLForConditionalGeneration", "images and text"),
    "vision, by its type alone": ("lfm3_vl", None, "images and text"),
    "audio": ("lfm2_audio", "Lfm2AudioForConditionalGeneration", "audio"),
    "omni": ("lfm3_omni", None, "audio, images and text"),
    "a classifier": ("lfm2", "Lfm2ForSequenceClassification", "a classifier"),
    "another family": ("llama", "LlamaForCausalLM", "model_type='llama' is not supported; known families: lfm2"),
    "vision of the third generation": ("lfm3_vl", "Lfm3VLForConditionalGeneration", "images and text"),
    "a class of an older family": ("lfm3", "Lfm2ForCausalLM", "is no class of lfm3; expected Lfm3ForCausalLM"),
    "a class of another family": ("lfm2", "Lfm2MoeForCausalLM", "is no class of lfm2; expected Lfm2ForCausalLM"),
    "an unknown class": ("lfm2", "FooForBar", "is no class of lfm2"),
}


def checkpoint(folder: Path, model_type: str, architectures: object) -> Path:
    shutil.copytree(ASSETS / "tiny-dense", folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": model_type, "architectures": architectures}))
    return folder


@pytest.mark.parametrize(("model_type", "name", "text"), OTHERS.values(), ids=OTHERS)
def test_what_is_neither_is_refused_and_said(tmp_path, capsys, model_type, name, text):
    folder = checkpoint(tmp_path / "c", model_type, None if name is None else [name])
    assert main(["export", str(folder), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    print(error)
    assert text in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architectures", [None, [], ["Lfm2ForCausalLM"], ["Lfm2Model"], "Lfm2ForCausalLM", [3]])
def test_a_decoder_is_taken_whether_its_class_stands_there_or_not(tmp_path, architectures):
    assert open_checkpoint(checkpoint(tmp_path / "c", "lfm2", architectures)).config.model_type == "lfm2"


@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_bidirectional"])
@pytest.mark.parametrize("name", ["Lfm2BidirectionalModel", "Lfm2BidirectionalForMaskedLM"])
def test_an_encoder_is_told_by_its_class(model_type, name):
    raw = encoder_config(model_type=model_type, architectures=[name])
    config = find_family(raw, "config.json").parse_config(raw)
    assert config.model_type == "lfm2_bidirectional"
    assert config.encoder is not None
    assert config.encoder.masked_lm == ("MaskedLM" in name)


def test_a_missing_model_type_is_named(tmp_path):
    folder = checkpoint(tmp_path / "c", "lfm2", None)
    raw = json.loads((folder / "config.json").read_text())
    del raw["model_type"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is missing; expected one of lfm2, lfm2_moe"):
        open_checkpoint(folder)
