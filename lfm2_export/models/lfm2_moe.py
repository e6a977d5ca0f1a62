"""The mixture-of-experts family, ``model_type: lfm2_moe`` (LFM2-8B-A1B and larger): config, tensor names, eager model.

Routing: sigmoid scores; a bias that only selects; the top k; weights from the unbiased scores, normalized by their
sum + 1e-6 and scaled. Source: transformers' ``modeling_lfm2_moe.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_export.config import Fields, ModelConfig, check_expert_count, check_layer_types, common_fields
from lfm2_export.errors import ConfigError
from lfm2_export.models._common import MLP, DecoderForCausalLM, DecoderModel, Recorder
from lfm2_export.models._names import (
    FusedPart,
    FusedTensor,
    Shapes,
    backbone_shapes,
    mlp_shapes,
    refuse_unsupported,
    swiglu_shapes,
)

ROUTING_EPS = 1e-6  # in the denominator of the routing weights; runtimes that leave it out must be corrected for it


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A checked ``ModelConfig`` from a checkpoint's ``config.json``.

    Raises:
        ConfigError: a value is missing, out of range, contradicted by another one, or not supported.
    """
    fields = Fields(raw)
    common = common_fields(fields, hidden_size=2048)
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
    return f"model.layers.{layer}.feed_forward.experts.{expert}."


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Every tensor of a published checkpoint: name to shape; experts one by one."""
    shapes = backbone_shapes(config)
    for layer in range(config.num_dense_layers):
        shapes |= mlp_shapes(config, layer)
    for layer in config.moe_layers:
        prefix = f"model.layers.{layer}.feed_forward."
        shapes[f"{prefix}gate.weight"] = (config.num_experts, config.hidden_size)
        if config.use_expert_bias:
            shapes[f"{prefix}expert_bias"] = (config.num_experts,)
        for expert in range(config.num_experts):
            shapes |= swiglu_shapes(expert_prefix(layer, expert), config.hidden_size, config.moe_intermediate_size)
    return shapes


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


class Router(nn.Module):
    """Chooses k experts a token: returns logits [M, E], weights [M, k] and indices [M, k] for M = B*T tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.scale = config.routed_scaling_factor

    def forward(self, x_MD: Tensor, expert_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x_MD, self.weight)
        scores = logits.sigmoid()
        ranked = scores if expert_bias is None else scores + expert_bias
        chosen = torch.topk(ranked, self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + ROUTING_EPS)
        return logits, weights * self.scale, chosen


class Experts(nn.Module):
    """All experts of a layer, stacked; only those that were chosen run."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x_MD: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x_MD)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            gate, up = F.linear(x_MD[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[expert]) * weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class SparseMoeBlock(nn.Module):
    """Router and experts in place of an MLP."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config)
        self.expert_bias = nn.Buffer(torch.zeros(config.num_experts)) if config.use_expert_bias else None

    def forward(self, x_BTD: Tensor, recorder: Recorder) -> Tensor:
        x_MD = x_BTD.flatten(0, 1)
        logits, weights, chosen = self.gate(x_MD, self.expert_bias)
        if recorder.router_logits is not None:
            recorder.router_logits.append(logits)
        return self.experts(x_MD, weights, chosen).view_as(x_BTD)


class Lfm2MoeModel(DecoderModel):
    """The mixture-of-experts decoder without a head."""

    @staticmethod
    def make_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
        if layer in config.moe_layers:
            return SparseMoeBlock(config)
        return MLP(config.hidden_size, config.intermediate_size)


class Lfm2MoeForCausalLM(DecoderForCausalLM):
    """The mixture-of-experts decoder with its language model head."""

    backbone = Lfm2MoeModel


ForCausalLM = Lfm2MoeForCausalLM
