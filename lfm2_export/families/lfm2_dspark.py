"""DSpark drafters (``Lfm2DSparkDraftModel``): small decoders that propose a block of tokens from what their target, an
LFM2, computed of the text so far. Token table and head are the target's and not in the checkpoint.

Published as ``model_type: qwen3``, whose layers these are: attention and a SwiGLU behind norms. Source: the published
configs and tensors, and what SGLang, mlx-vlm and llama.cpp say of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lfm2_export.config import FULL_ATTENTION, Fields, ModelConfig, rope_theta
from lfm2_export.drafting import DraftSettings
from lfm2_export.errors import ConfigError
from lfm2_export.families.tensors import (
    EMBEDDING,
    HEAD,
    FusedTensor,
    ModelTensor,
    Part,
    TensorClass,
    by_name,
    linear,
    norm,
    swiglu_shapes,
)

ARCHITECTURES = ("Lfm2DSparkDraftModel",)
MODEL_TYPES = ("qwen3", "lfm2_dspark")
MOST_PROPOSALS = 64

# A SwiGLU's matrices under LFM2's names and under these checkpoints'.
_MLP = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_ONLY: Mapping[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "markov_head_type": "vanilla",
    "quantization_config": None,
}


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A checked config; whether the head is tied to the table is the target's to say (``Checkpoint``).

    Raises:
        ConfigError: a value is missing, out of range, contradicted by another one, or not supported.
    """
    fields = Fields(raw)
    for key, only in _ONLY.items():
        if raw.get(key) not in (None, only):
            raise fields.fail(key, raw[key], f"{only!r}, or no such key")
    layers, heads = fields.integer("num_hidden_layers", None, high=1_000), fields.integer("num_attention_heads", None)
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.fail("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    hidden_size, vocab_size = fields.integer("hidden_size", None), fields.integer("vocab_size", None)
    head_dim = fields.integer("head_dim", hidden_size // heads)
    if head_dim % 2:
        raise fields.fail("head_dim", head_dim, "an even number (RoPE turns pairs)")
    kinds = raw.get("layer_types", [FULL_ATTENTION] * layers)
    if kinds != [FULL_ATTENTION] * layers:
        raise fields.fail("layer_types", kinds, f'"{FULL_ATTENTION}" for each of {layers} layers')
    return ModelConfig(
        model_type="lfm2_dspark",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", None),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        layer_types=(FULL_ATTENTION,) * layers,
        conv_L_cache=2,
        conv_bias=False,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta(fields, 10_000.0),
        max_position_embeddings=fields.integer("max_position_embeddings", 128_000),
        tie_word_embeddings=True,
        num_dense_layers=layers,
        use_cache=False,
        drafter=_settings(fields, vocab_size),
    )


def _settings(fields: Fields, vocab_size: int) -> DraftSettings:
    inner = fields.raw.get("dflash_config")
    if not isinstance(inner, Mapping):
        raise fields.fail("dflash_config", inner, "an object with mask_token_id, target_layer_ids, num_target_layers")
    flash = Fields(inner, f"{fields.place}: dflash_config")
    count = flash.integer("num_target_layers", None, high=10_000)
    chosen = flash.integers("target_layer_ids", low=0, high=count - 1)
    if not chosen or len(set(chosen)) < len(chosen):
        raise flash.fail("target_layer_ids", chosen, f"some layers from 0 to {count - 1}, each once")
    mask = flash.token_id("mask_token_id", None, vocab_size)
    if mask is None:
        raise ConfigError(f"{flash.place}: mask_token_id is missing; expected a token id")
    return DraftSettings(
        block_size=fields.integer("block_size", None, high=MOST_PROPOSALS),
        mask_token_id=mask,
        target_layers=tuple(chosen),
        num_target_layers=count,
        markov_rank=fields.integer("markov_rank", None),
        has_confidence=fields.boolean("enable_confidence_head", False),
        interleaved_rope=not fields.boolean("rope_is_neox_style", True),
    )


def tensors(config: ModelConfig) -> dict[str, ModelTensor]:
    """Every tensor of a published checkpoint by its name, behind the target's table and head."""
    return by_name(_borrowed(config)) | own_tensors(config)


def own_tensors(config: ModelConfig) -> dict[str, ModelTensor]:
    """Those that are in the checkpoint."""
    return by_name(_tensors(config))


def _borrowed(config: ModelConfig) -> Iterator[ModelTensor]:
    """The target's: a token table, and a head where it is not tied to that."""
    table = (config.vocab_size, config.hidden_size)
    yield ModelTensor(name=EMBEDDING, shape=table, kind=TensorClass.EMBEDDING, part=Part.EMBEDDING)
    if not config.tie_word_embeddings:
        yield ModelTensor(name=HEAD, shape=table, kind=TensorClass.HEAD, part=Part.HEAD)


def _tensors(config: ModelConfig) -> Iterator[ModelTensor]:
    draft, width = config.drafter, config.hidden_size
    assert draft is not None
    shape = (width, len(draft.target_layers) * width)
    yield ModelTensor(name="fc.weight", shape=shape, kind=TensorClass.LINEAR, part=Part.DRAFTING)
    yield norm("hidden_norm.weight", width)
    yield norm("norm.weight", width)
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer)
    rank = (config.vocab_size, draft.markov_rank)
    for name, kind in (("markov_w1", TensorClass.EMBEDDING), ("markov_w2", TensorClass.LINEAR)):
        yield ModelTensor(name=f"markov_head.{name}.weight", shape=rank, kind=kind, part=Part.DRAFTING)
    if draft.has_confidence:
        for name, size in (("weight", (1, width + draft.markov_rank)), ("bias", (1,))):
            yield ModelTensor(
                name=f"confidence_head.proj.{name}", shape=size, kind=TensorClass.SMALL, part=Part.DRAFTING
            )


def _layer(config: ModelConfig, layer: int) -> Iterator[ModelTensor]:
    width, head_dim, prefix = config.hidden_size, config.head_dim, f"layers.{layer}."
    q_width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield norm(f"{prefix}{name}.weight", width, layer)
    matrices = {"q_proj": (q_width, width), "k_proj": (kv_width, width), "v_proj": (kv_width, width)}
    for matrix, shape in {**matrices, "o_proj": (width, q_width)}.items():
        yield linear(f"{prefix}self_attn.", matrix, shape, Part.ATTENTION, layer)
    for name in ("q_norm", "k_norm"):
        yield norm(f"{prefix}self_attn.{name}.weight", head_dim, layer)
    for matrix, shape in swiglu_shapes(width, config.intermediate_size).items():
        yield ModelTensor(
            name=f"{prefix}mlp.{_MLP[matrix]}.weight",
            shape=shape,
            kind=TensorClass.LINEAR,
            part=Part.MLPS,
            layer=layer,
            matrix=matrix,
        )


def fused_tensors(config: ModelConfig) -> dict[str, FusedTensor]:
    """No tensor of this family is ever stored fused."""
    return {}


def reference_config(raw: Mapping[str, Any]) -> None:
    """transformers has no class for it: there is nothing to be given."""
