"""The third generation, ``model_type: lfm3`` (LFM3-1.7B): its config and its tensors.

Beyond LFM2: sliding layers with a window and a RoPE of their own, full layers that turn a share of each head only,
norms behind the operator and the feed-forward, a gate for each head, other names in attention. Source: transformers'
``configuration_lfm3.py``; the gate is published as ``gate_proj`` and is ``g_proj`` in transformers' module
(``conversion_mapping.py``).

The half rotation. Published configs give full attention ``partial_rotary_factor`` 0.5 with ``rope_type: "default"``,
which transformers (5.23, 5.24) takes for whole heads, leaving the factor out. Here a factor below 1 always means what
"proportional" means there, as NVIDIA NeMo's documentation of the model says; ``reference_config`` makes transformers do
so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lfm2_export.config import (
    CONV,
    FULL_ATTENTION,
    HONOURED,
    SLIDING_ATTENTION,
    Defaults,
    Fields,
    ModelConfig,
    Rope,
    check_layer_types,
    common_fields,
    refuse_unsupported,
)
from lfm2_export.errors import ConfigError
from lfm2_export.families.reference import ReferenceConfig
from lfm2_export.families.tensors import (
    FusedTensor,
    ModelTensor,
    Part,
    TensorClass,
    backbone,
    block_prefix,
    by_name,
    linear,
    mlp,
    norm,
)
from lfm2_export.messages import listed

logger = logging.getLogger(__name__)

ARCHITECTURES = ("Lfm3ForCausalLM", "Lfm3Model")
KINDS = (CONV, FULL_ATTENTION, SLIDING_ATTENTION)
PROPORTIONAL = "proportional"

_DEFAULTS = Defaults(
    hidden_size=2048,
    vocab_size=128_000,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    conv_L_cache=7,
    bos_token_id=124_894,
    eos_token_id=124_900,
    pad_token_id=124_893,
)
_ROPES = {FULL_ATTENTION: Rope(theta=1_000_000.0, share=0.5), SLIDING_ATTENTION: Rope(theta=10_000.0)}
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor")
# What of LFM2's adjusts the MLP's width there; this family's is what it says.
_IDLE = ("block_auto_adjust_ff_dim", "block_multiple_of", "block_ffn_dim_multiplier")


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A checked ``ModelConfig`` from a checkpoint's ``config.json``.

    Raises:
        ConfigError: a value is missing, out of range, contradicted by another one, or not supported.
    """
    fields = Fields(_with_own_names(raw))
    common = common_fields(fields, _DEFAULTS)
    width = fields.integer("intermediate_size", 7680)
    own = {
        "attention_bias": HONOURED,
        "sliding_window": HONOURED,
        "block_ff_dim": width,
        "rope_scaling": None,
        "tie_embedding": fields.boolean("tie_word_embeddings", True),
    }
    refuse_unsupported(fields, common, own)
    kinds = _layer_types(fields, common["num_hidden_layers"])
    ropes = _ropes(fields, kinds)
    if idle := [key for key in _IDLE if raw.get(key)]:
        logger.warning("%s: %s has no effect in lfm3 and is left out", fields.place, listed(idle))
    return ModelConfig(
        model_type="lfm3",
        **common,
        intermediate_size=width,
        layer_types=kinds,
        num_dense_layers=common["num_hidden_layers"],
        rope_theta=ropes[FULL_ATTENTION].theta,
        rope_share=ropes[FULL_ATTENTION].share,
        sliding_rope=ropes[SLIDING_ATTENTION],
        sliding_window=_sliding_window(fields) if SLIDING_ATTENTION in kinds else None,
        attention_bias=fields.boolean("attention_bias", False),
        use_attention_gate=fields.boolean("use_attention_gate", True),
        use_sandwich_norm=fields.boolean("use_sandwich_norm", True),
    )


