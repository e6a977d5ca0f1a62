"""A checkpoint as a .gguf of float32, for llama-quantize to read, and what it made of it back under published names.

In: a checkpoint. Out: a .gguf without a vocabulary; or the values that a .gguf's tensors stand for, by the ``gguf``
package's own dequantization, and their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import gguf
import numpy as np

from benchmarks.random_gguf import ARCHITECTURES, add_settings, converted_name
from lfm2_export.backends.weights.widths import Counted
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.families.tensors import ModelTensor
from lfm2_export.quant.formats import FloatArray

_FLOATS = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)


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


def dequantized(path: Path, checkpoint: Checkpoint) -> dict[str, FloatArray]:
    """The values of every quantized tensor, by published name."""
    return dict(_values(path, checkpoint))


def _values(path: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, FloatArray]]:
    sources = stacks(checkpoint)
    for stored in gguf.GGUFReader(path).tensors:
        if stored.tensor_type in _FLOATS:
            continue
        tensors = sources[stored.name]
        values = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(len(tensors), *tensors[0].shape)
        yield from ((tensor.name, one.astype(np.float32)) for tensor, one in zip(tensors, values, strict=True))


def stored_bytes(path: Path, checkpoint: Checkpoint) -> dict[Counted, tuple[int, int]]:
    """Bytes of the file's tensors and the weights in them: all, and what a decode step reads."""
    sources, config = stacks(checkpoint), checkpoint.config
    found = {counted: [0, 0] for counted in Counted}
    for stored in gguf.GGUFReader(path).tensors:
        tensor = sources[stored.name][0]
        sizes = int(stored.n_bytes), prod(map(int, stored.shape))
        share = config.num_experts_per_tok / config.num_experts if tensor.expert is not None else 1
        for index, size in enumerate(sizes):
            found[Counted.FILE][index] += size
            found[Counted.STEP][index] += int(size * share)
    return {counted: (sizes[0], sizes[1]) for counted, sizes in found.items()}
