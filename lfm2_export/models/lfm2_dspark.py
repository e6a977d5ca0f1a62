"""The eager DSpark drafter: a block of proposals from the target's residual streams, all rows at once.

In: the streams of the tokens that the target has processed, and the newest token. Out: ``block_size`` proposals. Every
layer attends in both directions within the block, and to keys and values that it makes, with its own projections, of
the streams; those stay in a cache, the block's own are dropped. The rows know each other by attention alone, so a
proposal's logits get a term by the one before it (a chain of rank ``markov_rank``), and a score of how likely it is
to be right.

Shape suffixes: B batch, C streams of this call, T rows of the block, P positions of the cache, S = P + C + T, D
hidden_size, N heads, K key/value heads, G = N / K, H head_dim, V vocabulary, R markov_rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_export.config import ModelConfig
from lfm2_export.models.layers import ResidualRMSNorm, RMSNorm

# Added to the scores of positions that do not count; exp() of it is 0.
MASKED = -1e9


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """``cos``, ``sin`` [B or 1, C + T, H/2]; ``bias`` [B or 1, 1, T or 1, S], added to the scores."""

    cos: Tensor
    sin: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """``tokens`` int64 [T]; ``confidence`` [T] from 0 to 1, None without such a head."""

    tokens: Tensor
    confidence: Tensor | None


# Keys and values of a layer, [B, K, positions, H] each.
KeysValues = tuple[Tensor, Tensor]


def turned(x_BNTH: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """RoPE on pairs (2i, 2i+1), or on halves; cos and sin [B or 1, 1, T, H/2]."""
    if not interleaved:
        first, second = x_BNTH.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    pairs = x_BNTH.unflatten(-1, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


class BlockAttention(nn.Module):
    """Attention of the block's rows to the cache, to this call's streams and to each other."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.drafter is not None
        width, self.head_dim = config.hidden_size, config.head_dim
        self.kv_heads, self.interleaved = config.num_key_value_heads, config.drafter.interleaved_rope
        q_width, kv_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(width, q_width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, width, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.norm_eps) for _ in range(2))

    def forward(
        self, block_BTD: Tensor, context_BCD: Tensor, past: KeysValues, layout: BlockLayout
    ) -> tuple[Tensor, KeysValues]:
        """The block's rows [B, T, D], and keys and values [B, K, C + T, H] of the streams and of the block."""
        tokens = block_BTD.shape[1]
        new_BID = torch.cat((context_BCD, block_BTD), dim=1)
        cos, sin = layout.cos[:, None], layout.sin[:, None]
        key = self._turned(self.k_norm(self._heads(self.k_proj(new_BID))).transpose(1, 2), cos, sin)
        value = self._heads(self.v_proj(new_BID)).transpose(1, 2)
        query = self.q_norm(self._heads(self.q_proj(block_BTD))).transpose(1, 2)
        query = self._turned(query, cos[:, :, -tokens:], sin[:, :, -tokens:])
        y_BNTH = self._attended(query, past, (key, value), layout.bias)
        return self.o_proj(y_BNTH.transpose(1, 2).flatten(2)), (key, value)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turned(x, cos, sin, interleaved=self.interleaved)

    def _attended(self, q_BNTH: Tensor, past: KeysValues, new: KeysValues, bias: Tensor) -> Tensor:
        """Cache and new positions apart, so that the cache is not copied."""
        rows = q_BNTH.shape[2]
        groups = q_BNTH.shape[1] // self.kv_heads
        q_BKMH = q_BNTH.unflatten(1, (self.kv_heads, groups)).flatten(2, 3) * self.head_dim**-0.5
        scores = torch.cat([q_BKMH @ keys.mT for keys in (past[0], new[0])], dim=-1)
        if bias.shape[2] > 1:
            bias = bias.repeat(1, 1, groups, 1)
        weights = (scores + bias).softmax(-1)
        held = past[0].shape[2]
        y_BKMH = weights[..., :held] @ past[1] + weights[..., held:] @ new[1]
        return y_BKMH.unflatten(2, (groups, rows)).flatten(1, 2)


class GatedMLP(nn.Module):
    """SwiGLU under Qwen3's names."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BlockLayer(nn.Module):
    """Attention and a SwiGLU, each behind a norm on the block's residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = BlockAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = ResidualRMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = ResidualRMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, stream: Tensor, delta: Tensor | None, context: Tensor, past: KeysValues, layout: BlockLayout
    ) -> tuple[Tensor, Tensor, KeysValues]:
        """The stream, what to add to it, and the new keys and values."""
        normed, stream = self.input_layernorm(stream, delta)
        delta, new = self.self_attn(normed, context, past, layout)
        normed, stream = self.post_attention_layernorm(stream, delta)
        return stream, self.mlp(normed), new


