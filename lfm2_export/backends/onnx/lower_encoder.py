"""Replaces an encoder's leaf modules by ones that emit ONNX Runtime's operators; the rest is as in ``lower.py``.

In: an eager encoder with fake parameters and a weight plan. Out: the same, in place. The convolution is the decoders'
causal one on a text that is moved by the tokens that it sees ahead; attention is MultiHeadAttention, whose kernels do
not know shared key/value heads: those are repeated before it.

Padding on the left or the right of a row is right inside the graph; between a row's tokens it would be seen by the
convolutions as zeros.

Shape suffixes as in ``models/lfm2_bidirectional.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lfm2_export.backends.onnx import ops
from lfm2_export.backends.onnx.lower import MASKED, Lowering, StoredModule, fake_parameter
from lfm2_export.backends.onnx.plan import ROPE_TABLES
from lfm2_export.backends.weights.plan import StoredWeight
from lfm2_export.config import FULL_ATTENTION, ModelConfig
from lfm2_export.models import lfm2_bidirectional as eager


@dataclass(frozen=True, kw_only=True)
class OnnxEncoderLayout:
    """What the lowered layers need to know of positions and padding; the graph computes it once a call.

    ``rope``: cos and sin [max_position_embeddings, H/2], and ``position_ids`` int64 [B, T]; None without an attention
    layer. ``attention_bias`` [B, 1, T, T]; ``present`` [B, T, 1], 1 where there is a token.
    """

    rope: tuple[Tensor, Tensor, Tensor] | None
    attention_bias: Tensor
    present: Tensor


class OnnxEncoderLayoutBuilder(nn.Module):
    """Reads the mask by arithmetic alone: 0 padding, 1 attended, 2 there but attended to by none."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.has_rope = FULL_ATTENTION in config.ropes
        table = (config.max_position_embeddings, config.head_dim // 2)
        for attribute in ROPE_TABLES[FULL_ATTENTION] if self.has_rope else ():
            self.register_parameter(attribute, nn.Parameter(torch.empty(table, dtype=dtype), requires_grad=False))

    def forward(self, embeds_BTD: Tensor, mask_BT: Tensor) -> OnnxEncoderLayout:
        tokens = mask_BT.shape[1]
        present_BT = mask_BT.clamp(max=1)
        positions_BT = (present_BT.cumsum(-1) - 1).clamp(min=0)
        hidden_BT = 1 - (mask_BT == 1).long()
        bias_BT = hidden_BT.to(self.dtype) * MASKED[self.dtype]
        return OnnxEncoderLayout(
            rope=self._rope(positions_BT),
            attention_bias=bias_BT[:, None, None, :].expand(-1, 1, tokens, tokens),
            present=present_BT[..., None].to(self.dtype),
        )

    def _rope(self, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        if not self.has_rope:
            return None
        cos, sin = (self.get_parameter(attribute) for attribute in ROPE_TABLES[FULL_ATTENTION])
        return cos, sin, positions_BT


class OnnxCentredConv(StoredModule):
    """CausalConvWithState on rows that ``behind`` zeros follow, without the first ``behind`` of what it returns."""

    def __init__(self, weight: StoredWeight, bias: StoredWeight | None):
        super().__init__(weight)
        self.bias = None if bias is None else fake_parameter(bias, "weight")
        width = weight.shape[-1]
        self.behind = width - 1 - width // 2

    def forward(self, x_BTD: Tensor, layout: OnnxEncoderLayout) -> Tensor:
        x_BTD = x_BTD * layout.present
        if self.behind:
            zeros = torch.zeros(1, dtype=x_BTD.dtype).expand(x_BTD.shape[0], self.behind, x_BTD.shape[2])
            x_BTD = torch.cat((x_BTD, zeros), dim=1)
        return ops.causal_conv(x_BTD, self.weight, self.bias, None)[:, self.behind :]


class OnnxBidirectionalAttention(nn.Module):
    """RotaryEmbedding on queries and keys, then MultiHeadAttention."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: OnnxEncoderLayout) -> Tensor:
        assert layout.rope is not None
        q, k = ops.rotary_embedding(q, *layout.rope), ops.rotary_embedding(k, *layout.rope)
        return ops.multi_head_attention(
            q, self._repeated(k), self._repeated(v), attention_bias=layout.attention_bias, num_heads=self.heads
        )

    def _repeated(self, x: Tensor) -> Tensor:
        """A key/value head for each query head: [B, T, K*H] to [B, T, N*H]."""
        if self.groups == 1:
            return x
        heads = x.unflatten(-1, (-1, 1, self.head_dim))
        return torch.cat([heads] * self.groups, dim=3).flatten(2)


class EncoderLowering(Lowering):
    """One way to lower every kind of leaf module of an encoder, for one plan."""

    def _leaves(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        kinds = (eager.EncoderLayoutBuilder, eager.CentredConv, eager.BidirectionalAttention)
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                yield name, module
        yield from super()._leaves(model)

    def _lowered(self, name: str, module: nn.Module) -> nn.Module:
        match module:
            case eager.EncoderLayoutBuilder():
                return OnnxEncoderLayoutBuilder(self.config, getattr(torch, self.plan.activation_dtype))
            case eager.CentredConv():
                return OnnxCentredConv(self.plan[f"{name}.weight"], self.plan.get(f"{name}.bias"))
            case eager.BidirectionalAttention():
                return OnnxBidirectionalAttention(self.config)
        return super()._lowered(name, module)
