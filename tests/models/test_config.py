"""parse_config against transformers' config classes: what is derived, honoured, ignored, refused, and in what words."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.configuration_utils import PreTrainedConfig

from lfm2_export.config import ModelConfig, Rope
from lfm2_export.errors import CheckpointError, ConfigError
from lfm2_export.families import get_family
from lfm2_export.models import NETS
from tests.checkpoints import tiny_config
from tests.models.reference import CASES, THEIR_CONFIGS, published, their_config

THEIR_CLASSES: dict[str, Any] = {
    "lfm2": transformers.Lfm2ForCausalLM,
    "lfm2_moe": transformers.Lfm2MoeForCausalLM,
    "lfm3": transformers.Lfm3ForCausalLM,
}
ROPE = {"rope_type": "default", "rope_theta": 5e3}

# Ways to say the same thing, several sayings at once, and values that only a tokenizer or a caller cares about.
MORE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "eos_list": ("lfm2", {"eos_token_id": [7, 2, 5]}),
    "eos_empty_list": ("lfm2", {"eos_token_id": []}),
    "other_token_ids": ("lfm2_moe", {"bos_token_id": 3, "eos_token_id": 7, "pad_token_id": 9}),
    "tie_embedding_wins": ("lfm2", {"tie_embedding": False, "tie_word_embeddings": True}),
    "tie_embedding_wins_again": ("lfm2_moe", {"tie_embedding": True, "tie_word_embeddings": False}),
    "block_ff_dim_wins": ("lfm2", {"block_ff_dim": 72, "intermediate_size": 144}),
    "block_ff_dim_adjusted": ("lfm2", {"block_ff_dim": 100, "block_auto_adjust_ff_dim": True}),
    "block_multiplier_integer": ("lfm2", {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 2}),
    "layer_types_win_over_full_attn_idxs": ("lfm2", {"full_attn_idxs": [0, 2, 4]}),
    "older_name_of_a_layer_type": ("lfm2_moe", {"layer_types": ["conv", "attention", "conv", "attention", "conv"]}),
    "rope_parameters_win_over_rope_theta": ("lfm2", {"rope_parameters": ROPE, "rope_theta": 77.0}),
    "rope_theta_completes_rope_parameters": ("lfm2", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0}),
    "rope_scaling_wins_over_rope_parameters": (
        "lfm2_moe",
        {"rope_scaling": {"type": "default", "rope_theta": 9.0}, "rope_parameters": ROPE, "rope_theta": 77.0},
    ),
    "rope_scaling_replaces_rope_parameters": ("lfm2", {"rope_scaling": {"type": "default"}, "rope_parameters": ROPE}),
    "rope_scaling_empty": ("lfm2_moe", {"rope_scaling": {}, "rope_parameters": ROPE}),
    "rope_theta_only": ("lfm2_moe", {"rope_theta": 77.0}),
    "no_cache_by_default": ("lfm2", {"use_cache": False}),
    "asks_for_outputs": ("lfm2_moe", {"output_hidden_states": True, "output_router_logits": True}),
    "asks_for_attentions": ("lfm2", {"output_attentions": True}),
}
NULLS: dict[str, tuple[str, dict[str, Any]]] = {
    "no_special_tokens": ("lfm2", {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}),
    "rope_parameters_null": ("lfm2", {"rope_parameters": None, "rope_theta": 77.0}),
    "rope_scaling_null": ("lfm2_moe", {"rope_scaling": None, "rope_parameters": ROPE}),
    "full_attn_idxs_null": ("lfm2", {"full_attn_idxs": None}),
    "layer_types_null": ("lfm2", {"layer_types": None, "full_attn_idxs": [1]}),
}


def raw_of(case: str) -> dict[str, Any]:
    if case in NULLS:
        model_type, changes = NULLS[case]
        return tiny_config(model_type) | changes
    model_type, changes = (CASES | MORE_CASES)[case]
    return tiny_config(model_type, **changes)


def parse(raw: dict[str, Any]) -> ModelConfig:
    return get_family(raw["model_type"]).parse_config(raw)


def refusal(model_type: str, **changes: Any) -> str:
    """The error's text for the tiny config with these keys; unlike in ``tiny_config``, None stays and means null."""
    with pytest.raises(ConfigError) as caught:
        parse(tiny_config(model_type) | changes)
    text = str(caught.value)
    print(text)
    assert "\n" not in text
    assert len(text) < 300
    return text


