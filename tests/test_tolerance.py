"""Checkpoints that transformers loads whole are taken as it takes them, and what is left out is said once.

Every case is opened by transformers as well: the logits of both must agree.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lfm2_export
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import CheckpointError, ConfigError
from lfm2_export.models.loading import load_model
from lfm2_export.source import ASSETS

PLAIN = load_file(ASSETS / "tiny-dense" / "model.safetensors")
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.arange(3, 40)[None]


def checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor] = PLAIN, **config: Any) -> Path:
    shutil.copytree(ASSETS / "tiny-dense", folder)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    raw = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return folder


def agrees_with_transformers(folder: Path) -> None:
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"]
    with torch.inference_mode():
        difference = (load_model(open_checkpoint(folder))(IDS).logits - theirs.eval()(IDS).logits).abs().max().item()
    print(f"{difference:.1e}")
    assert difference < 1e-5


def other_head() -> torch.Tensor:
    return PLAIN[TABLE].float().flip(0).contiguous()


STORED = {
    "a value head": {**PLAIN, "v_head.summary.weight": torch.zeros(1, 256), "v_head.summary.bias": torch.zeros(1)},
    "a classifier's head": {**PLAIN, "score.weight": torch.zeros(2, 256)},
    "a counter of another dtype": {**PLAIN, "steps": torch.zeros(1, dtype=torch.int64)},
    "RoPE's buffer": {**PLAIN, "model.rotary_emb.inv_freq": torch.ones(16)},
    "RoPE's buffer in a layer": {**PLAIN, "model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(16)},
    "a backbone alone": {name.removeprefix("model."): tensor for name, tensor in PLAIN.items()},
    "a backbone with a head": {**{n.removeprefix("model."): t for n, t in PLAIN.items()}, HEAD: PLAIN[TABLE].clone()},
    "a copy of the tied embedding": {**PLAIN, HEAD: PLAIN[TABLE].clone()},
    "a head that differs from the tied embedding": {**PLAIN, HEAD: other_head()},
    "the tied head alone": {HEAD if name == TABLE else name: tensor for name, tensor in PLAIN.items()},
    "float64": {name: tensor.double() for name, tensor in PLAIN.items()},
}


@pytest.mark.parametrize("tensors", STORED.values(), ids=STORED)
def test_what_is_stored_is_taken_as_by_transformers(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    agrees_with_transformers(checkpoint(tmp_path / "c", tensors))


def test_what_is_left_out_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = checkpoint(tmp_path / "c", STORED["a value head"])
    with caplog.at_level(logging.WARNING):
        open_checkpoint(folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: tensors that generating text does not use are left out (2): "
        "v_head.summary.bias, v_head.summary.weight"
    ]


@pytest.mark.parametrize("key", ["tie_word_embeddings", "tie_embedding"])
def test_a_head_of_its_own_is_said_and_the_remedy_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    tensors = STORED["a head that differs from the tied embedding"]
    # The bundled config has the older key, which wins.
    older = {"tie_embedding": None} if key == "tie_word_embeddings" else {}
    folder = checkpoint(tmp_path / "c", tensors, **{**older, key: True})
    with caplog.at_level(logging.WARNING):
        assert not open_checkpoint(folder).config.tie_word_embeddings
    assert f"(say {key}=false there" in caplog.text
    caplog.clear()
    corrected = checkpoint(tmp_path / "d", tensors, **{**older, key: False})
    with caplog.at_level(logging.WARNING):
        assert not open_checkpoint(corrected).config.tie_word_embeddings
    assert not caplog.records


def test_an_artifact_of_an_untied_head_computes_with_it(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c", STORED["a head that differs from the tied embedding"])
    lfm2_export.export(folder, scheme="fp32", output=tmp_path / "made")
    logits = lfm2_export.load_runner(tmp_path / "made").prefill([IDS[0].tolist()])
    with torch.inference_mode():
        expected = load_model(open_checkpoint(folder))(IDS).logits[:, -1].numpy()
    assert np.abs(logits - expected).max() < 1e-4


CONTRADICTIONS = {
    "a layer more than the config says": "model.layers.99.operator_norm.weight",
    "a bias that the config does not know": "model.layers.0.conv.conv.bias",
    "a scale of a quantized weight": "model.layers.0.feed_forward.w1.weight_scale",
    "a bias of the head": "lm_head.bias",
}


@pytest.mark.parametrize("name", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_could_be_part_of_the_computation_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"do not fit config.json; 1 left over: {name}; use the config.json"):
        open_checkpoint(checkpoint(tmp_path / "c", {**PLAIN, name: torch.ones(256)}))


def test_weights_of_a_dtype_that_is_not_read_are_named(tmp_path: Path) -> None:
    name = "model.layers.0.feed_forward.w1.weight"
    folder = checkpoint(tmp_path / "c", {**PLAIN, name: torch.zeros_like(PLAIN[name], dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=f"{name} is stored as I8, which is no floating-point type"):
        open_checkpoint(folder)


def test_an_index_that_omits_a_stored_tensor_is_no_fault(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    (folder / "model.safetensors").replace(folder / "model-00001-of-00001.safetensors")
    listed = dict.fromkeys(list(PLAIN)[:-1], "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    agrees_with_transformers(folder)


CONFIGS = {
    "no pad token, as -1": {"pad_token_id": -1},
    "a key of another kind of RoPE": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "factor": 8.0}},
    "a stop token beyond the vocabulary in a list": {"eos_token_id": [2, 10**6]},
    "tokens that nobody asked for": {"sep_token_id": 10**6, "decoder_start_token_id": -5},
    "settings of training": {"attention_dropout": 0.1, "initializer_range": 0.02, "torch_dtype": "bfloat16"},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_values_of_the_config_that_change_nothing_are_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    agrees_with_transformers(checkpoint(tmp_path / "c", **changes))


def test_an_adapter_is_called_one(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    words = r"is an adapter \('LORA'\) for 'org/base', not a model; give that as the checkpoint and this by --lora"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)


def test_a_quantized_checkpoint_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization_config says that the weights are quantized already; "):
        open_checkpoint(checkpoint(tmp_path / "c", quantization_config={"quant_method": "awq"}))


STOPS = {
    "in config.json only": ({"eos_token_id": [2, 7]}, {"do_sample": True}, [2, 7]),
    "in generation_config.json only": ({"eos_token_id": None}, {"eos_token_id": 5}, [5]),
    "in both, and different": ({"eos_token_id": 2}, {"eos_token_id": [5, 6]}, [5, 6]),
    "beyond the vocabulary in a list": ({"eos_token_id": 2}, {"eos_token_id": [5, 10**6]}, [5]),
    "nowhere but in config.json, without the other file": ({"eos_token_id": 3}, None, [3]),
}


@pytest.mark.parametrize(("config", "generation", "expected"), STOPS.values(), ids=STOPS)
def test_every_runtime_is_told_the_same_stop_tokens(tmp_path, config, generation, expected):
    folder = checkpoint(tmp_path / "c", **config)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    made = tmp_path / "made"
    lfm2_export.export(folder, scheme="fp32", output=made)
    assert json.loads((made / "genai_config.json").read_text())["model"]["eos_token_id"] == expected
    told = json.loads((made / "generation_config.json").read_text())["eos_token_id"]
    assert (told if isinstance(told, list) else [told]) == expected
    assert list(lfm2_export.GenerationConfig.from_file(made / "generation_config.json").stop_token_ids) == expected
    assert transformers.GenerationConfig.from_pretrained(made).eos_token_id in (expected, expected[0])
