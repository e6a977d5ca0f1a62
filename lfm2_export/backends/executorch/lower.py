"""Replaces the leaf modules of an eager model by ones that ExecuTorch's operators and XNNPACK take.

In: an eager model without weights (on the meta device) and the weights of a program. Out: the same model, in place,
with leaf modules of the same signatures that hold the weights as the .pte stores them. The model's own forward passes
(``models/decoder.py``) are not copied: what is traced is what was validated.

Whatever XNNPACK can take is written so that it takes it, because every operator between two delegates costs a copy out
of one and into the other: a mean is a product with a vector, RoPE's turn a product with a small matrix, and B, C and x
of a short conv are three products instead of one that is cut up. Only the attention's cache, the routers and the
experts are left outside.

Shape suffixes as in ``models/layers.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_export.backends.executorch import ops
from lfm2_export.backends.executorch.moe import lowered_experts
from lfm2_export.backends.executorch.weights import CONV, Codes, ProgramWeights
from lfm2_export.config import FULL_ATTENTION, SLIDING_ATTENTION, ModelConfig
from lfm2_export.models import decoder as eager
from lfm2_export.models.layers import rope_angles
from lfm2_export.models.lfm2_moe import SparseMoeBlock


@dataclass(frozen=True, kw_only=True)
class ExecutorchLayout:
    """``start``: position of the call's first token, a symbolic integer; ``ropes``: cos and sin [1, T, 1, H] by the
    kind of layer; ``window`` float32 [T, R + T]: what a token of a sliding layer sees of the R positions that it keeps
    and of this call's, as 0 and FAR_BELOW."""

    start: Any
    ropes: Mapping[str, tuple[Tensor, Tensor]]
    window: Tensor | None


# Added to scores that are not to count; a finite number, as the operator may meet a part of a row that has no other.
FAR_BELOW = -1e9
LONGEST_CALL = 512  # as many as our runner gives a program at once


def longest_call(config: ModelConfig, max_context: int) -> int:
    """The most tokens of a call. With sliding layers it has a mask of [tokens, window + tokens], for which the memory
    would grow with the square of the context; the stock runners cut a prompt by ``get_max_seq_len``."""
    return max_context if SLIDING_ATTENTION not in config.ropes else min(max_context, LONGEST_CALL)


class ExecutorchLayoutBuilder(nn.Module):
    """Cuts the call's rows out of tables for every position of the context."""

    def __init__(self, config: ModelConfig, capacity: int):
        super().__init__()
        self.capacity = capacity
        window = config.window(SLIDING_ATTENTION) if SLIDING_ATTENTION in config.ropes else None
        self.kept = None if window is None else max(1, window - 1)
        self.reach = window
        if self.kept is not None:
            self.register_buffer("places", torch.arange(self.kept + longest_call(config, capacity)))
        self.kinds = tuple(config.ropes)
        for kind, rope in config.ropes.items():
            angles = rope_angles(torch.arange(capacity), config.head_dim, rope).repeat(1, 2)
            for name, table in zip(_tables_of(kind), (angles.cos(), angles.sin()), strict=True):
                self.register_buffer(name, table)

    def forward(
        self, embeds_BTD: Tensor, attention_mask: None, position_ids: Tensor, past_length: int
    ) -> ExecutorchLayout:
        """``position_ids`` int64 [1]: the position of the first token."""
        start: Any = position_ids[0].item()
        tokens = embeds_BTD.shape[1]
        torch._check(start >= 0)
        torch._check(start < self.capacity)
        torch._check(start + tokens <= self.capacity)
        ropes = {}
        for kind in self.kinds:
            cos, sin = (self.get_buffer(name).narrow(0, start, tokens)[None, :, None] for name in _tables_of(kind))
            ropes[kind] = (cos, sin)
        return ExecutorchLayout(start=start, ropes=ropes, window=self._window(tokens, position_ids))

    def _window(self, tokens: int, position_ids: Tensor) -> Tensor | None:
        """Key j of R + T is that of position ``start - R + j``, token i that of ``start + i``, and so key R + i."""
        if self.kept is None or self.reach is None:
            return None
        places = self.get_buffer("places")
        keys_S = places.narrow(0, 0, self.kept + tokens)[None]
        own_T1 = places.narrow(0, 0, tokens)[:, None] + self.kept
        seen = (keys_S <= own_T1) & (keys_S > own_T1 - self.reach) & (keys_S + position_ids >= self.kept)
        return torch.where(seen, 0.0, FAR_BELOW)