class MarkovHead(nn.Module):
    """What a token says of the next one: logits w2 · w1[token]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.drafter is not None
        self.markov_w1 = nn.Embedding(config.vocab_size, config.drafter.markov_rank)
        self.markov_w2 = nn.Linear(config.drafter.markov_rank, config.vocab_size, bias=False)


class Score(nn.Module):
    """A linear layer with one output; no ``nn.Linear``, for it is too small to be stored as one."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(-1) + self.bias


class ConfidenceHead(nn.Module):
    """How likely a proposal is right, as a logit: by its row's hidden state and the token before it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.drafter is not None
        self.proj = Score(config.hidden_size + config.drafter.markov_rank)

    def forward(self, hidden: Tensor, markov: Tensor) -> Tensor:
        return self.proj(torch.cat((hidden, markov), dim=-1))


class _Borrowed(nn.Module):
    """The target's token table."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)


class Lfm2DSparkDraftModel(nn.Module):
    """A drafter with its target's table (``model.embed_tokens``) and head (``lm_head``)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        draft, width = config.drafter, config.hidden_size
        assert draft is not None
        self.config, self.draft = config, draft
        self.fc = nn.Linear(len(draft.target_layers) * width, width, bias=False)
        self.hidden_norm = RMSNorm(width, config.norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = ResidualRMSNorm(width, config.norm_eps)
        self.markov_head = MarkovHead(config)
        if draft.has_confidence:
            self.confidence_head = ConfidenceHead(config)
        self.model = _Borrowed(config)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, streams: Tensor, anchor: Tensor, past: Mapping[int, KeysValues], past_length: Tensor
    ) -> tuple[Proposals, dict[int, KeysValues]]:
        """Proposals of what follows ``anchor``.

        Args:
            streams: [1, C, layers * D], the target's residual streams behind ``target_layers``, side by side, of the
                tokens that are not in the cache yet.
            anchor: int64 [1], the newest token, which the target has not processed.
            past: by layer, of which only the first ``past_length`` positions count.
            past_length: int64 [1].

        Returns:
            The proposals, and of each layer the new keys and values [1, K, C, H], the streams' alone.
        """
        count = streams.shape[1]
        context = self.context(streams)
        layout = self.layout(count, past[0][0].shape[2], past_length)
        hidden, new = self.block(context, self.embedded(anchor), past, layout)
        kept = {layer: (key[:, :, :count], value[:, :, :count]) for layer, (key, value) in new.items()}
        return self.chain(hidden[0], self.lm_head(hidden)[0], anchor), kept

    def context(self, streams: Tensor) -> Tensor:
        """What the layers make keys and values of: [B, C, D]."""
        return self.hidden_norm(self.fc(streams))

    def embedded(self, anchors: Tensor) -> Tensor:
        """The blocks of anchors int64 [M], one behind the other: [1, M * T, D]."""
        masks = torch.ones(self.draft.block_size - 1, dtype=torch.long) * self.draft.mask_token_id
        ids = torch.cat((anchors[:, None], masks.expand(anchors.shape[0], -1)), dim=1)
        return self.model.embed_tokens(ids.flatten()[None])

    def block(
        self, context: Tensor, stream: Tensor, past: Mapping[int, KeysValues], layout: BlockLayout
    ) -> tuple[Tensor, dict[int, KeysValues]]:
        """All layers and the final norm: hidden states [B, T, D] of the block, new keys and values by layer."""
        delta: Tensor | None = None
        new: dict[int, KeysValues] = {}
        for index, layer in enumerate(self.layers):
            stream, delta, new[index] = layer(stream, delta, context, past[index], layout)
        hidden, _ = self.norm(stream, delta)
        return hidden, new

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [..., H/2], of positions [...]."""
        width = self.config.head_dim
        found = positions[..., None].float() / self.config.rope_theta ** (torch.arange(0, width, 2).float() / width)
        return found.cos(), found.sin()

    def layout(self, count: int, capacity: int, past_length: Tensor) -> BlockLayout:
        new = count + self.draft.block_size
        cos, sin = self.angles((past_length + torch.arange(new))[None])
        unused_P = (torch.arange(capacity) >= past_length).to(cos.dtype) * MASKED
        bias_S = torch.cat((unused_P, torch.zeros(new, dtype=cos.dtype)))
        return BlockLayout(cos=cos, sin=sin, bias=bias_S[None, None, None])

    def chain(self, hidden_TD: Tensor, logits_TV: Tensor, anchor: Tensor) -> Proposals:
        """Always the likeliest token, row by row, each by the one before it."""
        head, previous = self.markov_head, anchor
        tokens, scores = [], []
        for row in range(self.draft.block_size):
            markov = head.markov_w1(previous)
            previous = (logits_TV[row : row + 1] + head.markov_w2(markov)).argmax(-1)
            tokens.append(previous)
            if self.draft.has_confidence:
                scores.append(self.confidence_head(hidden_TD[row : row + 1], markov))
        return Proposals(tokens=torch.cat(tokens), confidence=torch.sigmoid(torch.cat(scores)) if scores else None)
