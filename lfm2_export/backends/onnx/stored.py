"""Reads the weights that an ONNX program really computes with, back out of its graph and data files.

In: a program's folder and the model's config. Out: ``StoredWeights``, a source for ``models/loading.py`` with float32
values under the published names, so that the eager model can be run with exactly what the artifact holds.

The graph is the only witness: offsets, bits, group sizes and zero points are taken from the initializers and from the
nodes that read them, and codes are taken apart here, not by the writer's plan or packing. So a wrong offset, a
swapped layout or a zero point that no node is given shows up as a difference. How each operator reads its bytes:
``packing.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

from lfm2_export.backends.onnx.variants import choose
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ArtifactError
from lfm2_export.families import Family, get_family
from lfm2_export.families.tensors import EMBEDDING, HEAD, ModelTensor, feed_forward_prefix
from lfm2_export.manifest import Program

_STACK = {"w1": "gate_up", "w3": "gate_up", "w2": "down"}
# (scale, zero point) among the inputs, by operator and the input that holds the codes.
_SCALES = {
    ("MatMulNBits", 1): (2, 3),  # com.microsoft's and ours
    ("GatherBlockQuantized", 0): (2, 3),
    ("QMoE", 2): (3, 11),
    ("QMoE", 5): (6, 12),
    ("SparseMoe", 3): (4, 5),
    ("SparseMoe", 6): (7, 8),
    **{(operator, index): (index + 1, index + 2) for operator in ("FeedForward", "Projections") for index in (1, 4, 7)},
}
# What bits and group size are called, where not "bits" and "block_size".
_BITS = {("QMoE", 2): "expert_weight_bits", ("QMoE", 5): "expert_weight_bits", ("FeedForward", 7): "down_bits"}
_GROUP_SIZE = {("FeedForward", 7): "down_block_size"}
# Operators that multiply by a stored matrix as it is; MatMul's is stored [in, out].
_TRANSPOSING = ("MatMul",)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One initializer: where its bytes lie. ``inline`` holds them where the graph does."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path
    offset: int
    inline: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Entries of the first axis."""
        if self.inline is not None:
            return self.inline.reshape(self.shape)[start:stop]
        each = math.prod(self.shape[1:])
        count = (stop - start) * each
        values = np.fromfile(self.path, self.dtype, count, offset=self.offset + start * each * self.dtype.itemsize)
        if values.size != count:
            raise ArtifactError(f"{self.path}: ends inside {self.name}; export again")
        return values.reshape(-1, *self.shape[1:])

    def as_rows(self, count: int) -> Stored:
        """The same bytes as [count, columns]."""
        return replace(self, shape=(count, math.prod(self.shape) // count))


@dataclass(frozen=True, kw_only=True)
class FloatMatrix:
    """A weight stored as numbers; ``transposed``: as [columns, rows]."""

    values: Stored
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape[::-1] if self.transposed else self.values.shape

    @property
    def dtype(self) -> str:
        return self.values.dtype.name

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows (entries of the first axis) as float32."""
        if self.transposed:
            return np.ascontiguousarray(self.values.rows(0, self.values.shape[0]).T[start:stop], np.float32)
        return self.values.rows(start, stop).astype(np.float32)

    def stacked(self) -> FloatMatrix:
        """[experts, rows, columns] as one matrix, the experts' rows one below the other."""
        return replace(self, values=self.values.as_rows(math.prod(self.shape[:-1])))


@dataclass(frozen=True, kw_only=True)
class IntMatrix:
    """A weight stored as codes in groups along its rows; the parts are [rows, ...], all experts' rows numbered
    through."""

    qdata: Stored
    scale: Stored
    zero_point: Stored | None
    bits: Literal[4, 8]
    group_size: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return f"int{self.bits}"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32: (code - zero point) * scale."""
        scale = self.scale.rows(start, stop).astype(np.float32)
        groups = scale.shape[1]
        codes = _codes(self.qdata.rows(start, stop), self.bits)[:, : groups * self.group_size]
        points: np.ndarray | int = 1 << (self.bits - 1)
        if self.zero_point is not None:
            points = _codes(self.zero_point.rows(start, stop), self.bits)[:, :groups, None].astype(np.float32)
        values = codes.reshape(-1, groups, self.group_size).astype(np.float32)
        values -= points
        values *= scale[:, :, None]
        return values.reshape(-1, groups * self.group_size)

    def stacked(self) -> IntMatrix:
        return replace(self, shape=(math.prod(self.shape[:-1]), self.shape[-1]))


def _codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of uint8 rows; of two in a byte the lower half comes first."""
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A published tensor: every ``step``-th row of a stored matrix from ``first`` on."""

    matrix: FloatMatrix | IntMatrix
    shape: tuple[int, ...]
    first: int = 0
    step: int = 1

    @property
    def dtype(self) -> str:
        return self.matrix.dtype

    def read(self, rows: slice | None) -> np.ndarray:
        start, stop, _ = (rows or slice(None)).indices(self.shape[0])
        begin, end = self.first + start * self.step, self.first + (stop - 1) * self.step + 1
        return self.matrix.read(begin, end)[:: self.step].reshape(-1, *self.shape[1:])


class StoredWeights:
    """The weights of one graph, as ``models.loading.WeightSource``.

    Args:
        graph_path: the graph; its data files lie beside it.
        config: of the model that the graph was made of.

    Raises:
        ArtifactError: a weight of the model is not in the graph, or lies outside the graph's folder.
    """

    def __init__(self, graph_path: Path, config: ModelConfig):
        self.config = config
        self.family: Family = get_family(config.model_type)
        self._graph = _Graph(graph_path)
        published = self.family.tensors(config)
        self.tensors: Mapping[str, Tensor] = {name: self._tensor(tensor) for name, tensor in published.items()}
        if config.tie_word_embeddings:
            self._check_tied_head()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or a range of its first axis, as float32."""
        return self.tensors[name].read(rows)

    def _tensor(self, tensor: ModelTensor) -> Tensor:
        if tensor.layer is not None and tensor.expert is not None and tensor.matrix is not None:
            return self._expert(tensor, tensor.layer, tensor.expert, tensor.matrix)
        matrix = self._graph.matrix(tensor.name.removesuffix(".weight"), tensor.name)
        self._graph.check_shape(tensor.name, matrix.shape, tensor.shape)
        return Tensor(matrix=matrix, shape=tensor.shape)

    def _expert(self, tensor: ModelTensor, layer: int, expert: int, part: str) -> Tensor:
        """w1 and w3 are the even and the odd rows of one matrix per expert, w2 is a matrix of its own."""
        matrix = self._graph.matrix(f"{feed_forward_prefix(layer)}experts.{_STACK[part]}", tensor.name)
        step = 1 if part == "w2" else 2
        rows = tensor.shape[0] * step
        self._graph.check_shape(tensor.name, matrix.shape, (self.config.num_experts, rows, tensor.shape[1]))
        return Tensor(matrix=matrix.stacked(), shape=tensor.shape, first=expert * rows + (part == "w3"), step=step)

    def _check_tied_head(self) -> None:
        """A tied head is no tensor of its own, so the eager model cannot show that its bytes are others."""
        embedding, head = (self._graph.matrix(name.removesuffix(".weight"), name) for name in (EMBEDDING, HEAD))
        if _bytes_of(embedding) != _bytes_of(head):
            raise ArtifactError(
                f"{self._graph.path}: lm_head does not read the bytes of the embedding it is tied to; export again"
            )


def _bytes_of(matrix: FloatMatrix | IntMatrix) -> tuple[object, ...]:
    """What a matrix is made of: places, and how codes are read."""
    if isinstance(matrix, FloatMatrix):
        return (*_place(matrix.values), matrix.transposed)
    parts = (matrix.qdata, matrix.scale, matrix.zero_point)
    return (*(part and _place(part) for part in parts), matrix.bits, matrix.group_size)


def _place(stored: Stored) -> tuple[object, ...]:
    return stored.path, stored.offset, math.prod(stored.shape), stored.dtype


class _Graph:
    """A graph's initializers, and which node reads each of them at which input."""

    def __init__(self, path: Path):
        self.path = path
        model = onnx.load(path, load_external_data=False)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._readers: dict[str, tuple[onnx.NodeProto, int]] = {}
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name in self._initializers:
                    self._readers.setdefault(name, (node, index))

    def matrix(self, stem: str, published: str) -> FloatMatrix | IntMatrix:
        """The weight called ``stem``: its ``.qdata`` with scales, its ``.weight``, or the tensor of that very name."""
        if f"{stem}.qdata" in self._readers:
            return self._quantized(f"{stem}.qdata")
        name = next((name for name in (published, f"{stem}.weight", stem) if name in self._readers), None)
        if name is None:
            raise ArtifactError(f"{self.path}: no node reads {published}; export again")
        node, index = self._readers[name]
        return FloatMatrix(values=self.stored(name), transposed=node.op_type in _TRANSPOSING and index == 1)

    def _quantized(self, name: str) -> IntMatrix:
        node, index = self._readers[name]
        if (node.op_type, index) not in _SCALES:
            raise ArtifactError(f"{self.path}: {name} is read by {node.op_type}, which is not known; export again")
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        scale_index, point_index = _SCALES[node.op_type, index]
        point = node.input[point_index] if point_index < len(node.input) else ""
        scale = self.stored(node.input[scale_index])
        outer, groups = scale.shape[:-1], scale.shape[-1]
        rows = math.prod(outer)
        group_size = attributes[_GROUP_SIZE.get((node.op_type, index), "block_size")]
        return IntMatrix(
            qdata=self.stored(name).as_rows(rows),
            scale=scale.as_rows(rows),
            zero_point=self.stored(point).as_rows(rows) if point else None,
            bits=attributes[_BITS.get((node.op_type, index), "bits")],
            group_size=group_size,
            shape=(*outer, groups * group_size),
        )

    def stored(self, name: str) -> Stored:
        tensor = self._initializers[name]
        shape, dtype = tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if not external_data_helper.uses_external_data(tensor):
            values = numpy_helper.to_array(tensor)
            return Stored(name=name, shape=shape, dtype=values.dtype, path=self.path, offset=0, inline=values)
        entries: dict[str, Any] = {entry.key: entry.value for entry in tensor.external_data}
        return Stored(
            name=name,
            shape=shape,
            dtype=dtype,
            path=self._data_file(entries["location"]),
            offset=int(entries.get("offset", 0)),
        )

    def _data_file(self, location: str) -> Path:
        if location in ("", ".", "..") or set(location) & set("/\\:\0"):
            raise ArtifactError(f"{self.path}: names the data file {location!r}, which is not beside it; export again")
        return self.path.parent / location

    def check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise ArtifactError(
                f"{self.path}: {name} is stored as {list(found)}, its config asks for {list(expected)}; export again"
            )


def open_stored(folder: Path, program: Program, config: ModelConfig) -> StoredWeights:
    """The weights of the graph that the runner opens."""
    return StoredWeights(choose(folder, program).path, config)