def _tables_of(kind: str) -> tuple[str, str]:
    return ("cos", "sin") if kind == FULL_ATTENTION else ("sliding_cos", "sliding_sin")


class ExecutorchRMSNorm(nn.Module):
    """The mean of squares as a product with a vector of 1/width, eps as its bias: XNNPACK has no mean over a row."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight = nn.Buffer(weight)
        width = weight.shape[0]
        self.mean, self.eps = nn.Buffer(torch.full((1, width), 1 / width)), nn.Buffer(torch.tensor([eps]))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.mean, self.eps)) * self.weight


class ExecutorchResidualRMSNorm(ExecutorchRMSNorm):
    """Adds the residual first."""

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = x if delta is None else delta + x
        return super().forward(total), total


class ExecutorchLinear(nn.Module):
    """A linear layer: fp32, or int4 in groups or int8 by rows on activations that are quantized to int8 token by
    token."""

    def __init__(self, weight: Tensor | Codes, bias: Tensor | None):
        super().__init__()
        self.bias = None if bias is None else nn.Buffer(bias)
        self.is_quantized = isinstance(weight, Codes)
        if isinstance(weight, Codes):
            self.group_size = weight.group_size
            scale = weight.scale if weight.group_size is not None else weight.scale.squeeze(1)
            self.weight, self.scale = nn.Buffer(weight.qdata), nn.Buffer(scale)
            self.zero_point = nn.Buffer(torch.zeros(scale.shape, dtype=torch.int8))
        else:
            self.weight = nn.Buffer(weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_quantized:
            return F.linear(x, self.weight, self.bias)
        weight = ops.dequantized_weight(self.weight, self.scale, self.zero_point, self.group_size)
        return F.linear(ops.rounded_per_token(x), weight, self.bias)


class ExecutorchEmbedding(nn.Module):
    """A plain lookup, or one that dequantizes the rows that it reads."""

    def __init__(self, table: Tensor | Codes):
        super().__init__()
        self.scale = nn.Buffer(table.scale) if isinstance(table, Codes) else None
        self.table = nn.Buffer(table.qdata if isinstance(table, Codes) else table)

    def forward(self, ids: Tensor) -> Tensor:
        if self.scale is None:
            return F.embedding(ids, self.table)
        return ops.embedding(self.table, self.scale, ids)


class ExecutorchCausalConv(nn.Module):
    """The eager convolution without padding to care for."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = nn.Buffer(weight), None if bias is None else nn.Buffer(bias)

    def forward(self, x_BTD: Tensor, state: Tensor, layout: ExecutorchLayout) -> tuple[Tensor, Tensor]:
        window = torch.cat((state, x_BTD), dim=1)
        y_BTD = F.conv1d(window.mT, self.weight, self.bias, groups=x_BTD.shape[-1]).mT
        return y_BTD, window[:, x_BTD.shape[1] :]


class ExecutorchShortConv(nn.Module):
    """``in_proj`` as three layers: XNNPACK cannot cut a tensor of dynamic length into three."""

    def __init__(self, parts: list[ExecutorchLinear], conv: ExecutorchCausalConv, out_proj: ExecutorchLinear):
        super().__init__()
        self.in_proj = nn.ModuleList(parts)
        self.conv, self.out_proj = conv, out_proj

    def forward(self, x_BTD: Tensor, state: Tensor, layout: ExecutorchLayout) -> tuple[Tensor, Tensor]:
        b_BTD, c_BTD, x_BTD = (part(x_BTD) for part in self.in_proj)
        y_BTD, state = self.conv(b_BTD * x_BTD, state, layout)
        return self.out_proj(c_BTD * y_BTD), state


