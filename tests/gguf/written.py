"""GGUF files of a checkpoint as llama.cpp writes them: names, keys, types, stacked experts, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from benchmarks.gguf_checkpoint import add_tokenizer
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.families.tensors import ModelTensor, Part, TensorClass

ARCHITECTURES = {"lfm2": gguf.MODEL_ARCH.LFM2, "lfm2_moe": gguf.MODEL_ARCH.LFM2MOE}


def default_type(tensor: ModelTensor) -> Type:
    """As llama-quantize stores Q4_0: the token table in Q6_K where its rows are whole blocks."""
    if tensor.kind is TensorClass.EMBEDDING:
        return Type.Q8_0 if tensor.shape[-1] % 256 else Type.Q6_K
    return Type.Q4_0 if tensor.kind in (TensorClass.LINEAR, TensorClass.EXPERTS) else Type.F32


def write(
    path: Path,
    checkpoint: Checkpoint | str | Path,
    *,
    type_of: Callable[[ModelTensor], Type] = default_type,
    settings: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the file; ``settings`` replace those of the same name."""
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    config = opened.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    add_settings(writer, opened, settings or {})
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for tensor in opened.model_tensors.values():
        if tensor.expert in (None, 0):
            add_tensor(writer, names, opened, tensor, type_of(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: gguf.GGUFWriter, names: Any, opened: Checkpoint, tensor: ModelTensor, kind: Type) -> None:
    if tensor.kind is TensorClass.EXPERTS:
        stem = f"layers.{tensor.layer}.feed_forward.experts.{tensor.matrix}.weight"
        parts = [
            name.replace(".experts.0.", f".experts.{expert}.")
            for expert in range(opened.config.num_experts)
            for name in [tensor.name]
        ]
        values = np.stack([opened.read(part) for part in parts])
    else:
        stem = f"{tensor.name}.bias" if tensor.kind is TensorClass.EXPERT_BIAS else tensor.name
        values = opened.read(tensor.name)
        if tensor.part is Part.CONVOLUTIONS:
            values = values.reshape([size for size in values.shape if size != 1])
    name = names.get_name(stem, try_suffixes=(".weight", ".bias")) or "output.weight"
    if kind is Type.F32:
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        return
    data = q6_k(values) if kind is Type.Q6_K else gguf.quants.quantize(values, kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def q6_k(values: np.ndarray) -> np.ndarray:
    """Blocks of Q6_K near the values; the gguf package has no quantizer for them, and any codes are right ones."""
    groups = values.reshape(-1, 16, 16).astype(np.float32)
    scale = np.abs(groups).max(axis=2) / 31 + 1e-12
    whole = (scale.max(axis=1, keepdims=True) / 127).astype(np.float16)
    inner = np.clip(np.rint(scale / whole.astype(np.float32)), 1, 127).astype(np.int8)
    inner[::2] *= -1  # scales of both signs
    step = inner.astype(np.float32) * whole.astype(np.float32)
    codes = np.clip(np.rint(groups / step[:, :, None]) + 32, 0, 63).astype(np.uint8).reshape(-1, 2, 4, 32)
    lower = codes & 15
    ql = np.concatenate([lower[:, :, 0] | lower[:, :, 2] << 4, lower[:, :, 1] | lower[:, :, 3] << 4], axis=2)
    upper = codes >> 4
    qh = upper[:, :, 0] | upper[:, :, 1] << 2 | upper[:, :, 2] << 4 | upper[:, :, 3] << 6
    blocks = [ql.reshape(-1, 128), qh.reshape(-1, 64), inner.view(np.uint8), whole.view(np.uint8)]
    return np.concatenate(blocks, axis=1).reshape(*values.shape[:-1], -1)


def add_settings(writer: gguf.GGUFWriter, opened: Checkpoint, changed: Mapping[str, Any]) -> None:
    config, name = opened.config, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[opened.config.model_type]]
    attention = set(config.attention_layers)
    heads = [config.num_key_value_heads if i in attention else 0 for i in range(config.num_hidden_layers)]
    stated: dict[str, Any] = {
        f"{name}.vocab_size": config.vocab_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": heads,
        f"{name}.rope.freq_base": config.rope_theta,
        f"{name}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{name}.shortconv.l_cache": config.conv_L_cache,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id[0] if config.eos_token_id else None,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
    }
    if config.moe_layers:
        stated |= {
            f"{name}.expert_count": config.num_experts,
            f"{name}.expert_used_count": config.num_experts_per_tok,
            f"{name}.expert_feed_forward_length": config.moe_intermediate_size,
            f"{name}.leading_dense_block_count": config.num_dense_layers,
            f"{name}.expert_gating_func": 2,
        }
    for key, value in (stated | dict(changed)).items():
        _add(writer, key, value)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