def _with_own_names(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """``rms_norm_eps`` is another name of ``norm_eps``."""
    eps = raw.get("rms_norm_eps")
    if eps is None:
        return raw
    if raw.get("norm_eps") not in (None, eps):
        raise Fields(raw).fail("rms_norm_eps", eps, "what norm_eps says, or no such key")
    return {**raw, "norm_eps": eps}


def _layer_types(fields: Fields, layers: int) -> tuple[str, ...]:
    kinds = fields.raw.get("layer_types")
    if kinds is None and fields.raw.get("full_attn_idxs") is not None:
        raise ConfigError(
            f"{fields.place}: full_attn_idxs does not say which layers are sliding; state every layer in layer_types"
        )
    if kinds is None:
        kinds = [
            FULL_ATTENTION if i % 4 == 2 else SLIDING_ATTENTION if i and i % 4 == 0 else CONV for i in range(layers)
        ]
    return check_layer_types(fields, kinds, layers, KINDS)


def _sliding_window(fields: Fields) -> int:
    if fields.raw.get("sliding_window") is None:
        raise ConfigError(
            f"{fields.place}: sliding_window is missing, but layer_types has {SLIDING_ATTENTION}; state how many "
            "positions such a layer sees"
        )
    return fields.integer("sliding_window", None)


def _ropes(fields: Fields, kinds: tuple[str, ...]) -> dict[str, Rope]:
    """RoPE by kind of layer, from ``rope_parameters``; transformers' own where there is no such key."""
    parameters = fields.raw.get("rope_parameters")
    if parameters is None:
        found = dict(_ROPES)
    elif not isinstance(parameters, Mapping) or set(parameters) - set(_ROPES):
        raise fields.fail("rope_parameters", parameters, f"an object with {' and '.join(_ROPES)} alone")
    else:
        found = {kind: _rope(fields, kind, parameters.get(kind), kind in kinds) for kind in _ROPES}
    full = found[FULL_ATTENTION]
    # At the top level they would be of all kinds at once.
    for key, only in {"rope_theta": full.theta, "partial_rotary_factor": full.share}.items():
        value = fields.raw.get(key)
        if value is not None and value != only:
            raise fields.fail(key, value, f"no such key beside rope_parameters, where {FULL_ATTENTION} has {only:g}")
    return found


def _rope(fields: Fields, kind: str, parameters: object, needed: bool) -> Rope:
    if parameters is None and not needed:
        return _ROPES[kind]
    if not isinstance(parameters, Mapping):
        raise fields.fail(f"rope_parameters[{kind}]", parameters, "an object, as layer_types has such layers")
    inner = Fields(parameters, f"{fields.place}: rope_parameters: {kind}")
    label = parameters.get("rope_type", parameters.get("type", "default"))
    if label not in ("default", PROPORTIONAL):
        raise inner.fail("rope_type", label, f'"default" or "{PROPORTIONAL}"')
    share = inner.number("partial_rotary_factor", 1.0)
    if share > 1.0:
        raise inner.fail("partial_rotary_factor", share, "a number up to 1")
    if inner.number("factor", 1.0) != 1.0:
        raise inner.fail("factor", parameters["factor"], "1.0, or no such key")
    if idle := [key for key in parameters if key not in _ROPE_KEYS]:
        logger.warning("%s: %s has no effect and is left out", inner.place, listed(idle))
    return Rope(theta=inner.number("rope_theta", 1_000_000.0), share=share)


def reference_config(raw: Mapping[str, Any]) -> ReferenceConfig | None:
    """config.json with ``rope_type: "proportional"`` wherever a share of a head turns."""
    parameters = raw.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        return None  # transformers' own default has that label
    changed = {kind: _relabelled(inner) for kind, inner in parameters.items()}
    if changed == parameters:
        return None
    kinds = [kind for kind in changed if changed[kind] != parameters[kind]]
    return ReferenceConfig(
        raw={**raw, "rope_parameters": changed},
        note=f'transformers was given rope_type "{PROPORTIONAL}" for {listed(kinds)}, as config.json\'s label would '
        "make it turn whole heads",
    )


def _relabelled(parameters: object) -> object:
    if isinstance(parameters, Mapping) and parameters.get("partial_rotary_factor") not in (None, 1.0):
        return {**{key: value for key, value in parameters.items() if key != "type"}, "rope_type": PROPORTIONAL}
    return parameters


def tensors(config: ModelConfig) -> dict[str, ModelTensor]:
    """Every tensor of a published checkpoint by its name."""
    sandwich = ("post_operator_norm", "post_ffn_norm") if config.use_sandwich_norm else ()
    blocks = (tensor for layer in range(config.num_hidden_layers) for tensor in mlp(config, layer))
    return by_name((*backbone(config, ("operator_norm", "ffn_norm", *sandwich), _attention), *blocks))


def _attention(config: ModelConfig, layer: int) -> Iterator[ModelTensor]:
    width, head_dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    q_width, kv_width = heads * head_dim, config.num_key_value_heads * head_dim
    prefix = f"{block_prefix(layer)}self_attn."
    shapes = {"q_proj": (q_width, width), "k_proj": (kv_width, width), "v_proj": (kv_width, width)}
    shapes["o_proj"] = (width, q_width)
    for matrix, shape in shapes.items():
        yield linear(prefix, matrix, shape, Part.ATTENTION, layer)
        if config.attention_bias:
            yield ModelTensor(
                name=f"{prefix}{matrix}.bias", shape=shape[:1], kind=TensorClass.SMALL, part=Part.ATTENTION, layer=layer
            )
    if config.use_attention_gate:
        gate = linear(prefix, "gate_proj", (heads, width), Part.ATTENTION, layer)
        yield replace(gate, other_names=(f"{prefix}g_proj.weight",))
    for name in ("q_norm", "k_norm"):
        yield norm(f"{prefix}{name}.weight", head_dim, layer)


def fused_tensors(config: ModelConfig) -> dict[str, FusedTensor]:
    """No tensor of this family is ever stored fused."""
    return {}
