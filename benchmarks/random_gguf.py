"""A random GGUF of a checkpoint's shape, stored as ``llama-quantize`` stores Q4_0: for llama.cpp's speed.

In: a raw config.json. Out: a .gguf whose linear layers are Q4_0 (4.5 bits a weight), whose embedding and head are Q6_K
(6.56 bits; Q8_0 where a row is no multiple of 256), and whose routers, norms and conv kernels are float32. Blocks are
drawn at random, tensor by tensor: memory holds one tensor. Scales are such that a layer's outputs are as large as its
inputs, and routers spread over all experts.

Names and keys: gguf's ``MODEL_ARCH.LFM2`` and ``LFM2MOE``; llama.cpp's ``src/models/lfm2*.cpp`` and
``conversion/lfm2.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from lfm2_export.config import ModelConfig
from lfm2_export.families import get_family
from lfm2_export.families.tensors import ModelTensor, Part, TensorClass

ARCHITECTURES = {"lfm2": gguf.MODEL_ARCH.LFM2, "lfm2_moe": gguf.MODEL_ARCH.LFM2MOE}
_STEP_DEVIATION = {Type.Q4_0: 4.6, Type.Q8_0: 74.0, Type.Q6_K: 18.5 * 12.0}  # of a uniform code, times its scale's mean


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """``shape`` as in the checkpoint, rows last but one. ``active``: the share of it that one token uses."""

    name: str
    shape: tuple[int, ...]
    type: Type
    active: float = 1.0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return self.count // block * size


def tensors(raw_config: Mapping[str, Any]) -> list[GgufTensor]:
    """Every tensor of the file, in its order."""
    config = get_family(raw_config["model_type"]).parse_config(raw_config)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    found = []
    for tensor in get_family(config.model_type).tensors(config).values():
        if tensor.expert in (None, 0):  # a layer's experts are stacked
            stored = names.get_name(converted_name(tensor), try_suffixes=(".weight", ".bias"))
            assert stored is not None, tensor.name
            found.append(_stacked(tensor, stored, config))
    return found


def converted_name(tensor: ModelTensor) -> str:
    """As conversion/lfm2.py makes it."""
    if tensor.kind is TensorClass.EXPERTS:
        return f"layers.{tensor.layer}.feed_forward.experts.{tensor.matrix}.weight"
    return f"{tensor.name}.bias" if tensor.kind is TensorClass.EXPERT_BIAS else tensor.name


def _stacked(tensor: ModelTensor, name: str, config: ModelConfig) -> GgufTensor:
    """``tensor``, or all experts' of its layer."""
    shape, active = tensor.shape, 1.0
    if tensor.kind is TensorClass.EXPERTS:
        shape, active = (config.num_experts, *shape), config.num_experts_per_tok / config.num_experts
    elif tensor.part is Part.CONVOLUTIONS:
        shape = tuple(size for size in shape if size != 1)  # a depthwise kernel's middle axis
    return GgufTensor(name=name, shape=shape, type=_type(tensor), active=active)


def _type(tensor: ModelTensor) -> Type:
    if tensor.kind in (TensorClass.EMBEDDING, TensorClass.HEAD):
        return Type.Q8_0 if tensor.shape[-1] % 256 else Type.Q6_K
    return Type.Q4_0 if tensor.kind in (TensorClass.LINEAR, TensorClass.EXPERTS) else Type.F32


def _no_vocabulary(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("no_vocab")


def write_random_gguf(
    path: Path,
    raw_config: Mapping[str, Any],
    *,
    seed: int,
    vocabulary: Callable[[gguf.GGUFWriter], None] = _no_vocabulary,
) -> Path:
    """Writes the file, or leaves none. ``vocabulary`` adds the tokenizer's keys."""
    config = get_family(raw_config["model_type"]).parse_config(raw_config)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    add_settings(writer, config)
    vocabulary(writer)
    chosen = tensors(raw_config)
    for tensor in chosen:
        shape = tensor.shape if tensor.type is Type.F32 else gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
        dtype = np.dtype(np.float32 if tensor.type is Type.F32 else np.uint8)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, raw_dtype=tensor.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in chosen:
            writer.write_tensor_data(random_data(tensor, np.random.default_rng([seed, *tensor.name.encode()])))
        writer.close()
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def add_settings(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    attention = set(config.attention_layers)
    writer.add_name("random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    kv_heads = [config.num_key_value_heads if i in attention else 0 for i in range(config.num_hidden_layers)]
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_shortconv_l_cache(config.conv_L_cache)
    if config.moe_layers:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_leading_dense_block_count(config.num_dense_layers)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def random_data(tensor: GgufTensor, rng: np.random.Generator) -> np.ndarray:
    """float32 values, or blocks as bytes: uniform codes under scales that are near one size."""
    if tensor.type is Type.F32:
        mean, deviation = _distribution(tensor)
        return (rng.standard_normal(tensor.shape, dtype=np.float32) * deviation + mean).astype(np.float32)
    block, size = gguf.GGML_QUANT_SIZES[tensor.type]
    blocks = np.frombuffer(bytearray(rng.bytes(tensor.nbytes)), np.uint8).reshape(-1, size)
    deviation = (2.0 if tensor.name.startswith(("token_embd", "output")) else 1.0) / math.sqrt(tensor.shape[-1])
    scales = rng.uniform(0.8, 1.2, len(blocks)) * (deviation / _STEP_DEVIATION[tensor.type])
    stored = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    if tensor.type is Type.Q6_K:  # 192 bytes of codes, 16 int8 scales, a float16 scale of those
        blocks[:, 192:208] = rng.integers(8, 17, (len(blocks), 16), dtype=np.uint8)
        blocks[:, 208:] = stored
    else:  # a float16 scale, then codes
        blocks[:, :2] = stored
    return blocks.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * size)


def _distribution(tensor: GgufTensor) -> tuple[float, float]:
    if "norm" in tensor.name:
        return 1.0, 0.1
    if "exp_probs_b" in tensor.name:
        return 0.0, 0.05
    return 0.0, (2.0 if "gate_inp" in tensor.name else 1.0) / math.sqrt(tensor.shape[-1])
