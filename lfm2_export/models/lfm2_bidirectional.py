"""The encoders' eager model: LFM2's layers with attention in both directions, a centred convolution and no cache.

In: token ids and an attention mask. Out: hidden states, and what the head makes of them. Backends lower it by replacing
its leaf modules (``EncoderLayoutBuilder``, ``CentredConv``, ``BidirectionalAttention`` and those of ``layers.py``) by
ones with the same signatures; the forward passes in this file are written once for all of them.

The mask holds PADDING, ATTENDED or EXPANSION for each position (``heads.py``), anywhere. Positions, convolutions and
attention see each row's tokens as if they stood alone, without the padding between or around them.

Shape suffixes as in ``layers.py``: B batch, T tokens, D hidden_size, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_export.config import FULL_ATTENTION, ModelConfig
from lfm2_export.heads import ATTENDED, PADDING, EncoderHead, Pooling
from lfm2_export.models.layers import (
    MLP,
    Compaction,
    HeadProjections,
    Recorder,
    ResidualRMSNorm,
    rope_angles,
    rotate,
    take_rows,
)
from lfm2_export.models.loading import load_pretrained

# Added to the scores of tokens that are not attended to: finite, so that a row of nothing but padding is, too.
HIDDEN_SCORE = -1e9
_LEAST_LENGTH = 1e-12  # of a vector that is normalized, as torch.nn.functional.normalize has it


@dataclass(frozen=True, kw_only=True)
class EncoderOutput:
    """``last_hidden_state`` [B, T, D] after the final norm; by the head, vectors of length 1: ``sentence_embedding``
    [B, D], ``token_embeddings`` [B, T, projection] (0 for padding), or ``logits`` [B, T, V]. All are float32."""

    last_hidden_state: Tensor
    sentence_embedding: Tensor | None = None
    token_embeddings: Tensor | None = None
    logits: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Those that there are, in the order of ``EncoderHead.outputs``."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}


@dataclass(frozen=True, kw_only=True)
class EncoderLayout:
    """What the layers need to know of positions and padding; built once a call.

    ``cos``, ``sin`` [B, T, H]; ``hidden`` float [B, 1, 1, T]: added to scores; ``compaction``: how the convolutions
    find each row's tokens, None where every position holds one.
    """

    cos: Tensor
    sin: Tensor
    hidden: Tensor
    compaction: Compaction | None


class EncoderLayoutBuilder(nn.Module):
    """Builds the layout of a call from its mask."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.rope = config.head_dim, config.ropes.get(FULL_ATTENTION)

    def forward(self, embeds_BTD: Tensor, mask_BT: Tensor) -> EncoderLayout:
        present_BT = mask_BT != PADDING
        angles = self._angles((present_BT.long().cumsum(-1) - 1).clamp_min(0)).repeat(1, 1, 2)
        hidden = (mask_BT != ATTENDED).to(embeds_BTD.dtype) * max(HIDDEN_SCORE, torch.finfo(embeds_BTD.dtype).min / 2)
        return EncoderLayout(
            cos=angles.cos().to(embeds_BTD.dtype),
            sin=angles.sin().to(embeds_BTD.dtype),
            hidden=hidden[:, None, None, :],
            compaction=None if bool(present_BT.all()) else _compaction(present_BT),
        )

    def _angles(self, positions_BT: Tensor) -> Tensor:
        if self.rope is None:  # without an attention layer
            return positions_BT.new_zeros((*positions_BT.shape, 1), dtype=torch.float)
        return rope_angles(positions_BT, self.head_dim, self.rope)


def _compaction(present_BT: Tensor) -> Compaction:
    return Compaction(
        order=torch.argsort((~present_BT).long(), dim=-1, stable=True),
        rank=(present_BT.long().cumsum(-1) - 1).clamp_min(0),
        count=present_BT.sum(-1),
    )


