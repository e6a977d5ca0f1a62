"""ONNX Runtime's operators as functions that can be traced: each emits one node of the exported graph.

In: fake tensors during ``torch.export``. Out: fake tensors of the right shape and dtype; no arithmetic happens here.
Source of every signature: the operator schemas of onnxruntime 1.31 (domain com.microsoft). SimplifiedLayerNormalization
is ONNX Runtime's too, though it lives in the default domain.

Shape suffixes as in ``models/decoder.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.onnx import ops

Inputs = Sequence[Tensor | None]


def _single(op: str, inputs: Inputs, like: Tensor, shape: Sequence[int], **attrs: object) -> Tensor:
    return ops.symbolic(op, inputs, attrs=attrs, dtype=like.dtype, shape=shape, version=1)  # type: ignore[arg-type]


def axis_size(x: Tensor, axis: int) -> Tensor:
    """A dimension of x, as an int32 scalar of the graph."""
    size = ops.symbolic("Shape", (x,), {"start": axis, "end": axis + 1}, dtype=torch.int64, shape=(1,))
    return ops.symbolic("Squeeze", (size,), dtype=torch.int64, shape=()).to(torch.int32)


def gather_rows(x_BTD: Tensor, rows: Tensor) -> Tensor:
    """``x[b, rows[b, i]]``: [B, I, D] for rows int64 [B, I]."""
    shape = (*rows.shape, x_BTD.shape[-1])
    return ops.symbolic("GatherND", (x_BTD, rows[..., None]), {"batch_dims": 1}, dtype=x_BTD.dtype, shape=shape)


def gemm_transposed(x_BTD: Tensor, table: Tensor) -> Tensor:
    """x times the transpose of table [V, D]: [B, T, V]. Gemm takes two axes, hence a reshape on both sides."""
    x_MD = x_BTD.flatten(0, 1)
    shape = (x_MD.shape[0], table.shape[0])
    y_MV = ops.symbolic("Gemm", (x_MD, table), {"transB": 1}, dtype=x_BTD.dtype, shape=shape)
    return y_MV.unflatten(0, x_BTD.shape[:2])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalizes the last axis by its root mean square; statistics in fp32 (stash_type 1)."""
    return _single("SimplifiedLayerNormalization", (x, weight), x, x.shape, axis=-1, epsilon=eps, stash_type=1)


def skip_rms_norm(delta: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(delta + x), delta + x); the operator's second and third outputs are unused."""
    normed, _, _, total = ops.symbolic_multi_out(
        "com.microsoft::SkipSimplifiedLayerNormalization",
        (delta, x, weight),
        attrs={"epsilon": eps},
        dtypes=(x.dtype, torch.float32, torch.float32, x.dtype),
        shapes=(x.shape, x.shape[:-1], x.shape[:-1], x.shape),
        version=1,
    )
    return normed, total


def causal_conv(x_BTD: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> Tensor:
    """Depthwise causal convolution after ``state`` [B, L-1, D], or zeros; the operator's own new state is not used."""
    inputs: Inputs = (x_BTD, weight, bias, state)
    while inputs[-1] is None:
        inputs = inputs[:-1]
    y_BTD, _ = ops.symbolic_multi_out(
        "com.microsoft::CausalConvWithState",
        inputs,
        attrs={"channels_last": 1, "ndim": 1},
        dtypes=(x_BTD.dtype, x_BTD.dtype),
        shapes=(x_BTD.shape, (x_BTD.shape[0], weight.shape[-1] - 1, x_BTD.shape[2])),
        version=1,
    )
    return y_BTD


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """RoPE on heads side by side, [B, T, N*H]; ``cos``, ``sin`` [positions, H/2] say how wide a head is."""
    return _single("com.microsoft::RotaryEmbedding", (x, position_ids, cos, sin), x, x.shape)


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, *, attention_bias: Tensor, num_heads: int) -> Tensor:
    """Attention to every position, with heads side by side in q, k and v [B, T, N*H]; ``attention_bias`` [B, 1, T, T]
    is added to the scores."""
    inputs = (q, k, v, None, None, attention_bias)
    return _single("com.microsoft::MultiHeadAttention", inputs, q, q.shape, num_heads=num_heads)


