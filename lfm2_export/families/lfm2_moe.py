"""The mixture-of-experts family, ``model_type: lfm2_moe`` (LFM2-8B-A1B and larger): its config and its tensors.

Source: transformers' ``configuration_lfm2_moe.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lfm2_export.config import (
    Defaults,
    Fields,
    ModelConfig,
    check_expert_count,
    check_layer_types,
    common_fields,
    refuse_unsupported,
    rope_theta,
)
from lfm2_export.errors import ConfigError
from lfm2_export.families.tensors import (
    FusedPart,
    FusedTensor,
    ModelTensor,
    Part,
    TensorClass,
    backbone,
    by_name,
    feed_forward_prefix,
    mlp,
    swiglu_shapes,
)

ARCHITECTURES = ("Lfm2MoeForCausalLM", "Lfm2MoeModel")


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A checked ``ModelConfig`` from a checkpoint's ``config.json``.

    Raises:
        ConfigError: a value is missing, out of range, contradicted by another one, or not supported.
    """
    fields = Fields(raw)
    common = common_fields(fields, Defaults(hidden_size=2048))
    layers = common["num_hidden_layers"]
    refuse_unsupported(fields, common)
    if raw.get("layer_types") is None:
        raise ConfigError("config.json: layer_types is missing; lfm2_moe has no default for it, so state every layer")
    experts = fields.integer("num_experts", 32, high=65536)
    num_dense_layers = min(fields.integer("num_dense_layers", 2, low=0), layers)
    check_expert_count(fields, layers=layers - num_dense_layers, experts=experts)
    return ModelConfig(
        model_type="lfm2_moe",
        **common,
        rope_theta=rope_theta(fields, 1_000_000.0),
        intermediate_size=fields.integer("intermediate_size", 7168),
        layer_types=check_layer_types(fields, raw["layer_types"], layers),
        num_dense_layers=num_dense_layers,
        moe_intermediate_size=fields.integer("moe_intermediate_size", 1792),
        num_experts=experts,
        num_experts_per_tok=fields.integer("num_experts_per_tok", 4, high=experts),
        use_expert_bias=fields.boolean("use_expert_bias", True),
        norm_topk_prob=fields.boolean("norm_topk_prob", True),
        routed_scaling_factor=fields.number("routed_scaling_factor", 1.0),
        output_router_logits=fields.boolean("output_router_logits", False),
    )


def expert_prefix(layer: int, expert: int) -> str:
    """How the published names of one expert's three matrices begin."""
    return f"{feed_forward_prefix(layer)}experts.{expert}."


def tensors(config: ModelConfig) -> dict[str, ModelTensor]:
    """Every tensor of a published checkpoint by its name; experts one by one."""
    dense = (tensor for layer in range(config.num_dense_layers) for tensor in mlp(config, layer))
    sparse = (tensor for layer in config.moe_layers for tensor in _sparse_block(config, layer))
    return by_name((*backbone(config), *dense, *sparse))


def _sparse_block(config: ModelConfig, layer: int) -> Iterator[ModelTensor]:
    prefix, experts, width = feed_forward_prefix(layer), config.num_experts, config.hidden_size
    yield ModelTensor(
        name=f"{prefix}gate.weight",
        shape=(experts, width),
        kind=TensorClass.ROUTER,
        part=Part.ROUTERS,
        layer=layer,
    )
    if config.use_expert_bias:
        yield ModelTensor(
            name=f"{prefix}expert_bias",
            shape=(experts,),
            kind=TensorClass.EXPERT_BIAS,
            part=Part.ROUTERS,
            layer=layer,
        )
    for expert in range(experts):
        for matrix, shape in swiglu_shapes(width, config.moe_intermediate_size).items():
            yield ModelTensor(
                name=f"{expert_prefix(layer, expert)}{matrix}.weight",
                shape=shape,
                kind=TensorClass.EXPERTS,
                part=Part.EXPERTS,
                layer=layer,
                expert=expert,
                matrix=matrix,
            )


def fused_tensors(config: ModelConfig) -> dict[str, FusedTensor]:
    """The experts as transformers 5 saves them: ``gate_up_proj`` [E, 2I, D] (w1 above w3), ``down_proj`` [E, D, I]."""
    fused: dict[str, FusedTensor] = {}
    inner, width, experts = config.moe_intermediate_size, config.hidden_size, config.num_experts
    for layer in config.moe_layers:
        gate_up: dict[str, FusedPart] = {}
        down: dict[str, FusedPart] = {}
        for expert in range(experts):
            prefix = expert_prefix(layer, expert)
            gate_up[f"{prefix}w1.weight"] = FusedPart(expert=expert, start=0, stop=inner)
            gate_up[f"{prefix}w3.weight"] = FusedPart(expert=expert, start=inner, stop=2 * inner)
            down[f"{prefix}w2.weight"] = FusedPart(expert=expert, start=0, stop=width)
        name = f"model.layers.{layer}.feed_forward.experts."
        fused[f"{name}gate_up_proj"] = FusedTensor(shape=(experts, 2 * inner, width), parts=gate_up)
        fused[f"{name}down_proj"] = FusedTensor(shape=(experts, width, inner), parts=down)
    return fused


def reference_config(raw: Mapping[str, Any]) -> None:
    """transformers takes these configs as they stand."""
