"""Names and shapes of checkpoint tensors; the published layout is the canonical one, fused layouts map onto it.

In: a ``ModelConfig``. Out: what a checkpoint's folder must hold, for the reader to match exactly, and how the eager
model's stacked expert parameters are put together from tensors that are read one expert at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lfm2_export.config import FULL_ATTENTION, Fields, ModelConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class FusedPart:
    """Where one published tensor lies in a fused one: ``fused[expert, start:stop]``."""

    expert: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class FusedTensor:
    """A tensor as transformers 5 saves it, [experts, rows, columns], and the published tensors inside it."""

    shape: tuple[int, int, int]
    parts: Mapping[str, FusedPart]


def backbone_shapes(config: ModelConfig) -> Shapes:
    """Embedding, norms, convs, attention and head: all but the feed-forward blocks."""
    width = config.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, width), "model.embedding_norm.weight": (width,)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}operator_norm.weight"] = shapes[f"{prefix}ffn_norm.weight"] = (width,)
        shapes |= _attention(config, prefix) if config.layer_types[layer] == FULL_ATTENTION else _conv(config, prefix)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def _attention(config: ModelConfig, prefix: str) -> Shapes:
    width, head_dim = config.hidden_size, config.head_dim
    q_width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        f"{prefix}self_attn.q_proj.weight": (q_width, width),
        f"{prefix}self_attn.k_proj.weight": (kv_width, width),
        f"{prefix}self_attn.v_proj.weight": (kv_width, width),
        f"{prefix}self_attn.out_proj.weight": (width, q_width),
        f"{prefix}self_attn.q_layernorm.weight": (head_dim,),
        f"{prefix}self_attn.k_layernorm.weight": (head_dim,),
    }


def _conv(config: ModelConfig, prefix: str) -> Shapes:
    width = config.hidden_size
    shapes: Shapes = {
        f"{prefix}conv.in_proj.weight": (3 * width, width),
        f"{prefix}conv.conv.weight": (width, 1, config.conv_L_cache),
        f"{prefix}conv.out_proj.weight": (width, width),
    }
    if config.conv_bias:
        biases = {"in_proj": 3 * width, "conv": width, "out_proj": width}
        shapes |= {f"{prefix}conv.{part}.bias": (size,) for part, size in biases.items()}
    return shapes


def mlp_shapes(config: ModelConfig, layer: int) -> Shapes:
    """A dense SwiGLU block."""
    return swiglu_shapes(f"model.layers.{layer}.feed_forward.", config.hidden_size, config.intermediate_size)


def swiglu_shapes(prefix: str, width: int, inner: int) -> Shapes:
    """w1 and w3 [inner, width], w2 [width, inner]."""
    return {
        f"{prefix}w1.weight": (inner, width),
        f"{prefix}w3.weight": (inner, width),
        f"{prefix}w2.weight": (width, inner),
    }


def refuse_unsupported(fields: Fields, common: Mapping[str, object]) -> None:
    """Refuses keys that ask for something else than what is built, among them some that published configs repeat.

    Raises:
        ConfigError: names the key, its value and the only value that is supported.
    """
    width = common["hidden_size"]
    supported = {
        "block_dim": width,
        "conv_dim": width,
        "conv_dim_out": width,
        "num_heads": common["num_attention_heads"],
        "block_norm_eps": common["norm_eps"],
        "block_use_swiglu": True,
        "use_pos_enc": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "sliding_window": None,
        "is_encoder_decoder": False,
        "return_dict": True,
        "tie_last_hidden_states": True,
        "per_layer_config": None,
        "quantization_config": None,
    }
    for key, only in supported.items():
        value = fields.raw.get(key)
        if value is not None and value != only:
            raise fields.fail(key, value, f"{only!r}, or no such key")
