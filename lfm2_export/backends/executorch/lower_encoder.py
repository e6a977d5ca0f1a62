"""Replaces an encoder's leaf modules by ones that ExecuTorch's operators and XNNPACK take; the rest is as in
``lower.py``.

In: an eager encoder on the meta device and a program's weights. Out: the same, in place. A call has one row, whose
slots are its positions: RoPE sees differences alone, so that padding on the left changes nothing.

Shape suffixes as in ``models/lfm2_bidirectional.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_export.backends.executorch import ops
from lfm2_export.backends.executorch.lower import FAR_BELOW, ExecutorchLinear, Lowering, RotatedHeads
from lfm2_export.backends.executorch.weights import CONV
from lfm2_export.config import FULL_ATTENTION, ModelConfig
from lfm2_export.models import lfm2_bidirectional as eager
from lfm2_export.models.layers import rope_angles


@dataclass(frozen=True, kw_only=True)
class ExecutorchEncoderLayout:
    """``rope``: cos and sin [1, T, 1, H], None without an attention layer; ``hidden`` float32 [T, T]: added to scores;
    ``present`` [1, T, 1], 1 where there is a token."""

    rope: tuple[Tensor, Tensor] | None
    hidden: Tensor
    present: Tensor


class ExecutorchEncoderLayoutBuilder(nn.Module):
    """Cuts the call's rows out of tables for every position of the context."""

    def __init__(self, config: ModelConfig, capacity: int):
        super().__init__()
        rope = config.ropes.get(FULL_ATTENTION)
        self.has_rope = rope is not None
        if rope is not None:
            angles = rope_angles(torch.arange(capacity), config.head_dim, rope).repeat(1, 2)
            self.cos, self.sin = nn.Buffer(angles.cos()), nn.Buffer(angles.sin())

    def forward(self, embeds_BTD: Tensor, mask_BT: Tensor) -> ExecutorchEncoderLayout:
        tokens = embeds_BTD.shape[1]
        hidden_BT = (mask_BT != 1).float() * FAR_BELOW
        return ExecutorchEncoderLayout(
            rope=self._rope(tokens) if self.has_rope else None,
            hidden=hidden_BT.expand(tokens, tokens),
            present=mask_BT.clamp(max=1).float()[..., None],
        )

    def _rope(self, tokens: int) -> tuple[Tensor, Tensor]:
        cos, sin = (table.narrow(0, 0, tokens)[None, :, None] for table in (self.cos, self.sin))
        return cos, sin


class ExecutorchCentredShortConv(nn.Module):
    """``in_proj`` as three layers, as in ``ExecutorchShortConv``; what an even width returns too much is cut off."""

    def __init__(self, parts: list[ExecutorchLinear], kernel: Tensor, bias: Tensor | None, out_proj: ExecutorchLinear):
        super().__init__()
        self.in_proj, self.out_proj = nn.ModuleList(parts), out_proj
        self.kernel, self.bias = nn.Buffer(kernel), None if bias is None else nn.Buffer(bias)

    def forward(self, x_BTD: Tensor, layout: ExecutorchEncoderLayout) -> Tensor:
        b_BTD, c_BTD, x_BTD = (part(x_BTD) for part in self.in_proj)
        width, tokens = self.kernel.shape[-1], x_BTD.shape[1]
        x_BDT = (b_BTD * x_BTD * layout.present).mT
        y_BDT = F.conv1d(x_BDT, self.kernel, self.bias, padding=width // 2, groups=x_BDT.shape[1])
        if width % 2 == 0:
            y_BDT = y_BDT[..., :tokens]
        out: Tensor = self.out_proj(c_BTD * y_BDT.mT)
        return out


class ExecutorchBidirectionalAttention(RotatedHeads):
    """RoPE, then llama::custom_sdpa with a mask in place of causality."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: ExecutorchEncoderLayout) -> Tensor:
        assert layout.rope is not None
        q_BTNH, k_BTKH = (self.rotate(self.heads(x), *layout.rope) for x in (q, k))
        return ops.masked_attention(q_BTNH, k_BTKH, self.heads(v), layout.hidden).flatten(2)


class EncoderLowering(Lowering):
    """One way to lower every kind of leaf module of an encoder, with the weights of one program."""

    leaves: ClassVar[tuple[type[nn.Module], ...]] = (
        eager.EncoderLayoutBuilder,
        eager.CentredShortConv,
        eager.BidirectionalAttention,
        *Lowering.leaves,
    )

    def _lowered(self, name: str, module: nn.Module) -> nn.Module:
        match module:
            case eager.EncoderLayoutBuilder():
                return ExecutorchEncoderLayoutBuilder(self.config, self.capacity)
            case eager.CentredShortConv():
                kernel, bias = self.weights.numbers(f"{name}.conv.weight", CONV), self._optional(f"{name}.conv.bias")
                return ExecutorchCentredShortConv(self._in_proj(name), kernel, bias, self._linear(f"{name}.out_proj"))
            case eager.BidirectionalAttention():
                return ExecutorchBidirectionalAttention(self.config)
        return super()._lowered(name, module)
