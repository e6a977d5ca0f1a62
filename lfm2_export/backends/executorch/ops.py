"""The operators that a lowered model calls, and what has to be imported for them, when exporting and when running.

Importing this module imports torch and registers ExecuTorch's operators with it.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

import torch
from torch import Tensor

_REGISTERING = (
    "torch.ao.quantization.fx._decomposed",
    "executorch.exir.passes._quant_patterns_and_replacements",
    "executorch.extension.llm.custom_ops.custom_ops",
)
_BYTE = (-128, 127)
_NIBBLE = (-8, 7)


def _register() -> None:
    """Importing is what registers them. The packages warn of extras that we do not use, and set up logging."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in _REGISTERING:
                importlib.import_module(name)
        finally:
            logging.disable(previous)


_register()
_decomposed = torch.ops.quantized_decomposed
_llama = torch.ops.llama


def dequantized_weight(qdata: Tensor, scale: Tensor, zero_point: Tensor, group_size: int | None) -> Tensor:
    """What XNNPACK's partitioner takes for a weight: int8 [rows, columns] with 4 bits in groups, scale [rows, groups];
    with 8 bits (``group_size`` None) scale [rows]."""
    if group_size is None:
        return _decomposed.dequantize_per_channel(qdata, scale, zero_point, 0, *_BYTE, torch.int8)
    return _decomposed.dequantize_per_channel_group(
        qdata, scale, zero_point, *_NIBBLE, torch.int8, group_size, torch.float32
    )


def rounded_per_token(x: Tensor) -> Tensor:
    """What it takes for activations in int8, a scale and a zero point for each row."""
    scale, zero_point = _decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = _decomposed.quantize_per_token(x, scale, zero_point, *_BYTE, torch.int8)
    return _decomposed.dequantize_per_token(codes, scale, zero_point, *_BYTE, torch.int8, torch.float32)


def embedding(table: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """Rows of an int8 table [V, D], or of a uint8 one [V, D/2] with two codes a byte."""
    if table.dtype == torch.int8:
        return _decomposed.embedding_byte(table, scale, None, *_BYTE, ids)
    return _decomposed.embedding_4bit(table, scale, None, *_NIBBLE, ids)


def update_cache(value: Tensor, cache: Tensor, start: Any) -> None:
    """Writes ``value`` [1, T, K, H] into ``cache`` [1, S, K, H] from ``start`` on."""
    _llama.update_cache(value, cache, start)


def causal_attention(q: Tensor, key: Tensor, value: Tensor, start: Any) -> Tensor:
    """Attention of q [1, T, N, H] from position ``start`` on the caches; heads may share keys and values."""
    return _llama.custom_sdpa(q, key, value, start, None, 0.0, True)


def masked_attention(q: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of q [1, T, N, H] on keys and values [1, S, K, H]; ``mask`` float32 [T, S] is added to the scores."""
    return _llama.custom_sdpa(q, key, value, 0, mask, 0.0, False)


def stock_experts(
    x_TD: Tensor,
    gate: Tensor,
    bias: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    top_k: int,
    inner: int,
    group_size: int,
    scale: float,
) -> Tensor:
    """Router and experts of a block, [T, D] to [T, D]; blobs as in packing.py."""
    experts, width = gate.shape
    return _llama.quantized_moe_ffn(
        x_TD, gate, bias, w13, w2, top_k, experts, inner, width, group_size, 4, "sigmoid", scale
    )
