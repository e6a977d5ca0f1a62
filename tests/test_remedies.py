"""What a message says to do about a file's key is done literally, and the next try works.

Every message about config.json is among them: ``test_no_remedy_was_forgotten`` looks into the code for others.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lfm2_export
from lfm2_export import config as config_module
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.companions import check
from lfm2_export.errors import CheckpointError, Lfm2ExportError
from lfm2_export.families import find_family, lfm2, lfm2_moe
from tests.checkpoints import tiny_config, write_random_checkpoint

PACKAGE = Path(lfm2_export.__file__).parent
# Where messages about config.json are raised.
SOURCES = {PACKAGE / name for name in ("config.py", "families/__init__.py", "families/lfm2.py", "families/lfm2_moe.py")}

Changes = dict[str, Any]  # to a raw config; None removes a key
ROPE = {"rope_type": "default", "rope_theta": 1e6}

# By name: the family, what is wrong, what the message says, and what that means, done to the letter.
REMEDIES: dict[str, tuple[str, Changes, str, list[Changes]]] = {
    "an integer": (
        "lfm2",
        {"num_hidden_layers": "five"},
        "num_hidden_layers='five' is not supported; expected an integer from 1 to 10000",
        [{"num_hidden_layers": 5}],
    ),
    "a number": (
        "lfm2",
        {"norm_eps": "x"},
        "norm_eps='x' is not supported; expected a finite number",
        [{"norm_eps": 1}],
    ),
    "a number that is too low": (
        "lfm2",
        {"norm_eps": 0},
        "norm_eps=0 is not supported; expected a number above 0",
        [{"norm_eps": 1e-9}],
    ),
    "a truth value": (
        "lfm2",
        {"conv_bias": "no"},
        "conv_bias='no' is not supported; expected true or false",
        [{"conv_bias": False}],
    ),
    "a token": (
        "lfm2",
        {"bos_token_id": 131},
        r"bos_token_id=131 is not supported; expected a token id from 0 to 130 \(vocab_size\)",
        [{"bos_token_id": 0}, {"bos_token_id": 130}],
    ),
    "attention layers": (
        "lfm2",
        {"layer_types": None, "full_attn_idxs": [7]},
        "full_attn_idxs=.7. is not supported; expected a list of integers from 0 to 4",
        [{"full_attn_idxs": [0, 4]}],
    ),
    "layers as no list": (
        "lfm2",
        {"layer_types": "conv"},
        'layer_types=\'conv\' is not supported; expected a list of "conv" and "full_attention"',
        [{"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]}],
    ),
    "a layer of no kind": (
        "lfm2",
        {"layer_types": ["conv", "full_attention", "mamba", "full_attention", "conv"]},
        r'layer_types\[2\]=\'mamba\' is not supported; expected "conv" or "full_attention"',
        [{"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]}],
    ),
    "too few layers": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"]},
        "layer_types has 2 entries but num_hidden_layers=5; they must agree",
        [{"num_hidden_layers": 2}, {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]}],
    ),
    "no layers": (
        "lfm2_moe",
        {"layer_types": None},
        "layer_types is missing; lfm2_moe has no default for it, so state every layer",
        [{"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]}],
    ),
    "too many experts": (
        "lfm2_moe",
        {"num_experts": 65536},
        "correct num_experts or num_hidden_layers",
        [{"num_experts": 4}],
    ),
    "RoPE as no object": (
        "lfm2",
        {"rope_parameters": 5},
        "rope_parameters=5 is not supported; expected an object",
        [{"rope_parameters": {}}, {"rope_parameters": ROPE}],
    ),
    "another RoPE": (
        "lfm2",
        {"rope_parameters": ROPE | {"rope_type": "yarn"}},
        "rope_parameters: rope_type='yarn' is not supported; expected \"default\"",
        [{"rope_parameters": ROPE}],
    ),
    "RoPE on a part": (
        "lfm2",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5 is not supported; expected 1.0",
        [{"partial_rotary_factor": 1.0}],
    ),
    "RoPE for each kind of layer": (
        "lfm2",
        {"rope_parameters": {"full_attention": ROPE}},
        "rope_parameters: full_attention=.* is not supported; expected only ",
        [{"rope_parameters": ROPE}],
    ),
    "heads": (
        "lfm2",
        {"num_key_value_heads": 3},
        "num_attention_heads=4 is not a multiple of num_key_value_heads=3; grouped-query attention needs whole groups",
        [{"num_key_value_heads": 2}],
    ),
    "a width that no heads divide": (
        "lfm2",
        {"hidden_size": 66},
        "hidden_size=66 is not a multiple of num_attention_heads=4; state head_dim",
        [{"hidden_size": 66, "head_dim": 16}],
    ),
    "an odd head": (
        "lfm2",
        {"head_dim": 15},
        r"head_dim=15 is not supported; expected an even number",
        [{"head_dim": 16}],
    ),
    "quantized already": (
        "lfm2",
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config says that the weights are quantized already; export the checkpoint that they were made of",
        [{}],
    ),
    "a width that adjusts to nothing": (
        "lfm2",
        {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1e9},
        "under block_auto_adjust_ff_dim; expected a width from 1 to 2147483647",
        [{"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0}, {"block_auto_adjust_ff_dim": False}],
    ),
    "no family": (
        "lfm2",
        {"model_type": None},
        "model_type is missing; expected one of lfm2, lfm2_moe",
        [{"model_type": "lfm2"}],
    ),
    "another family": (
        "lfm2",
        {"model_type": "lfm1"},
        "model_type='lfm1' is not supported; known families: lfm2, lfm2_moe",
        [{"model_type": "lfm2"}],
    ),
    "another class": (
        "lfm2",
        {"architectures": ["MyForCausalLM"]},
        "expected Lfm2ForCausalLM or Lfm2Model, or leave architectures out if the weights are a decoder's",
        [{"architectures": ["Lfm2ForCausalLM"]}, {"architectures": ["Lfm2Model"]}, {"architectures": None}],
    ),
}
# What is no file's to correct: the model is of another kind.
WITHOUT = ["is {other}; only decoders and encoders of text are exported"]
ONLY = {
    "block_dim": 1,
    "conv_dim_out": 1,
    "num_heads": 1,
    "block_norm_eps": 1.0,
    "block_use_swiglu": False,
    "use_pos_enc": False,
    "hidden_act": "gelu",
    "attention_bias": True,
    "sliding_window": 5,
    "is_encoder_decoder": True,
    "return_dict": False,
    "tie_last_hidden_states": False,
    "per_layer_config": {},
}


def raw_config(family: str, changes: Changes) -> dict[str, Any]:
    raw = tiny_config(family) | changes
    return {key: value for key, value in raw.items() if value is not None or key not in changes}


def parsed(raw: dict[str, Any]) -> object:
    """As read from a file."""
    raw = json.loads(json.dumps(raw))
    return find_family(raw, "config.json").parse_config(raw)


def refusal(raw: dict[str, Any]) -> tuple[str, set[tuple[Path, int]]]:
    """The message, and the lines of ours that it came through."""
    with pytest.raises(Lfm2ExportError) as caught:
        parsed(raw)
    return str(caught.value), {(Path(entry.path), entry.lineno + 1) for entry in caught.traceback}


@pytest.mark.parametrize("name", REMEDIES)
def test_what_a_message_says_about_the_config_works(name: str) -> None:
    family, wrong, said, fixes = REMEDIES[name]
    message, _ = refusal(raw_config(family, wrong))
    assert re.search(said, message), message
    for fix in fixes:
        base = {key: value for key, value in tiny_config(family).items() if key in wrong} if fix == {} else wrong
        corrected = raw_config(family, base | fix)
        for key in set(wrong) - set(tiny_config(family)) if fix == {} else ():
            corrected.pop(key, None)
        parsed(corrected)


@pytest.mark.parametrize("key", ONLY)
def test_the_only_value_that_a_message_names_is_taken_and_so_is_none(key: str) -> None:
    """The value is what stands in the message, put into the file as it stands."""
    message, _ = refusal(raw_config("lfm2", {key: ONLY[key]}))
    (value,) = re.findall(r"; expected (.*), or no such key$", message)
    parsed(raw_config("lfm2", {}) | {key: json.loads(value)})
    parsed(raw_config("lfm2", {}))


def test_no_remedy_was_forgotten() -> None:
    """Each statement that refuses a config is reached by a case here, but for those that have no remedy."""
    reached: set[tuple[Path, int]] = set()
    cases = [(family, wrong) for family, wrong, _, _ in REMEDIES.values()]
    for family, wrong in [*cases, *(("lfm2", {key: value}) for key, value in ONLY.items())]:
        reached |= refusal(raw_config(family, wrong))[1]
    left = []
    for path in SOURCES:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Raise) and not any(
                place == path and node.lineno <= line <= (node.end_lineno or 0) for place, line in reached
            ):
                left.append(f"{path.name}:{node.lineno}: {ast.get_source_segment(text, node)}")
    assert [one for one in left if not any(known in one for known in WITHOUT)] == []
    assert {config_module.__name__, lfm2.__name__, lfm2_moe.__name__} <= set(map(module_of, SOURCES))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


# Other files of a checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2"), seed=0, dtype="F32")


def fault(folder: Path) -> str:
    with pytest.raises(Lfm2ExportError) as caught:
        check(open_checkpoint(folder))
    return str(caught.value)


GENERATION: dict[str, tuple[Changes, str, list[Changes]]] = {
    "sampling": ({"do_sample": "yes"}, "do_sample='yes' is not usable; expected true or false", [{"do_sample": True}]),
    "temperature": ({"temperature": -1}, "temperature=-1 is not usable; expected 0", [{"temperature": 0}]),
    "top_p": ({"top_p": 2}, "top_p=2 is not usable; expected a number from 0 .* to 1", [{"top_p": 0}, {"top_p": 1}]),
    "top_k": ({"top_k": -1}, "top_k=-1 is not usable; expected 0 .off. or a positive integer", [{"top_k": 0}]),
    "stop token": ({"eos_token_id": "x"}, "eos_token_id='x' is no", [{"eos_token_id": 2}, {"eos_token_id": [2]}]),
    "stop token of a list": ({"eos_token_id": [2, -1]}, "eos_token_id=-1 is no", [{"eos_token_id": [2]}]),
    "stop token beyond": ({"eos_token_id": 999}, "eos_token_id=999 is not in the vocabulary", [{"eos_token_id": 130}]),
    "words": ({"bad_words_ids": [[]]}, "bad_words_ids=.* expected lists of 1 to", [{"bad_words_ids": [[1]]}]),
}


@pytest.mark.parametrize("name", GENERATION)
def test_what_a_message_says_about_generation_settings_works(folder: Path, name: str) -> None:
    wrong, said, fixes = GENERATION[name]
    path = folder / "generation_config.json"
    path.write_text(json.dumps(wrong))
    message = fault(folder)
    assert re.search(said, message), message
    assert "generation_config.json" in message
    assert message.endswith("; correct the file")
    for fix in fixes:
        path.write_text(json.dumps(fix))
        check(open_checkpoint(folder))


def test_settings_are_named_as_the_file_names_them() -> None:
    """Where an artifact's file was edited."""
    with pytest.raises(Lfm2ExportError, match=r"^generation_config.json: eos_token_id=\['x'\] is not usable; expected"):
        lfm2_export.GenerationConfig.from_dict({"eos_token_id": [["x"]]})


