"""The third generation's eager model (``model_type: lfm3``).

Beyond LFM2: norms on what the operator and the feed-forward return, before it joins the residual stream; a gate for
each head; sliding layers; RoPE of a kind of its own for each kind of attention layer. Source: transformers'
``modeling_lfm3.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfm2_export.config import ModelConfig
from lfm2_export.models.decoder import (
    MLP,
    Cache,
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    GroupedQueryAttention,
    Recorder,
    RMSNorm,
    SequenceLayout,
)


class Lfm3Attention(nn.Module):
    """``Attention`` under the names of this family, with a sigmoid gate on what each head returns."""

    def __init__(self, config: ModelConfig, kind: str):
        super().__init__()
        self.head_dim, bias = config.head_dim, config.attention_bias
        q_width, kv_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps)
        gated = config.use_attention_gate
        self.gate_proj = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False) if gated else None
        self.core = GroupedQueryAttention(config, kind)

    def forward(
        self, x_BTD: Tensor, past_key: Tensor, past_value: Tensor, layout: SequenceLayout, want_weights: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q = self._normed(self.q_norm, self.q_proj(x_BTD))
        k = self._normed(self.k_norm, self.k_proj(x_BTD))
        y, key, value, weights = self.core(q, k, self.v_proj(x_BTD), past_key, past_value, layout, want_weights)
        if self.gate_proj is not None:
            gate_BTN = torch.sigmoid(self.gate_proj(x_BTD))
            y = (y.unflatten(-1, (-1, self.head_dim)) * gate_BTN[..., None]).flatten(-2)
        return self.o_proj(y), key, value, weights

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)


class Lfm3DecoderLayer(DecoderLayer):
    """A block whose operator and feed-forward are normed behind as well as before."""

    def __init__(self, config: ModelConfig, layer: int, feed_forward: nn.Module):
        super().__init__(config, layer, feed_forward)
        has_norms, width = config.use_sandwich_norm, config.hidden_size
        self.post_operator_norm = RMSNorm(width, config.norm_eps) if has_norms else nn.Identity()
        self.post_ffn_norm = RMSNorm(width, config.norm_eps) if has_norms else nn.Identity()

    @staticmethod
    def make_attention(config: ModelConfig, layer: int) -> nn.Module:
        return Lfm3Attention(config, config.layer_types[layer])

    def forward(
        self,
        stream_BTD: Tensor,
        delta_BTD: Tensor | None,
        past: Cache,
        present: Cache,
        layout: SequenceLayout,
        recorder: Recorder,
    ) -> tuple[Tensor, Tensor]:
        normed, stream_BTD = self.operator_norm(stream_BTD, delta_BTD)
        delta_BTD = self.post_operator_norm(self._operator(normed, past, present, layout, recorder))
        normed, stream_BTD = self.ffn_norm(stream_BTD, delta_BTD)
        return stream_BTD, self.post_ffn_norm(self.feed_forward(normed, recorder))


class Lfm3Model(DecoderModel):
    """The decoder without a head."""

    layer_class = Lfm3DecoderLayer

    @staticmethod
    def make_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
        return MLP(config.hidden_size, config.intermediate_size)


class Lfm3ForCausalLM(DecoderForCausalLM):
    """The decoder with its language model head."""

    backbone = Lfm3Model