def their_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = THEIR_CLASSES[raw["model_type"]]._from_config(their_config(raw))
    shapes = {published(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def our_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """With experts fused, as transformers' modules have them."""
    family, config = get_family(raw["model_type"]), parse(raw)
    shapes = {name: tensor.shape for name, tensor in family.tensors(config).items()}
    for name, fused in family.fused_tensors(config).items():
        for part, place in fused.parts.items():
            assert shapes.pop(part) == (place.stop - place.start, fused.shape[2])
        shapes[name] = fused.shape
    return shapes


def check_against_theirs(raw: dict[str, Any]) -> None:
    ours, theirs = parse(raw), their_config(raw)
    derived = {
        **_ropes(theirs),
        "encoder": None,
        "drafter": None,
        "head_dim": getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads),
        "layer_types": tuple(theirs.layer_types),
        "eos_token_id": () if theirs.eos_token_id is None else _as_tuple(theirs.eos_token_id),
        "intermediate_size": ours.intermediate_size,  # see their_shapes
        "num_dense_layers": min(getattr(theirs, "num_dense_layers", 99), theirs.num_hidden_layers),
    }
    only_moe = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "use_expert_bias", "norm_topk_prob")
    only_moe = (*only_moe, "routed_scaling_factor", "output_router_logits")
    only_lfm3 = ("sliding_window", "attention_bias", "use_attention_gate", "use_sandwich_norm")
    for field in dataclasses.fields(ModelConfig):
        if field.name in (() if ours.model_type == "lfm2_moe" else only_moe):
            continue
        if field.name in (() if ours.model_type == "lfm3" else only_lfm3):
            continue
        if field.name == "sliding_window" and "sliding_attention" not in ours.layer_types:
            continue
        wanted = derived[field.name] if field.name in derived else getattr(theirs, field.name)
        assert getattr(ours, field.name) == wanted, field.name
    assert our_shapes(raw) == their_shapes(raw)


def _ropes(theirs: Any) -> dict[str, Any]:
    given = theirs.rope_parameters
    if "rope_theta" in given:
        return {"rope_theta": given["rope_theta"], "rope_share": 1.0, "sliding_rope": None}
    full, sliding = (
        Rope(theta=one["rope_theta"], share=one.get("partial_rotary_factor", 1.0))
        for one in (given["full_attention"], given["sliding_attention"])
    )
    return {"rope_theta": full.theta, "rope_share": full.share, "sliding_rope": sliding}


def _as_tuple(value: int | list[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


@pytest.mark.parametrize("case", [*CASES, *MORE_CASES, *NULLS])
def test_every_derived_value_and_shape_equals_theirs(case: str) -> None:
    check_against_theirs(raw_of(case))


def test_that_comparison_can_fail() -> None:
    raw = tiny_config("lfm2", block_auto_adjust_ff_dim=True)
    assert our_shapes(raw) != their_shapes(raw | {"block_multiple_of": 7})


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "lfm2"},
        {"model_type": "lfm2_moe", "layer_types": ["conv"] * 32},
        {"model_type": "lfm3", "sliding_window": 256},
    ],
    ids=NETS,
)
def test_defaults_are_theirs(raw: dict[str, Any]) -> None:
    check_against_theirs(raw)


