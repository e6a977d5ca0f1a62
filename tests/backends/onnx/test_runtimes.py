"""The files by which other runtimes find their way in an artifact's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.checkpoint import open_checkpoint
from tests.checkpoints import tiny_config

FAMILIES = {"tiny-moe": "lfm2_moe", "tiny-dense": "lfm2"}


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_genai_config_describes_the_preferred_graph(artifact: Callable[[str], Path], checkpoint):
    folder = artifact(checkpoint)
    model, config = read(folder, "genai_config.json")["model"], open_checkpoint(checkpoint).config
    assert model["type"] == FAMILIES[checkpoint]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [7, 2], 0)
    assert (model["context_length"], model["vocab_size"]) == (config.max_position_embeddings, config.vocab_size)
    decoder = model["decoder"]
    assert (folder / decoder["filename"]).is_file()
    assert decoder["layer_types"] == list(config.layer_types)
    names = {tensor.past_name for tensor in Artifact.open(folder, verify=False).program("onnx", "q4").cache.tensors}
    layers = {"conv": config.conv_layers, "key": config.attention_layers, "value": config.attention_layers}
    templates = {kind: decoder["inputs"][f"past_{kind}_names"] for kind in layers}
    assert names == {templates[kind] % layer for kind in layers for layer in layers[kind]}
    search = read(folder, "genai_config.json")["search"]
    assert search["past_present_share_buffer"] is True
    assert search["max_length"] == min(config.max_position_embeddings, 32768)


@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_transformers_js_finds_programs_data_files_and_layers(artifact: Callable[[str], Path], checkpoint):
    folder = artifact(checkpoint)
    config = read(folder, "config.json")
    section = config["transformers.js_config"]
    assert section["dtype"] == "q4"
    assert section["device_config"] == {"webgpu": {"dtype": "q4f16"}}
    suffixes = ("", "_fp16", "_quantized", "_q4", "_q4f16")
    assert section["use_external_data_format"] == {f"model{suffix}.onnx": 1 for suffix in suffixes}
    assert config["layer_types"] == list(open_checkpoint(checkpoint).config.layer_types)
    raw = open_checkpoint(checkpoint).raw_config
    assert {key: config[key] for key in raw} == raw


def test_the_chat_template_is_where_transformers_js_looks(artifact: Callable[[str], Path]):
    folder = artifact("tiny-moe")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert read(folder, "tokenizer_config.json")["chat_template"] == template


def test_what_is_preferred_follows_what_is_there(random_artifact, tmp_path):
    made = random_artifact(tiny_config("lfm2", num_hidden_layers=1, layer_types=["conv"]))
    folder = tmp_path / "artifact"
    lfm2_export.export(made.checkpoint, scheme="fp32", output=folder)
    assert read(folder, "config.json")["transformers.js_config"]["dtype"] == "fp32"
    assert "device_config" not in read(folder, "config.json")["transformers.js_config"]
    assert read(folder, "genai_config.json")["model"]["decoder"]["filename"] == "onnx/model.onnx"
    lfm2_export.export(made.checkpoint, scheme="q8", output=folder)
    assert read(folder, "config.json")["transformers.js_config"]["dtype"] == "q8"
    assert read(folder, "genai_config.json")["model"]["decoder"]["filename"] == "onnx/model_quantized.onnx"
