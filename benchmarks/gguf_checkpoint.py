"""A checkpoint as a .gguf of float32, for llama.cpp's tools to read, and what they made of it under published names.

In: a checkpoint. Out: a .gguf with its vocabulary, where it has one; or the values that a .gguf's tensors stand for, by
our own reader, and their bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from benchmarks.random_gguf import ARCHITECTURES, add_settings, converted_name
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.families.tensors import ModelTensor
from lfm2_export.gguf.blocks import PLAIN
from lfm2_export.quality.subjects import stored_size
from lfm2_export.quant.formats import FloatArray


def stacks(checkpoint: Checkpoint) -> dict[str, list[ModelTensor]]:
    """The published tensors that each tensor of the file is made of: one, or a matrix of every expert."""
    config, found = checkpoint.config, dict[str, list[ModelTensor]]()
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for tensor in checkpoint.model_tensors.values():
        stored = names.get_name(converted_name(tensor), try_suffixes=(".weight", ".bias"))
        assert stored is not None, tensor.name
        found.setdefault(stored, []).append(tensor)
    return found


def write_gguf(path: Path, checkpoint: Checkpoint) -> Path:
    """Every tensor as float32; all of the model is in memory."""
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    add_settings(writer, config)
    _add_vocabulary(writer, checkpoint)
    for name, tensors in stacks(checkpoint).items():
        values = [checkpoint.read(tensor.name).astype(np.float32).squeeze() for tensor in tensors]
        writer.add_tensor(name, values[0] if tensors[0].expert is None else np.stack(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    path, config = checkpoint.path / "tokenizer.json", checkpoint.config
    if not path.is_file():
        writer.add_tokenizer_model("no_vocab")
        return
    add_tokenizer(writer, json.loads(path.read_text(encoding="utf-8")))
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_id:
        writer.add_eos_token_id(config.eos_token_id[0])


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any]) -> None:
    """A tokenizer.json's vocabulary as conversion writes it."""
    vocabulary = dict(tokenizer["model"]["vocab"])
    added = {one["content"]: one for one in tokenizer["added_tokens"]}
    ids = {index: token for token, index in vocabulary.items()} | {one["id"]: text for text, one in added.items()}
    tokens = [ids[index] for index in range(max(ids) + 1)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list(tokens)
    writer.add_token_types([_kind(added.get(token)) for token in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def _kind(added: Mapping[str, Any] | None) -> gguf.TokenType:
    if added is None:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED


def dequantized(path: Path) -> dict[str, FloatArray]:
    """The values of every quantized tensor, by published name."""
    opened = open_checkpoint(path)
    return {name: opened.read(name) for name, info in opened.tensors.items() if info.dtype not in PLAIN}


def stored_bits(path: Path) -> tuple[float, float]:
    """Bits a weight of the file's tensors: all, and what a decode step reads."""
    size = stored_size(open_checkpoint(path))
    return size.file_bits, size.step_bits