def group_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    *,
    seqlens_k: Tensor,
    total_length: Tensor,
    rope: tuple[Tensor, Tensor, Tensor] | None,
    attention_bias: Tensor,
    present_length: int,
    num_heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with the cache's update; ``rope`` = (cos, sin [positions, H/2], position_ids [B, T]) turns q and k."""
    cos, sin, position_ids = rope or (None, None, None)
    batch, _, _, head_dim = past_key.shape
    present = (batch, kv_heads, present_length, head_dim)
    return ops.symbolic_multi_out(  # type: ignore[return-value]
        "com.microsoft::GroupQueryAttention",
        (q, k, v, past_key, past_value, seqlens_k, total_length, cos, sin, position_ids, attention_bias),
        attrs={"num_heads": num_heads, "kv_num_heads": kv_heads, "do_rotary": int(rope is not None)},
        dtypes=(q.dtype, past_key.dtype, past_key.dtype),
        shapes=(q.shape, present, present),
        version=1,
    )


def matmul_nbits(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    accuracy_level: int,
) -> Tensor:
    """x [..., columns] times a packed [rows, columns] matrix, transposed."""
    inputs: Inputs = (x, qdata, scale, zero_point, None, bias)
    while inputs[-1] is None:
        inputs = inputs[:-1]
    return _single(
        "com.microsoft::MatMulNBits",
        inputs,
        x,
        (*x.shape[:-1], rows),
        N=rows,
        K=columns,
        bits=bits,
        block_size=group_size,  # MatMulNBits calls our group_size "block_size"; rename only here.
        accuracy_level=accuracy_level,
    )


def gather_block_quantized(
    qdata: Tensor, ids: Tensor, scale: Tensor, zero_point: Tensor | None, *, width: int, bits: int, group_size: int
) -> Tensor:
    """Rows of a packed [rows, width] table, dequantized: [*ids.shape, width]."""
    inputs = (qdata, ids, scale) if zero_point is None else (qdata, ids, scale, zero_point)
    return _single(
        "com.microsoft::GatherBlockQuantized",
        inputs,
        scale,
        (*ids.shape, width),
        bits=bits,
        block_size=group_size,
        gather_axis=0,
        quantize_axis=1,
    )


def moe(x: Tensor, router_probs: Tensor, fc1: Tensor, fc2: Tensor, *, top_k: int) -> Tensor:
    """Unquantized experts; ``router_probs`` go through a softmax over all experts and weigh the top k as they are."""
    return _single(
        "com.microsoft::MoE",
        (x, router_probs, fc1, None, fc2),
        x,
        x.shape,
        k=top_k,
        normalize_routing_weights=0,
        **_SWIGLU,
    )


def qmoe(
    x: Tensor,
    router_probs: Tensor,
    router_weights: Tensor | None,
    fc1: tuple[Tensor, Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor, Tensor | None],
    *,
    top_k: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """Quantized experts, each (qdata, scale, zero_point): selected by ``router_probs``, mixed by ``router_weights`` as
    they are; without these by a softmax of ``router_probs`` over all experts, normalized over the k chosen."""
    inputs: Inputs = (x, router_probs, fc1[0], fc1[1], None, fc2[0], fc2[1], None, None, None, None)
    inputs = (*inputs, fc1[2], fc2[2], None, router_weights)
    while inputs[-1] is None:
        inputs = inputs[:-1]
    return _single(
        "com.microsoft::QMoE",
        inputs,
        x,
        x.shape,
        k=top_k,
        normalize_routing_weights=int(router_weights is None),
        expert_weight_bits=bits,
        block_size=group_size,
        **_SWIGLU,
    )


# w1 and w3 interleaved row by row; silu is swish with alpha 1, and nothing is added to the linear half.
_SWIGLU = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