def test_the_first_published_form_of_a_config() -> None:
    raw = json.loads(
        """{"architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": true, "block_dim": 2048,
        "block_ff_dim": 12288, "block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0, "block_multiple_of": 256,
        "block_norm_eps": 1e-05, "block_out_init_scale": 1.0, "block_use_swiglu": true, "block_use_xavier_init": true,
        "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": false, "conv_dim": 2048, "conv_dim_out": 2048,
        "conv_use_xavier_init": true, "eos_token_id": 7, "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 2048,
        "initializer_range": 0.02, "max_position_embeddings": 128000, "model_type": "lfm2", "norm_eps": 1e-05,
        "num_attention_heads": 32, "num_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pad_token_id": 0, "rope_theta": 1000000.0, "tie_embedding": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0.dev0", "use_cache": true, "use_pos_enc": true, "vocab_size": 65536}"""
    )
    config = parse(raw)
    check_against_theirs(raw)
    assert (config.intermediate_size, config.head_dim, config.attention_layers) == (8192, 64, (2, 5, 8, 10, 12, 14))


@pytest.mark.parametrize(
    "case", ["lfm2-plain", "lfm2_moe-plain", "lfm3-plain", "eos_list", "rope_theta_only", "tie_embedding_wins"]
)
def test_a_config_saved_by_transformers_means_the_same(case: str) -> None:
    raw = raw_of(case)
    saved = json.loads(their_config(raw).to_json_string())
    assert parse(saved) == parse(raw)


# What we do with each field of their config classes. A value here is one that differs from the tiny config and its
# defaults: it must show in what parse_config returns.
HONOURED: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "norm_eps": 1e-6,
    "use_cache": False,
    "pad_token_id": 5,
    "bos_token_id": 5,
    "eos_token_id": 5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
    "conv_bias": True,
    "conv_L_cache": 4,
    "layer_types": ["conv"] * 5,
    "output_hidden_states": True,
    # lfm2
    "block_multiple_of": 5,
    "block_ffn_dim_multiplier": 3.0,
    "block_auto_adjust_ff_dim": True,
    "full_attn_idxs": [0],
    # lfm2_moe
    "moe_intermediate_size": 16,
    "num_dense_layers": 3,
    "num_experts_per_tok": 3,
    "output_router_logits": True,
    "num_experts": 6,
    "use_expert_bias": False,
    "routed_scaling_factor": 2.0,
    "norm_topk_prob": False,
    # lfm3
    "head_dim": 16,
    "sliding_window": 9,
    "use_sandwich_norm": False,
    "use_attention_gate": False,
    "attention_bias": True,
}
# Where a family wants another value for that.
OWN_VALUES: dict[str, dict[str, Any]] = {
    "lfm3": {"rope_parameters": {kind: {"rope_theta": 1e3} for kind in ("full_attention", "sliding_attention")}}
}
# What a field needs beside it to show.
COMPANIONS: dict[str, dict[str, Any]] = {
    "block_multiple_of": {"block_auto_adjust_ff_dim": True},
    "block_ffn_dim_multiplier": {"block_auto_adjust_ff_dim": True, "block_multiple_of": 1},
    "full_attn_idxs": {"layer_types": None},
    "num_hidden_layers": {"layer_types": ["conv", "full_attention"]},
}
REFUSED: dict[str, Any] = {"is_encoder_decoder": True, "return_dict": False}
IGNORED = {
    "initializer_range": "training only",
    "architectures": "the class follows from model_type",
    "transformers_version": "a fact about the writer",
    "dtype": "each tensor's own dtype stands in its shard",
    "chunk_size_feed_forward": "a way to compute the same",
    "id2label": "classification heads",
    "label2id": "classification heads",
    "problem_type": "classification heads",
    "attention_dropout": "training only",
}


def fields_of(model_type: str) -> list[str]:
    return [field.name for field in dataclasses.fields(THEIR_CONFIGS[model_type])]


@pytest.mark.parametrize("model_type", NETS)
def test_every_field_of_their_classes_is_honoured_refused_or_ignored_for_a_reason(model_type: str) -> None:
    known = HONOURED.keys() | REFUSED.keys() | IGNORED.keys()
    assert set(fields_of(model_type)) - known == set(), "transformers has new fields: decide what they mean here"
    every = {field for family in NETS for field in fields_of(family)}
    assert known - every == set(), "transformers has these fields no more"
    assert {field.name for field in dataclasses.fields(PreTrainedConfig)} <= known


