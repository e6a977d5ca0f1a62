"""The layers that the LFM families are made of, as plain PyTorch modules without state.

In: activations, the layer's state from the last call, and the ``SequenceLayout`` of this call. Out: activations and the
new state. Backends lower a model by replacing these leaf modules (``SequenceLayoutBuilder``, ``RMSNorm``,
``ResidualRMSNorm``, ``CausalConv``, ``GroupedQueryAttention``) by ones with the same signature.

Shape suffixes: B batch, T tokens of this call, P past positions, S = P + T, D hidden_size, L conv_L_cache,
N heads, K key/value heads, H head_dim.

The attention mask may hold zeros anywhere (left, right or in the middle): positions, convolutions and attention see
each row's attended tokens as if they stood alone. Source of the architecture: transformers' ``modeling_lfm2.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_export.config import FULL_ATTENTION, ModelConfig, Rope


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """How to move each row's attended tokens to the front and back, for a convolution that must not see gaps.

    ``order`` [B, T]: source index per compact slot; ``rank`` [B, T]: slot of each token; ``count`` [B]: attended
    tokens.
    """

    order: Tensor
    rank: Tensor
    count: Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """What the attention layers of one kind need: ``cos``, ``sin`` [B or 1, T, H]; ``visible`` bool [B or 1, 1, T, S]
    (None: plain causal from position 0)."""

    cos: Tensor
    sin: Tensor
    visible: Tensor | None


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """What the layers need to know of positions and padding; built once a call.

    ``attention`` by the kind of layer; ``compaction`` None where every token of the call is attended.
    """

    attention: Mapping[str, AttentionLayout]
    compaction: Compaction | None


class Recorder:
    """Collects what a caller asked to see of a forward pass; layers append to the lists that are there."""

    def __init__(self, *, hidden_states: bool, attentions: bool, router_logits: bool):
        self.hidden_states: list[Tensor] | None = [] if hidden_states else None
        self.attentions: list[Tensor] | None = [] if attentions else None
        self.router_logits: list[Tensor] | None = [] if router_logits else None

    def collected(self) -> dict[str, tuple[Tensor, ...] | None]:
        return {name: None if found is None else tuple(found) for name, found in vars(self).items()}


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, computed in fp32 and scaled in the input's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class ResidualRMSNorm(RMSNorm):
    """Adds what the previous block computed to the residual stream and norms the sum: returns (normed, sum)."""

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = x if delta is None else delta + x
        return super().forward(total), total


class SequenceLayoutBuilder(nn.Module):
    """Builds the ``SequenceLayout`` of a call from the mask, optional positions and the length of the past."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.kinds = {kind: (rope, config.window(kind)) for kind, rope in config.ropes.items()}

    def forward(
        self, embeds_BTD: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past_length: int
    ) -> SequenceLayout:
        tokens, device = embeds_BTD.shape[1], embeds_BTD.device
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        if position_ids is None:
            position_ids = _positions(mask, past_length, tokens, device)
        attention = {}
        for kind, (rope, window) in self.kinds.items():
            cos, sin = self._rope(position_ids, rope, embeds_BTD.dtype)
            visible = _visible(mask, past_length, tokens, device, window)
            attention[kind] = AttentionLayout(cos=cos, sin=sin, visible=visible)
        return SequenceLayout(attention=attention, compaction=None if mask is None else _compaction(mask[:, -tokens:]))

    def _rope(self, position_ids: Tensor, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Frequencies stay fp32 whatever the model's dtype: that is why they are no buffer, which .to() would round.
        angles = rope_angles(position_ids, self.head_dim, rope).repeat(1, 1, 2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_angles(positions: Tensor, head_dim: int, rope: Rope) -> Tensor:
    """What each pair of a head's values is turned by: fp32 [..., H/2] for positions [...]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float, device=positions.device) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    frequencies[rope.turning_pairs(head_dim) :] = 0.0
    return positions[..., None].float() * frequencies


def rope_tables(config: ModelConfig, kind: str) -> tuple[Tensor, Tensor]:
    """cos and sin of every position that the model knows, for layers of a kind: fp32 [max_position_embeddings, H/2]."""
    angles = rope_angles(torch.arange(config.max_position_embeddings), config.head_dim, config.ropes[kind])
    return angles.cos(), angles.sin()


def _positions(mask: Tensor | None, past_length: int, tokens: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.arange(past_length, past_length + tokens, device=device)[None]
    return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens:]


def _visible(
    mask: Tensor | None, past_length: int, tokens: int, device: torch.device, window: int | None
) -> Tensor | None:
    """Which positions each new token attends to, bool [B or 1, 1, T, S]; None where that is plain causal.

    ``window``: how many attended positions, the token's own included, each of them sees; None: all.
    """
    total = past_length + tokens
    if window is not None and total <= window:
        window = None
    if mask is None and window is None:
        return None if past_length == 0 else _causal(past_length, tokens, device)
    seen = _causal(past_length, tokens, device)
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    if window is not None:
        rank_BS = torch.arange(total, device=device)[None] if mask is None else mask.long().cumsum(-1)
        seen = seen & (rank_BS[:, -tokens:, None] - rank_BS[:, None, :] < window)[:, None]
    # A padding query sees itself, so that its (unused) softmax is not over nothing.
    itself = torch.eye(tokens, total, dtype=torch.bool, device=device).roll(past_length, 1)
    return seen | itself


def _causal(past_length: int, tokens: int, device: torch.device) -> Tensor:
    total = torch.ones(tokens, past_length + tokens, dtype=torch.bool, device=device)
    return total.tril(diagonal=past_length)[None, None]


def _compaction(mask_BT: Tensor) -> Compaction | None:
    if bool(mask_BT.all()):
        return None
    order = torch.argsort((~mask_BT).long(), dim=-1, stable=True)
    rank = (mask_BT.long().cumsum(-1) - 1).clamp_min(0)
    return Compaction(order=order, rank=rank, count=mask_BT.sum(-1))


def take_rows(x_BTD: Tensor, index_BT: Tensor) -> Tensor:
    """``x[b, index[b, t]]`` for every row: [B, T', D]."""
    return x_BTD.gather(1, index_BT[..., None].expand(-1, -1, x_BTD.shape[-1]))


class CausalConv(nn.Module):
    """Depthwise causal convolution over the state [B, L-1, D] and this call's inputs.

    The new state is each row's last L-1 attended inputs.
    """

    def __init__(self, channels: int, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.width = width

    def forward(self, x_BTD: Tensor, state: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        packing = layout.compaction
        if packing is not None:
            x_BTD = take_rows(x_BTD, packing.order)
        window = torch.cat((state, x_BTD), dim=1)
        y_BTD = F.conv1d(window.mT, self.weight, self.bias, groups=x_BTD.shape[-1]).mT
        if packing is None:
            return y_BTD, window[:, window.shape[1] - self.width + 1 :]
        steps = torch.arange(self.width - 1, device=x_BTD.device)
        return take_rows(y_BTD, packing.rank), take_rows(window, packing.count[:, None] + steps)


class ShortConv(nn.Module):
    """LFM2's gated short convolution: out_proj(C * conv(B * x)) with B, C, x from one projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, bias = config.hidden_size, config.conv_bias
        self.in_proj = nn.Linear(width, 3 * width, bias=bias)
        self.conv = CausalConv(width, config.conv_L_cache, bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x_BTD: Tensor, state: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        b_BTD, c_BTD, x_BTD = self.in_proj(x_BTD).chunk(3, dim=-1)
        y_BTD, state = self.conv(b_BTD * x_BTD, state, layout)
        return self.out_proj(c_BTD * y_BTD), state


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on halves (not interleaved); cos and sin broadcast over the heads."""
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos + torch.cat((-second, first), dim=-1) * sin


class GroupedQueryAttention(nn.Module):
    """RoPE, the cache's update and causal attention with shared key/value heads.

    In: q [B, T, N*H], k and v [B, T, K*H] (q and k already normed), past key and value [B, K, P, H].
    Out: [B, T, N*H], the new key and value [B, K, S, H], and the weights [B, N, T, S] if asked for.
    """

    def __init__(self, config: ModelConfig, kind: str = FULL_ATTENTION):
        super().__init__()
        self.kind = kind
        self.num_heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        layout: SequenceLayout,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        own = layout.attention[self.kind]
        cos, sin = own.cos[:, None], own.sin[:, None]
        q_BNTH = rotate(self._heads(q), cos, sin)
        key = torch.cat((past_key, rotate(self._heads(k), cos, sin)), dim=2)
        value = torch.cat((past_value, self._heads(v)), dim=2)
        if want_weights:
            y_BNTH, weights = self._explicit(q_BNTH, key, value, own.visible)
        else:
            weights = None
            y_BNTH = F.scaled_dot_product_attention(
                q_BNTH, key, value, attn_mask=own.visible, is_causal=own.visible is None, enable_gqa=True
            )
        return y_BNTH.transpose(1, 2).flatten(2), key, value, weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _explicit(self, q: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        groups = self.num_heads // self.kv_heads
        scores = q @ key.repeat_interleave(groups, dim=1).mT * self.head_dim**-0.5
        if visible is None:
            visible = _causal(key.shape[2] - q.shape[2], q.shape[2], q.device)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
        return weights @ value.repeat_interleave(groups, dim=1), weights


class HeadProjections(nn.Module):
    """The projections and the per-head q/k norms around an attention, under LFM2's names."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_width, kv_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.out_proj = nn.Linear(q_width, config.hidden_size, bias=False)
        self.q_layernorm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_layernorm = RMSNorm(self.head_dim, config.norm_eps)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normed, and values: [B, T, heads * head_dim] each."""
        q = self._normed(self.q_layernorm, self.q_proj(x_BTD))
        k = self._normed(self.k_layernorm, self.k_proj(x_BTD))
        return q, k, self.v_proj(x_BTD)

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)


class Attention(HeadProjections):
    """``GroupedQueryAttention`` with its projections."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.core = GroupedQueryAttention(config)

    def forward(
        self, x_BTD: Tensor, past_key: Tensor, past_value: Tensor, layout: SequenceLayout, want_weights: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        y, key, value, weights = self.core(*self.project(x_BTD), past_key, past_value, layout, want_weights)
        return self.out_proj(y), key, value, weights


class MLP(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, recorder: Recorder) -> Tensor:
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))