class CentredConv(nn.Module):
    """Depthwise convolution over each row's tokens, which sees ``width // 2`` tokens before its own and, of an odd
    width, as many behind it; there is nothing but zeros before the first token and behind the last."""

    def __init__(self, channels: int, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.before = width // 2
        self.behind = width - 1 - self.before

    def forward(self, x_BTD: Tensor, layout: EncoderLayout) -> Tensor:
        packing = layout.compaction
        if packing is None:
            return self._convolved(x_BTD)
        places = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        is_token = (places < packing.count[:, None])[..., None]
        compact = torch.where(is_token, take_rows(x_BTD, packing.order), 0.0)
        return take_rows(self._convolved(compact), packing.rank)

    def _convolved(self, x_BTD: Tensor) -> Tensor:
        padded = F.pad(x_BTD.mT, (self.before, self.behind))
        return F.conv1d(padded, self.weight, self.bias, groups=x_BTD.shape[-1]).mT


class CentredShortConv(nn.Module):
    """LFM2's gated short convolution around a ``CentredConv``: out_proj(C * conv(B * x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, bias = config.hidden_size, config.conv_bias
        self.in_proj = nn.Linear(width, 3 * width, bias=bias)
        self.conv = CentredConv(width, config.conv_L_cache, bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x_BTD: Tensor, layout: EncoderLayout) -> Tensor:
        b_BTD, c_BTD, x_BTD = self.in_proj(x_BTD).chunk(3, dim=-1)
        out: Tensor = self.out_proj(c_BTD * self.conv(b_BTD * x_BTD, layout))
        return out


class BidirectionalAttention(nn.Module):
    """RoPE and attention to every attended token, with shared key/value heads.

    In: q [B, T, N*H], k and v [B, T, K*H] (q and k already normed). Out: [B, T, N*H].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: EncoderLayout) -> Tensor:
        cos, sin = layout.cos[:, None], layout.sin[:, None]
        q_BNTH, k_BKTH = rotate(self._heads(q), cos, sin), rotate(self._heads(k), cos, sin)
        y_BNTH = F.scaled_dot_product_attention(
            q_BNTH, k_BKTH, self._heads(v), attn_mask=layout.hidden, enable_gqa=True
        )
        return y_BNTH.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class EncoderAttention(HeadProjections):
    """``BidirectionalAttention`` with its projections."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.core = BidirectionalAttention(config)

    def forward(self, x_BTD: Tensor, layout: EncoderLayout) -> Tensor:
        out: Tensor = self.out_proj(self.core(*self.project(x_BTD), layout))
        return out


class EncoderLayer(nn.Module):
    """One block: a short conv or an attention, then a feed-forward, each behind a norm on the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.is_attention = layer in config.attention_layers
        if self.is_attention:
            self.self_attn = EncoderAttention(config)
        else:
            self.conv = CentredShortConv(config)
        self.feed_forward = MLP(config.hidden_size, config.intermediate_size)
        self.operator_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, stream_BTD: Tensor, delta_BTD: Tensor | None, layout: EncoderLayout, recorder: Recorder
    ) -> tuple[Tensor, Tensor]:
        """Returns the stream and what to add to it."""
        normed, stream_BTD = self.operator_norm(stream_BTD, delta_BTD)
        operator = self.self_attn if self.is_attention else self.conv
        normed, stream_BTD = self.ffn_norm(stream_BTD, operator(normed, layout))
        return stream_BTD, self.feed_forward(normed, recorder)


class EncoderBody(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layout = EncoderLayoutBuilder(config)
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.embedding_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, input_ids: Tensor, mask_BT: Tensor) -> Tensor:
        stream, delta = self.embed_tokens(input_ids), None
        layout = self.layout(stream, mask_BT)
        recorder = Recorder(hidden_states=False, attentions=False, router_logits=False)
        for layer in self.layers:
            stream, delta = layer(stream, delta, layout, recorder)
        hidden: Tensor = self.embedding_norm(stream, delta)[0]
        return hidden


class Projection(nn.Module):
    """ColBERT's Dense, under the names of its file."""

    def __init__(self, config: ModelConfig, head: EncoderHead):
        super().__init__()
        assert head.projection is not None
        self.linear = nn.Linear(config.hidden_size, head.projection, bias=head.projection_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


class Lfm2BidirectionalModel(nn.Module):
    """The encoder with its head: none, a pooling, a projection, or the vocabulary (published as
    ``Lfm2BidirectionalForMaskedLM``)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.encoder is not None
        self.config, self.head = config, config.encoder
        self.model = EncoderBody(config)
        self.dense = None if self.head.projection is None else Projection(config, self.head)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if self.head.masked_lm else None
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.lm_head is not None and self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        offline: bool = False,
    ) -> Self:
        """The model of a checkpoint (directory or Hub id), its weights converted to ``dtype``.

        Raises:
            CheckpointError: it cannot be found or read, is damaged, or is no encoder.
            ConfigError: its config is not supported.
        """
        model = load_pretrained(cls, name_or_path, dtype=dtype, revision=revision, offline=offline)
        assert isinstance(model, cls)
        return model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        """Hidden states and the head's outputs of B rows.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T] of PADDING, ATTENDED and EXPANSION; None where every token is attended.

        Raises:
            ValueError: the mask has another shape than the ids.
        """
        mask_BT = torch.full_like(input_ids, ATTENDED) if attention_mask is None else attention_mask.long()
        if mask_BT.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has the shape {list(mask_BT.shape)}; input_ids have {list(input_ids.shape)}"
            )
        hidden = self.model(input_ids, mask_BT)
        return EncoderOutput(
            last_hidden_state=hidden.float(),
            sentence_embedding=None if self.head.pooling is None else self._pooled(hidden.float(), mask_BT),
            token_embeddings=None if self.dense is None else self._projected(hidden, mask_BT),
            logits=None if self.lm_head is None else self.lm_head(hidden).float(),
        )

    def _pooled(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        if self.head.pooling is Pooling.MEAN:
            attended = mask_BT.clamp(max=1).float()[..., None]
            pooled = (hidden_BTD * attended).sum(1) / attended.sum(1).clamp(min=1.0)
            return normalized(pooled)
        # The first token lies behind the padding on its left.
        padding_B1 = (mask_BT.cumsum(-1) == 0).long().sum(-1, keepdim=True)
        first_B1 = padding_B1.clamp(max=mask_BT.shape[1] - 1)
        return normalized(take_rows(hidden_BTD, first_B1)[:, 0])

    def _projected(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        assert self.dense is not None
        present = mask_BT.clamp(max=1).float()[..., None]
        return normalized(self.dense(hidden_BTD).float()) * present


def normalized(x: Tensor) -> Tensor:
    """Vectors (the last axis) of length 1, in float32."""
    squares = (x * x).sum(-1, keepdim=True)
    return x * torch.rsqrt(squares.clamp(min=_LEAST_LENGTH**2))