class RotatedHeads(nn.Module):
    """An attention's heads, and RoPE on them: the turn is a product with a small matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        half = config.head_dim // 2
        turn = torch.zeros(config.head_dim, config.head_dim)
        turn[:half, half:], turn[half:, :half] = -torch.eye(half), torch.eye(half)
        self.turn = nn.Buffer(turn)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def rotate(self, x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x_BTNH * cos + F.linear(x_BTNH, self.turn) * sin


class ExecutorchAttention(RotatedHeads):
    """RoPE, then llama::update_cache and llama::custom_sdpa on buffers [1, capacity, K, H] that stay in place."""

    def __init__(self, config: ModelConfig, kind: str):
        super().__init__(config)
        self.kind = kind

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        layout: ExecutorchLayout,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = (self.heads(x) for x in (q, k, v))
        rope = layout.ropes[self.kind]
        ops.update_cache(self.rotate(k, *rope), past_key, layout.start)
        ops.update_cache(v, past_value, layout.start)
        y_BTNH = ops.causal_attention(self.rotate(q, *rope), past_key, past_value, layout.start)
        return y_BTNH.flatten(2), past_key, past_value, None


class ExecutorchSlidingAttention(ExecutorchAttention):
    """Attention on the R positions that the state [1, R, K, H] keeps and the call's own; returns the last R of both.

    Like a short conv's state it is moved along, so that it never grows: what a window no longer reaches is gone.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        layout: ExecutorchLayout,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        assert layout.window is not None
        rope, tokens = layout.ropes[self.kind], q.shape[1]
        key = torch.cat((past_key, self.rotate(self.heads(k), *rope)), dim=1)
        value = torch.cat((past_value, self.heads(v)), dim=1)
        y_BTNH = ops.masked_attention(self.rotate(self.heads(q), *rope), key, value, layout.window)
        return y_BTNH.flatten(2), key[:, tokens:], value[:, tokens:], None


class Lowering:
    """One way to lower every kind of leaf module, with the weights of one program."""

    leaves: ClassVar[tuple[type[nn.Module], ...]] = (
        eager.SequenceLayoutBuilder,
        eager.RMSNorm,
        eager.ShortConv,
        eager.GroupedQueryAttention,
        nn.Linear,
        nn.Embedding,
        SparseMoeBlock,
    )

    def __init__(self, config: ModelConfig, weights: ProgramWeights, capacity: int):
        self.config, self.weights, self.capacity = config, weights, capacity

    def lower_(self, model: nn.Module) -> int:
        """Replaces every leaf module of ``model`` in place; returns how many."""
        found = list(_outermost(model, self.leaves))
        for name, module in found:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, self._lowered(name, module))
        return len(found)

    def _lowered(self, name: str, module: nn.Module) -> nn.Module:
        read = self.weights.numbers
        match module:
            case eager.SequenceLayoutBuilder():
                return ExecutorchLayoutBuilder(self.config, self.capacity)
            case eager.ResidualRMSNorm():
                return ExecutorchResidualRMSNorm(read(f"{name}.weight"), module.eps)
            case eager.RMSNorm():
                return ExecutorchRMSNorm(read(f"{name}.weight"), module.eps)
            case eager.ShortConv():
                return self._short_conv(name)
            case eager.GroupedQueryAttention():
                is_sliding = self.config.window(module.kind) is not None
                return (ExecutorchSlidingAttention if is_sliding else ExecutorchAttention)(self.config, module.kind)
            case nn.Embedding():
                return ExecutorchEmbedding(self.weights.embedding())
            case SparseMoeBlock():
                return lowered_experts(name, self.weights)
            case nn.Linear():
                return self._linear(name)
        raise AssertionError(f"{name}: no lowering for {type(module).__name__}")

    def _short_conv(self, name: str) -> ExecutorchShortConv:
        kernel = self.weights.numbers(f"{name}.conv.weight", CONV)
        conv = ExecutorchCausalConv(kernel, self._optional(f"{name}.conv.bias"))
        return ExecutorchShortConv(self._in_proj(name), conv, self._linear(f"{name}.out_proj"))

    def _in_proj(self, name: str) -> list[ExecutorchLinear]:
        """B, C and x."""
        width = self.config.hidden_size
        return [self._linear(f"{name}.in_proj", slice(start, start + width)) for start in range(0, 3 * width, width)]

    def _linear(self, name: str, rows: slice | None = None) -> ExecutorchLinear:
        return ExecutorchLinear(self.weights.linear(f"{name}.weight", rows), self._optional(f"{name}.bias", rows))

    def _optional(self, name: str, rows: slice | None = None) -> Tensor | None:
        return self.weights.numbers(name, rows=rows) if self.weights.has(name) else None


def _outermost(
    module: nn.Module, kinds: tuple[type[nn.Module], ...], prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of some kinds."""
    for name, child in module.named_children():
        if isinstance(child, kinds):
            yield f"{prefix}{name}", child
        else:
            yield from _outermost(child, kinds, f"{prefix}{name}.")