@pytest.mark.parametrize("model_type", NETS)
def test_honoured_fields_show(model_type: str) -> None:
    for field in HONOURED.keys() & set(fields_of(model_type)):
        companions = COMPANIONS.get(field, {})
        before = tiny_config(model_type) | companions
        if field == "num_hidden_layers":
            before = tiny_config(model_type)
        value = OWN_VALUES.get(model_type, {}).get(field, HONOURED[field])
        assert parse(before | companions | {field: value}) != parse(before), field


@pytest.mark.parametrize("model_type", NETS)
def test_refused_fields_are_refused_by_name_and_ignored_ones_are_ignored(model_type: str) -> None:
    for field, value in REFUSED.items():
        assert f"{field}={value!r} is not supported" in refusal(model_type, **{field: value})
    plain = parse(tiny_config(model_type))
    for field in IGNORED:
        assert parse(tiny_config(model_type) | {field: 3}) == plain


BAD_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("vocab_size", {"vocab_size": 0}, "vocab_size=0 is not supported; expected an integer from 1 to 2147483647"),
    ("vocab_text", {"vocab_size": "many"}, "vocab_size='many' is not supported; expected an integer"),
    ("vocab_bool", {"vocab_size": True}, "vocab_size=True is not supported; expected an integer"),
    ("vocab_fraction", {"vocab_size": 13.5}, "vocab_size=13.5 is not supported; expected an integer"),
    ("hidden_size", {"hidden_size": -64}, "hidden_size=-64 is not supported; expected an integer from 1"),
    ("hidden_huge", {"hidden_size": 10**5000}, "hidden_size=<int> is not supported"),
    ("no_layers", {"num_hidden_layers": 0, "layer_types": []}, "num_hidden_layers=0 is not supported"),
    ("layers", {"num_hidden_layers": 4}, "layer_types has 5 entries but num_hidden_layers=4; they must agree"),
    ("layer_kind", {"layer_types": ["conv"] * 4 + ["mamba"]}, "layer_types[4]='mamba' is not supported; expected"),
    ("layer_list", {"layer_types": "conv"}, "layer_types='conv' is not supported; expected a list"),
    ("layer_entry", {"layer_types": [["conv"]] * 5}, "layer_types[0]=['conv'] is not supported"),
    ("heads", {"num_attention_heads": 5}, "num_attention_heads=5 is not a multiple of num_key_value_heads=2"),
    ("kv_heads", {"num_key_value_heads": 0}, "num_key_value_heads=0 is not supported"),
    ("head_dim", {"num_attention_heads": 6, "head_dim": None}, "hidden_size=64 is not a multiple of"),
    ("head_dim_odd", {"head_dim": 15}, "head_dim=15 is not supported; expected an even number"),
    ("conv_width", {"conv_L_cache": 1}, "conv_L_cache=1 is not supported; expected an integer from 2 to 1024"),
    ("conv_bias", {"conv_bias": "no"}, "conv_bias='no' is not supported; expected true or false"),
    ("eps", {"norm_eps": 0}, "norm_eps=0 is not supported; expected a number above 0"),
    ("eps_nan", {"norm_eps": float("nan")}, "norm_eps=nan is not supported; expected a finite number"),
    ("eps_infinite", {"norm_eps": float("inf")}, "norm_eps=inf is not supported; expected a finite number"),
    ("eps_text", {"norm_eps": "1e-5"}, "norm_eps='1e-5' is not supported; expected a finite number"),
    ("theta", {"rope_theta": -1.0}, "rope_theta=-1.0 is not supported; expected a number above 0"),
    (
        "theta_inside",
        {"rope_parameters": {"rope_theta": "big"}},
        "config.json: rope_parameters: rope_theta='big' is not supported",
    ),
    (
        "rope_type",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "config.json: rope_parameters: rope_type='yarn' is not supported; expected \"default\"",
    ),
    ("rope_scaling", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: rope_type='linear' is not"),
    (
        "rope_nested",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "rope_parameters: full_attention={'rope_type': 'default', 'rope_theta': 10000.0} is not supported",
    ),
    ("rope_list", {"rope_parameters": []}, "rope_parameters=[] is not supported; expected an object"),
    ("rope_part", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; expected 1.0"),
    (
        "rope_part_inside",
        {"rope_parameters": {"partial_rotary_factor": 0.25}},
        "rope_parameters: partial_rotary_factor=0.25 is not supported; expected 1.0",
    ),
    ("context", {"max_position_embeddings": 0}, "max_position_embeddings=0 is not supported"),
    ("bos", {"bos_token_id": 131}, "bos_token_id=131 is not supported; expected a token id from 0 to 130 (vocab_size)"),
    ("eos", {"eos_token_id": [2, -1]}, "eos_token_id=-1 is not supported; expected a token id"),
    ("eos_text", {"eos_token_id": "</s>"}, "eos_token_id='</s>' is not supported; expected a token id"),
    ("pad", {"pad_token_id": -2}, "pad_token_id=-2 is not supported; expected a token id"),
    ("tied", {"tie_word_embeddings": 1}, "tie_word_embeddings=1 is not supported; expected true or false"),
    ("tied_older", {"tie_embedding": "yes"}, "tie_embedding='yes' is not supported; expected true or false"),
    ("use_cache", {"use_cache": "sometimes"}, "use_cache='sometimes' is not supported; expected true or false"),
    ("block_dim", {"block_dim": 128}, "block_dim=128 is not supported; expected 64, or no such key"),
    ("conv_dim", {"conv_dim": 128}, "conv_dim=128 is not supported; expected 64, or no such key"),
    ("conv_dim_out", {"conv_dim_out": 32}, "conv_dim_out=32 is not supported; expected 64, or no such key"),
    ("num_heads", {"num_heads": 8}, "num_heads=8 is not supported; expected 4, or no such key"),
    ("block_norm_eps", {"block_norm_eps": 1e-6}, "block_norm_eps=1e-06 is not supported; expected 1e-05, or no such"),
    ("no_swiglu", {"block_use_swiglu": False}, "block_use_swiglu=False is not supported; expected true, or no such"),
    ("no_positions", {"use_pos_enc": False}, "use_pos_enc=False is not supported; expected true, or no such key"),
    ("activation", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; expected \"silu\", or no such key"),
    ("attention_bias", {"attention_bias": True}, "attention_bias=True is not supported; expected false, or no such"),
    ("window", {"sliding_window": 512}, "sliding_window=512 is not supported; expected null, or no such key"),
    ("per_layer", {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config={'0': {'head_dim': 8}} is not"),
    (
        "quantized",
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config says that the weights are quantized already",
    ),
    ("long_value", {"hidden_act": "x" * 500}, "…"),
    ("line_break", {"hidden_act": "a\nb"}, "hidden_act='a\\nb' is not supported"),
]
DENSE_BAD_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("width", {"intermediate_size": 0}, "intermediate_size=0 is not supported"),
    ("block_ff_dim", {"block_ff_dim": 1.5}, "block_ff_dim=1.5 is not supported"),
    (
        "adjusted_to_nothing",
        {"intermediate_size": 1, "block_auto_adjust_ff_dim": True},
        "intermediate_size=1 becomes 0 under block_auto_adjust_ff_dim; expected a width from 1",
    ),
    (
        "adjusted_to_too_much",
        {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1e300},
        "under block_auto_adjust_ff_dim; expected a width from 1",
    ),
    ("multiple", {"block_auto_adjust_ff_dim": True, "block_multiple_of": 0}, "block_multiple_of=0 is not supported"),
    (
        "multiplier",
        {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": -1.0},
        "block_ffn_dim_multiplier=-1.0 is not supported; expected a number above 0",
    ),
    ("adjust", {"block_auto_adjust_ff_dim": "true"}, "block_auto_adjust_ff_dim='true' is not supported"),
    (
        "indices",
        {"layer_types": None, "full_attn_idxs": [5]},
        "full_attn_idxs=[5] is not supported; expected a list of",
    ),
    ("index", {"layer_types": None, "full_attn_idxs": 2}, "full_attn_idxs=2 is not supported; expected a list of int"),
]
MOE_BAD_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("layer_types", {"layer_types": None}, "layer_types is missing; lfm2_moe has no default for it"),
    ("idxs", {"layer_types": None, "full_attn_idxs": [1]}, "layer_types is missing; lfm2_moe has no default for it"),
    ("experts", {"num_experts": 0}, "num_experts=0 is not supported; expected an integer from 1"),
    ("top_k", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 is not supported; expected an integer from 1 to 4"),
    ("top_0", {"num_experts_per_tok": 0}, "num_experts_per_tok=0 is not supported; expected an integer from 1 to 4"),
    ("dense", {"num_dense_layers": -1}, "num_dense_layers=-1 is not supported; expected an integer from 0"),
    ("width", {"moe_intermediate_size": 0}, "moe_intermediate_size=0 is not supported"),
    ("scale", {"routed_scaling_factor": 0.0}, "routed_scaling_factor=0.0 is not supported; expected a number above 0"),
    ("bias", {"use_expert_bias": 1}, "use_expert_bias=1 is not supported; expected true or false"),
    ("norm", {"norm_topk_prob": "no"}, "norm_topk_prob='no' is not supported; expected true or false"),
    ("router", {"output_router_logits": 0}, "output_router_logits=0 is not supported; expected true or false"),
]


@pytest.mark.parametrize(
    ("model_type", "changes", "text"),
    [
        pytest.param(model_type, changes, text, id=f"{model_type}-{name}")
        for model_type, table in (
            ("lfm2", [*BAD_VALUES, *DENSE_BAD_VALUES]),
            ("lfm2_moe", [*BAD_VALUES, *MOE_BAD_VALUES]),
        )
        for name, changes, text in table
    ],
)
def test_bad_values_are_refused_in_one_readable_line(model_type: str, changes: dict[str, Any], text: str) -> None:
    found = refusal(model_type, **changes)
    assert found.startswith("config.json: ")
    assert text in found


def test_repeated_keys_that_agree_are_accepted() -> None:
    repeats = {"block_dim": 64, "conv_dim": 64, "num_heads": 4, "block_norm_eps": 1e-5, "hidden_act": "silu"}
    assert parse(tiny_config("lfm2", **repeats)) == parse(tiny_config("lfm2"))


def test_a_null_multiplier_leaves_the_width_unrounded() -> None:
    # transformers' modeling code has this branch, though its config class no longer lets null in.
    raw = tiny_config("lfm2", block_auto_adjust_ff_dim=True) | {"block_ffn_dim_multiplier": None}
    assert parse(raw).intermediate_size == 64


def test_unknown_model_types_are_refused_with_the_known_ones() -> None:
    for name in ("llama", None, 3, ["lfm2"]):
        with pytest.raises(CheckpointError, match="known families: lfm2, lfm2_moe"):
            get_family(name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**400, -1, 0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
KEYS = sorted(
    {*HONOURED, *REFUSED, "rope_theta", "rope_scaling", "head_dim", "block_ff_dim", "tie_embedding", "per_layer_config"}
)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(model_type=st.sampled_from(sorted(NETS)), changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_json_value_gives_a_config_or_a_config_error(model_type: str, changes: dict[str, Any]) -> None:
    text, config = "", None
    try:
        config = parse(tiny_config(model_type) | changes)
    except ConfigError as error:
        text = str(error)
    assert "\n" not in text
    assert len(text) < 400
    if config is not None:
        assert all(size > 0 for tensor in get_family(model_type).tensors(config).values() for size in tensor.shape)