def test_weights_that_are_double_are_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    expected = open_checkpoint(folder).read("model.embed_tokens.weight")
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)
    np.testing.assert_array_equal(open_checkpoint(folder).read("model.embed_tokens.weight"), expected)


def test_a_head_that_the_config_ties_is_stated_as_the_message_says(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).contiguous()}, path)
    for keys in (
        {"tie_word_embeddings": True},
        {"tie_embedding": True},
        {"tie_embedding": True, "tie_word_embeddings": True},
    ):
        raw = tiny_config("lfm2", tie_word_embeddings=None) | keys
        (folder / "config.json").write_text(json.dumps(raw))
        caplog.clear()
        assert not open_checkpoint(folder).config.tie_word_embeddings
        ((key, value),) = re.findall(r"\(say (\w+)=(\w+) there", caplog.text)
        (folder / "config.json").write_text(json.dumps(raw | {key: json.loads(value)}))
        caplog.clear()
        assert not open_checkpoint(folder).config.tie_word_embeddings
        assert caplog.messages == []


def test_an_adapter_that_was_merged_is_exported(folder: Path, tmp_path: Path) -> None:
    """As its message says; peft's merge adds scale * B @ A to each weight."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(adapter)
    message = str(caught.value)
    assert f"is an adapter ('LORA') for {str(folder)!r}"[:60] in message
    assert message.endswith("by --lora, or merge it with peft (merge_and_unload) and export the result")
    name = "model.layers.0.feed_forward.w1.weight"
    tensors = load_file(folder / "model.safetensors")
    left, right = torch.randn(tensors[name].shape[0], 2), torch.randn(2, tensors[name].shape[1])
    merged = {**tensors, name: tensors[name] + settings["lora_alpha"] / settings["r"] * left @ right}
    factors = {"A": right, "B": left}
    weights = {f"base_model.model.model.layers.0.feed_forward.w1.lora_{one}.weight": factors[one] for one in factors}
    save_file({key: value.contiguous() for key, value in weights.items()}, adapter / "adapter_model.safetensors")
    streamed = open_checkpoint(folder, lora=adapter).read(name)
    np.testing.assert_allclose(streamed, merged[name].float().numpy(), atol=1e-5)
    # peft's merge_and_unload().save_pretrained(...) leaves a checkpoint's folder.
    save_file(merged, adapter / "model.safetensors", metadata={"format": "pt"})
    (adapter / "config.json").write_text((folder / "config.json").read_text())
    np.testing.assert_array_equal(open_checkpoint(adapter).read(name), merged[name].numpy())
