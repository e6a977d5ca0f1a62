"""Replaces the leaf modules of an eager model by ones that emit ONNX Runtime's operators when traced.

In: an eager model whose parameters are fake tensors, and how each weight is to be stored. Out: the same model, in
place, with leaf modules of the same signatures, and a ``StoredWeight`` for every initializer that must be streamed
in later. The model's own forward passes (``models/decoder.py``) are not copied: what is traced is what was
validated.

Shape suffixes as in ``models/decoder.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_export.backends.onnx import ops
from lfm2_export.backends.onnx.plan import ROPE_TABLES, Layout
from lfm2_export.backends.weights.plan import StoredWeight, WeightPlan
from lfm2_export.config import FULL_ATTENTION, ModelConfig
from lfm2_export.errors import ExportError
from lfm2_export.models import decoder as eager
from lfm2_export.models.lfm2_moe import ROUTING_EPS, SparseMoeBlock
from lfm2_export.quant.formats import FloatFormat, IntFormat

# Added to the scores of masked positions. Large enough that exp() is 0, small enough that a row with nothing but
# padding stays finite. fp16 cannot hold 1e9.
MASKED = {torch.float32: -1e9, torch.float16: -6e4}


@dataclass(frozen=True, kw_only=True)
class OnnxLayout:
    """What the lowered layers need to know of positions and padding; the graph computes it once a call.

    ``seqlens_k`` int32 [B]: index of each row's last attended position. ``total_length`` int32 scalar: S.
    By the kind of layer, ``ropes``: cos and sin [max_position_embeddings, H/2]; ``attention_bias`` [B, 1, T, S].
    ``position_ids`` int64 [B, T]; ``attended`` [B, T, 1], 1 where a token of this call is one; ``conv_rows`` int64
    [B, L-1]: where the new conv state lies in (state, inputs); ``last`` int64 [B, 1].
    """

    seqlens_k: Tensor
    total_length: Tensor
    ropes: Mapping[str, tuple[Tensor, Tensor]]
    position_ids: Tensor
    attention_bias: Mapping[str, Tensor]
    attended: Tensor
    conv_rows: Tensor
    last: Tensor


class OnnxLayoutBuilder(nn.Module):
    """Reads padding from the attention mask: left, right, or each row compact in its cache buffer while decoding.

    Three layouts of ``attention_mask`` [B, S] are told apart by arithmetic alone. Left padding: zeros first. Right
    padding in a prefill: zeros last. Decoding with buffers of fixed size: the new token of a row that holds n
    tokens goes to slot n, so the row's mask is n + 1 ones and then zeros, though the call's only token is a real
    one. Hence a call of one token is always attended, and the last attended position is where the row's keys end.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.width = config.conv_L_cache
        self.dtype = dtype
        self.windows = {kind: config.window(kind) for kind in config.ropes}
        table = (config.max_position_embeddings, config.head_dim // 2)
        for kind in self.windows:
            for attribute in ROPE_TABLES[kind]:
                self.register_parameter(attribute, nn.Parameter(torch.empty(table, dtype=dtype), requires_grad=False))

    def forward(
        self, embeds_BTD: Tensor, attention_mask: Tensor, position_ids: Tensor | None, past_length: int
    ) -> OnnxLayout:
        tokens, total = embeds_BTD.shape[1], attention_mask.shape[1]
        slots_S = torch.arange(total)
        seen_BS = attention_mask.cumsum(-1)
        # Leading zeros count as positions: the prefill numbers tokens by slot, and later tokens must fit that
        # numbering.
        position_BS = (seen_BS + (seen_BS == 0).long().cumsum(-1)) - 1
        seqlens_k = (attention_mask * slots_S).amax(-1)
        own_BT = attention_mask[:, total - tokens :]
        attended_BT = torch.maximum(own_BT, (torch.ones(1, dtype=torch.long) * tokens == 1).long())
        last_T = (attended_BT * torch.arange(tokens)).amax(-1, keepdim=True)
        empty = attended_BT.amax(-1, keepdim=True) == 0
        kept = torch.where(empty, 0, last_T + 1)
        bias_BS = (1 - attention_mask).to(self.dtype) * MASKED[self.dtype]
        return OnnxLayout(
            seqlens_k=seqlens_k.to(torch.int32),
            total_length=ops.axis_size(attention_mask, 1),
            ropes={kind: self._tables(kind) for kind in self.windows},
            position_ids=position_BS[:, total - tokens :],
            attention_bias={
                kind: bias_BS[:, None, None, :].expand(-1, 1, tokens, total)
                if window is None
                else self._windowed(window, attention_mask, seen_BS, tokens)
                for kind, window in self.windows.items()
            },
            attended=attended_BT[..., None].to(self.dtype),
            conv_rows=kept + torch.arange(self.width - 1),
            last=last_T,
        )

    def _windowed(self, window: int, attention_mask: Tensor, seen_BS: Tensor, tokens: int) -> Tensor:
        """The bias [B, 1, T, S] that hides, too, what lies ``window`` attended positions or more before a token.

        In tokens, not in slots as GroupQueryAttention's local_window_size counts: between a row's tokens there may be
        slots that are none, after a prompt that was padded on the right.
        """
        own_BT = seen_BS[:, seen_BS.shape[1] - tokens :]
        behind_BTS = (own_BT[:, :, None] - seen_BS[:, None, :] - (window - 1)).clamp(min=0, max=1)
        hidden_BTS = torch.maximum(behind_BTS, (1 - attention_mask)[:, None, :])
        return (hidden_BTS.to(self.dtype) * MASKED[self.dtype])[:, None]

    def _tables(self, kind: str) -> tuple[Tensor, Tensor]:
        cos, sin = (self.get_parameter(attribute) for attribute in ROPE_TABLES[kind])
        return cos, sin


class StoredModule(nn.Module):
    """A module with a fake parameter for each initializer of a weight, named for its role."""

    weight: Tensor
    qdata: Tensor
    scale: Tensor

    def __init__(self, stored: StoredWeight):
        super().__init__()
        self.stored = stored
        for role in stored.storage():
            self.register_parameter(role, fake_parameter(stored, role))

    def packed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zero points; the scales in the activations' ``dtype``, as the operators want them: a Cast
        of an initializer, which onnxruntime folds while it loads."""
        return self.qdata, self.scale.to(dtype), getattr(self, "zero_point", None)


def fake_parameter(stored: StoredWeight, role: str) -> nn.Parameter:
    """A parameter without values, of the shape and dtype that the initializer will have in the file."""
    shape, dtype = stored.storage()[role]
    return nn.Parameter(torch.empty(shape, dtype=getattr(torch, dtype.name)), requires_grad=False)


class OnnxRMSNorm(StoredModule):
    """SimplifiedLayerNormalization."""

    def __init__(self, eps: float, weight: StoredWeight):
        super().__init__(weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class OnnxResidualRMSNorm(OnnxRMSNorm):
    """SkipSimplifiedLayerNormalization: residual addition and norm in one node."""

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if delta is None:
            return ops.rms_norm(x, self.weight, self.eps), x
        return ops.skip_rms_norm(delta, x, self.weight, self.eps)


class OnnxCausalConv(StoredModule):
    """CausalConvWithState; padding is zeroed before it, and the new state is picked by each row's own length."""

    def __init__(self, weight: StoredWeight, bias: StoredWeight | None):
        super().__init__(weight)
        self.bias = None if bias is None else fake_parameter(bias, "weight")

    def forward(self, x_BTD: Tensor, state: Tensor, layout: OnnxLayout) -> tuple[Tensor, Tensor]:
        x_BTD = x_BTD * layout.attended
        y_BTD = ops.causal_conv(x_BTD, self.weight, self.bias, state)
        window = torch.cat((state, x_BTD), dim=1)
        return y_BTD, ops.gather_rows(window, layout.conv_rows)


class OnnxAttention(nn.Module):
    """GroupQueryAttention; RoPE inside it where the kernels can, else as RotaryEmbedding before it.

    Inside, a head size must be a multiple of 16, and WebGPU's kernel, which the fp16 programs are for, counts positions
    by itself: behind a prompt that was padded on the right, it counts the padding (measured).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, kind: str = FULL_ATTENTION):
        super().__init__()
        self.kind = kind
        if config.head_dim % 8:
            raise ExportError(
                f"head_dim={config.head_dim}: GroupQueryAttention takes multiples of 8; this checkpoint cannot be "
                "exported to onnx"
            )
        self.num_heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.fused_rope = config.head_dim % 16 == 0 and dtype == torch.float32

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        layout: OnnxLayout,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        rope = (*layout.ropes[self.kind], layout.position_ids)
        if not self.fused_rope:
            q, k = ops.rotary_embedding(q, *rope), ops.rotary_embedding(k, *rope)
        y, key, value = ops.group_query_attention(
            q,
            k,
            v,
            past_key,
            past_value,
            seqlens_k=layout.seqlens_k,
            total_length=layout.total_length,
            rope=rope if self.fused_rope else None,
            attention_bias=layout.attention_bias[self.kind],
            present_length=layout.attention_bias[self.kind].shape[-1],
            num_heads=self.num_heads,
            kv_heads=self.kv_heads,
        )
        return y, key, value, None


class OnnxLinear(StoredModule):
    """MatMulNBits; or MatMul with the weight stored as [in, out]; or Gemm where a tied head reads the embedding's
    table."""

    def __init__(self, stored: StoredWeight, bias: StoredWeight | None, accuracy_level: int):
        super().__init__(stored)
        self.accuracy_level = accuracy_level
        self.bias = None if bias is None else fake_parameter(bias, "weight")

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.stored.format, IntFormat):
            return self._matmul_nbits(x, self.stored.format)
        if self.stored.layout is Layout.TABLE:
            # Gemm reads the [V, D] table as it is; MatMul would want a transposed copy of it.
            return ops.gemm_transposed(x, self.weight)
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def _matmul_nbits(self, x: Tensor, form: IntFormat) -> Tensor:
        rows, columns = self.stored.shape
        return ops.matmul_nbits(
            x,
            *self.packed(x.dtype),
            self.bias,
            rows=rows,
            columns=columns,
            bits=form.bits,
            group_size=form.group_of(columns),
            accuracy_level=self.accuracy_level,
        )


class OnnxEmbedding(StoredModule):
    """GatherBlockQuantized, or a plain Gather."""

    def __init__(self, stored: StoredWeight, dtype: torch.dtype):
        super().__init__(stored)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        form = self.stored.format
        if isinstance(form, FloatFormat):
            return F.embedding(ids, self.weight)
        qdata, scale, zero_point = self.packed(self.dtype)
        width = self.stored.shape[1]
        return ops.gather_block_quantized(
            qdata, ids, scale, zero_point, width=width, bits=form.bits, group_size=form.group_of(width)
        )


class Experts(nn.Module):
    """The stacked weights of a layer's experts."""

    def __init__(self, plan: WeightPlan, name: str):
        super().__init__()
        self.gate_up = StoredModule(plan[f"{name}.gate_up"])
        self.down = StoredModule(plan[f"{name}.down"])


class OnnxSparseMoeBlock(nn.Module):
    """The router as plain fp32 operators, exactly as the model defines it, and the experts as one QMoE or MoE node.

    The operators' own routing has no ``+ 1e-6``, no scale and no fixed order for ties. So the k weights are
    computed here and scattered into a row of zeros; the node only has to pick the k entries and use them as they
    are.
    """

    def __init__(self, name: str, config: ModelConfig, plan: WeightPlan):
        super().__init__()
        self.config = config
        self.gate = StoredModule(plan[f"{name}.gate"])
        self.experts = Experts(plan, f"{name}.experts")
        self.format = plan[f"{name}.experts.down"].format
        # WebGPU's QMoE, which the fp16 programs are for, has no router_weights input.
        self.separate_weights = plan.activation_dtype == "float32"
        bias = plan.get(f"{name}.expert_bias")
        self.expert_bias = None if bias is None else fake_parameter(bias, "weight")

    def forward(self, x_BTD: Tensor, recorder: object) -> Tensor:
        x_MD = x_BTD.flatten(0, 1)
        logits_ME = x_MD.float() @ self.gate.weight
        scores_ME = 1.0 / _one_plus_exp_minus(logits_ME)
        ranked_ME = scores_ME if self.expert_bias is None else scores_ME + self.expert_bias
        chosen_Mk = torch.topk(ranked_ME, self.config.num_experts_per_tok, dim=-1).indices
        weights_Mk = scores_ME.gather(1, chosen_Mk)
        if isinstance(self.format, IntFormat) and self.separate_weights:
            y_MD = self._by_weights(x_MD, scores_ME, chosen_Mk, weights_Mk)
        else:
            y_MD = self._by_softmax(x_MD, logits_ME, chosen_Mk, weights_Mk)
        return y_MD.view_as(x_BTD)

    def _normalizer(self, weights_Mk: Tensor) -> Tensor | float:
        """What a chosen score is multiplied with: [M, 1], or a constant where the weights are not normalized."""
        if not self.config.norm_topk_prob:
            return self.config.routed_scaling_factor
        return self.config.routed_scaling_factor / (weights_Mk.sum(-1, keepdim=True) + ROUTING_EPS)

    def _by_weights(self, x_MD: Tensor, scores_ME: Tensor, chosen_Mk: Tensor, weights_Mk: Tensor) -> Tensor:
        """The weights as they are: QMoE picks its k experts by them and mixes by them."""
        weights_Mk = weights_Mk * self._normalizer(weights_Mk)
        mixed_ME = (scores_ME * 0.0).scatter(1, chosen_Mk, weights_Mk).to(x_MD.dtype)
        return self._experts(x_MD, mixed_ME, mixed_ME)

    def _by_softmax(self, x_MD: Tensor, logits_ME: Tensor, chosen_Mk: Tensor, weights_Mk: Tensor) -> Tensor:
        """Where the operator takes a softmax over all experts: log-scores, and -1e4 for the experts not chosen, give
        each chosen score over the sum of the chosen; the sum itself goes onto the output."""
        log_scores_Mk = -_one_plus_exp_minus(logits_ME.gather(1, chosen_Mk)).log()
        # A softmax does not see a common shift; fp16 holds values near 0 best.
        log_scores_Mk = log_scores_Mk - log_scores_Mk.amax(-1, keepdim=True)
        masked_ME = (logits_ME * 0.0 - 1e4).scatter(1, chosen_Mk, log_scores_Mk).to(x_MD.dtype)
        y_MD = self._experts(x_MD, masked_ME, None)
        share_M1 = weights_Mk.sum(-1, keepdim=True) * self._normalizer(weights_Mk)
        return y_MD * share_M1.to(y_MD.dtype)

    def _experts(self, x_MD: Tensor, router_probs: Tensor, router_weights: Tensor | None) -> Tensor:
        gate_up, down, top_k = self.experts.gate_up, self.experts.down, self.config.num_experts_per_tok
        if isinstance(self.format, FloatFormat):
            return ops.moe(x_MD, router_probs, gate_up.weight, down.weight, top_k=top_k)
        return ops.qmoe(
            x_MD,
            router_probs,
            router_weights,
            gate_up.packed(x_MD.dtype),
            down.packed(x_MD.dtype),
            top_k=top_k,
            bits=self.format.bits,
            group_size=self.format.group_of(x_MD.shape[-1]),
        )


def _one_plus_exp_minus(x: Tensor) -> Tensor:
    """1 + exp(-x), of which sigmoid is the reciprocal.

    ONNX Runtime's Sigmoid is off by up to 1e-7 and 0 below -18: too coarse where all scores are faint and the 1e-6
    beside their sum matters. The bound keeps exp() finite, and so the logarithm of a score.
    """
    return 1.0 + torch.exp(-x.clamp(min=-80.0))


class Lowering:
    """One way to lower every kind of leaf module, for one plan."""

    def __init__(self, config: ModelConfig, plan: WeightPlan):
        self.config, self.plan = config, plan

    def lower_(self, model: nn.Module) -> int:
        """Replaces every leaf module of ``model`` in place; returns how many."""
        found = list(self._leaves(model))
        for name, module in found:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, self._lowered(name, module))
        return len(found)

    def _leaves(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        kinds = (
            eager.SequenceLayoutBuilder,
            eager.RMSNorm,
            eager.CausalConv,
            eager.GroupedQueryAttention,
            nn.Linear,
            nn.Embedding,
            SparseMoeBlock,
        )
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                yield name, module

    def _lowered(self, name: str, module: nn.Module) -> nn.Module:
        plan = self.plan
        match module:
            case eager.SequenceLayoutBuilder():
                return OnnxLayoutBuilder(self.config, getattr(torch, plan.activation_dtype))
            case eager.ResidualRMSNorm():
                return OnnxResidualRMSNorm(module.eps, plan[f"{name}.weight"])
            case eager.RMSNorm():
                return OnnxRMSNorm(module.eps, plan[f"{name}.weight"])
            case eager.CausalConv():
                return OnnxCausalConv(plan[f"{name}.weight"], plan.get(f"{name}.bias"))
            case eager.GroupedQueryAttention():
                return OnnxAttention(self.config, getattr(torch, plan.activation_dtype), module.kind)
            case nn.Embedding():
                return OnnxEmbedding(plan[name], getattr(torch, plan.activation_dtype))
            case SparseMoeBlock():
                return OnnxSparseMoeBlock(name, self.config, plan)
            case nn.Linear():
                return OnnxLinear(plan[name], plan.get(f"{name}.bias"), plan.accuracy_level)
        raise AssertionError(f"{name}: no lowering for {type(module).__name__}")
