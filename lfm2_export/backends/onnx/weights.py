"""Where an ONNX program's weights lie in its data files, and how they are packed on the way there.

In: a ``WeightPlan``. Out: the place of every initializer, known before anything is read; the ``Packing`` with which
``WeightStream`` fills the files; and graphs whose initializers point at their places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from lfm2_export.backends.onnx.packing import empty_rows, pack_chunk
from lfm2_export.backends.onnx.plan import ROPE_TABLES, Layout
from lfm2_export.backends.weights.pieces import Placement
from lfm2_export.backends.weights.plan import StoredWeight, WeightPlan
from lfm2_export.config import ModelConfig
from lfm2_export.models.decoder import rope_tables
from lfm2_export.quant.formats import IntFormat
from lfm2_export.quant.groups import Chunk

# onnxruntime maps external tensors; a large one must start where every platform can map (Windows: 64 KiB).
LARGE, LARGE_ALIGNMENT, SMALL_ALIGNMENT = 1 << 20, 1 << 16, 64
# A browser cannot hold an ArrayBuffer of 2 GiB or more, so a data file ends before that.
MAX_FILE_BYTES = 2_000_000_000


class OnnxPacking:
    """Packed as the operators read it, chunk by chunk (``packing``)."""

    def empty(self, weight: StoredWeight, form: IntFormat, rows: int) -> dict[str, np.ndarray]:
        return empty_rows(form, rows, weight.shape[-1])

    def pack(self, chunk: Chunk, rows: slice, room: dict[str, np.ndarray]) -> None:
        pack_chunk(chunk, rows, room)

    def packed(self, weight: StoredWeight, room: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return room

    def numbers(self, weight: StoredWeight, values: np.ndarray) -> dict[str, np.ndarray]:
        return {"weight": values.T if weight.layout is Layout.TRANSPOSED else values}


def computed_tensors(config: ModelConfig) -> dict[str, Callable[[], np.ndarray]]:
    """What is in the data files beside the checkpoint's weights: RoPE's tables, by name."""
    if config.drafter is not None:  # whose graph computes them: it knows no last position
        return {}
    return {
        name: partial(_rope_table, config, kind, index)
        for kind in config.ropes
        for index, name in enumerate(ROPE_TABLES[kind].values())
    }


def _rope_table(config: ModelConfig, kind: str, index: int) -> np.ndarray:
    found: np.ndarray = rope_tables(config, kind)[index].numpy()
    return found


def data_file_names(program: str, placements: Mapping[str, Placement]) -> list[str]:
    """``model_q4.onnx_data``, ``model_q4.onnx_data_1``, ...: as Transformers.js looks for them."""
    count = 1 + max(placement.file for placement in placements.values())
    return [f"{program}_data" + (f"_{index}" if index else "") for index in range(count)]


def data_file_sizes(names: Sequence[str], placements: Mapping[str, Placement]) -> dict[str, int]:
    """The bytes of each data file when it is complete."""
    return {
        name: max(there.end for there in placements.values() if there.file == index) for index, name in enumerate(names)
    }


def place(plan: WeightPlan, config: ModelConfig) -> dict[str, Placement]:
    """The place of every initializer, in the plan's order; weights that share bytes share their place."""
    placements: dict[str, Placement] = {}
    cursor = _Cursor()
    for weight in plan.values():
        for role, (shape, dtype) in weight.storage().items():
            if weight.same_bytes_as is None:
                placements[weight.tensor(role)] = cursor.take(shape, dtype)
    for weight in plan.values():
        if weight.same_bytes_as is not None:
            owner = plan[weight.same_bytes_as]
            for role, (shape, dtype) in weight.storage().items():
                there = placements[owner.tensor(role)]
                placements[weight.tensor(role)] = Placement(
                    file=there.file, offset=there.offset, shape=shape, dtype=dtype
                )
    for name in computed_tensors(config):
        shape = (config.max_position_embeddings, config.head_dim // 2)
        placements[name] = cursor.take(shape, np.dtype(plan.activation_dtype))
    return placements


class _Cursor:
    """The next free byte."""

    def __init__(self) -> None:
        self.file, self.offset = 0, 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Placement:
        nbytes = prod(shape) * dtype.itemsize
        alignment = LARGE_ALIGNMENT if nbytes >= LARGE else SMALL_ALIGNMENT
        start = -(-self.offset // alignment) * alignment
        if start and start + nbytes > MAX_FILE_BYTES:
            self.file, start = self.file + 1, 0
        self.offset = start + nbytes
        return Placement(file=self.file, offset=start, shape=shape, dtype=dtype)


def attach(model: ir.Model, placements: Mapping[str, Placement], files: Sequence[str]) -> int:
    """Points the graph's initializers at their places; returns how many."""
    for name, value in model.graph.initializers.items():
        if name in placements:
            there = placements[name]
            value.const_value = ir.ExternalTensor(
                location=files[there.file],
                offset=there.offset,
                length=there.nbytes,
                dtype=ir.DataType.from_numpy(there.dtype),
                shape=ir.Shape(there.shape),
                name=name,
            )
    return sum(name in placements for name in model.graph.initializers)
