"""A checkpoint as a .gguf of float32, for llama-quantize to read, and what it made of it back under published names.

In: a checkpoint. Out: a .gguf without a vocabulary; or the values that a .gguf's tensors stand for, by our own reader,
and their bits.
"""

from __future__ import annotations

from pathlib import Path

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
    for name, tensors in stacks(checkpoint).items():
        values = [checkpoint.read(tensor.name).astype(np.float32).squeeze() for tensor in tensors]
        writer.add_tensor(name, values[0] if tensors[0].expert is None else np.stack(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized(path: Path) -> dict[str, FloatArray]:
    """The values of every quantized tensor, by published name."""
    opened = open_checkpoint(path)
    return {name: opened.read(name) for name, info in opened.tensors.items() if info.dtype not in PLAIN}


def stored_bits(path: Path) -> tuple[float, float]:
    """Bits a weight of the file's tensors: all, and what a decode step reads."""
    size = stored_size(open_checkpoint(path))
    return size.file_bits, size.step_bits
