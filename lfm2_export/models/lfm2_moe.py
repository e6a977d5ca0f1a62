"""The mixture-of-experts family's eager model (``model_type: lfm2_moe``).

Routing: sigmoid scores; a bias that only selects; the top k; weights from the unbiased scores, normalized by their
sum + 1e-6 and scaled. Source: transformers' ``modeling_lfm2_moe.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_export.config import ModelConfig
from lfm2_export.models.decoder import MLP, DecoderForCausalLM, DecoderModel, Recorder

ROUTING_EPS = 1e-6  # in the denominator of the routing weights; runtimes that leave it out must be corrected for it


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
            y = F.linear(self.inner(expert, x_MD[token]), self.down_proj[expert]) * weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def inner(self, expert: int, x_MD: Tensor) -> Tensor:
        """What one expert's last matrix is given, [M, I]."""
        gate, up = F.linear(x_MD, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.silu(gate) * up


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
