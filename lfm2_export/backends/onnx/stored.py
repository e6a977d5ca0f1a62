"""Reads the weights that an ONNX program really computes with, back out of its graph and data files.

In: a program's folder and the model's config. Out: ``StoredWeights``, a source for ``models/loading.py`` with float32
values under the published names, so that the eager model can be run with exactly what the artifact holds.

The graph is the only witness: offsets, bits, group sizes and zero points are taken from the initializers and from the
nodes that read them, and codes are taken apart here, not by the writer's plan or packing. So a wrong offset, a
swapped layout or a zero point that no node is given shows up as a difference. How each operator reads its bytes:
``packing.py``. What the graph says of an initializer is checked where it is read (``initializers.py``), what its nodes
say here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from lfm2_export import paths
from lfm2_export.backends.onnx.initializers import GraphFile, Stored
from lfm2_export.backends.onnx.variants import choose
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ArtifactError
from lfm2_export.families import Family, get_family
from lfm2_export.families.tensors import EMBEDDING, HEAD, ModelTensor, feed_forward_prefix
from lfm2_export.manifest import Program
from lfm2_export.messages import named, shown

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
# What stands in front of these names where a further matrix of a node is stored otherwise than its first.
_PREFIX = {("FeedForward", 4): "up_", ("Projections", 4): "N1_", ("Projections", 7): "N2_"}
# 255 of them are a float32.
_LARGEST_SCALE = 1e36
# Operators' inputs that are matrices [in, out]: MatMul's, and the router of our experts.
_TRANSPOSED = {("MatMul", 1), ("SparseMoe", 9)}


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
        """Rows as float32: (code - zero point) * scale.

        Raises:
            ArtifactError: a scale is not finite.
        """
        scale = self.scale.rows(start, stop).astype(np.float32)
        if not np.all(np.abs(scale) < _LARGEST_SCALE):
            raise ArtifactError(
                f"{paths.shown(self.scale.path)}: {named(self.scale.name)} has numbers that are not finite; export "
                "again"
            )
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
        ArtifactError: the file is no graph, or a weight of the model is not in it, does not fit, or lies outside the
            graph's folder.
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
            raise self._graph.refusal("lm_head does not read the bytes of the embedding it is tied to")


def _bytes_of(matrix: FloatMatrix | IntMatrix) -> tuple[object, ...]:
    """What a matrix is made of: places, and how codes are read."""
    if isinstance(matrix, FloatMatrix):
        return (*_place(matrix.values), matrix.transposed)
    parts = (matrix.qdata, matrix.scale, matrix.zero_point)
    return (*(part and _place(part) for part in parts), matrix.bits, matrix.group_size)


def _place(stored: Stored) -> tuple[object, ...]:
    return stored.path, stored.offset, math.prod(stored.shape), stored.dtype


class _Graph(GraphFile):
    """A graph's weights by their names."""

    def matrix(self, stem: str, published: str) -> FloatMatrix | IntMatrix:
        """The weight called ``stem``: its ``.qdata`` with scales, its ``.weight``, or the tensor of that very name."""
        if f"{stem}.qdata" in self.readers:
            return self._quantized(f"{stem}.qdata")
        name = next((name for name in (published, f"{stem}.weight", stem) if name in self.readers), None)
        if name is None:
            raise self.refusal(f"no node reads {named(published)}")
        node, index = self.readers[name]
        values = self.stored(name)
        if values.dtype.kind != "f":
            raise self.refusal(f"{named(name)} has bytes where numbers are needed")
        return FloatMatrix(values=values, transposed=(node.op_type, index) in _TRANSPOSED)

    def _quantized(self, name: str) -> IntMatrix:
        """Codes, and the scales and zero points that their node is given; the sizes of all of them fit each other."""
        node, index = self.readers[name]
        operator = (node.op_type, index)
        if operator not in _SCALES:
            raise self.refusal(f"{named(name)} is read by {shown(node.op_type, 40)}, which is not known")
        scale_index, point_index = _SCALES[operator]
        codes, scale = self.stored(name), self._input(node, scale_index)
        point = self._input(node, point_index) if any(node.input[point_index : point_index + 1]) else None
        if scale.dtype.kind != "f" or any(part and part.dtype != np.uint8 for part in (codes, point)):
            raise self.refusal(f"{named(name)} or its scales have the wrong element type")
        prefix = _PREFIX.get(operator, "")
        bits = self._integer(node, _BITS.get(operator, "bits"), prefix)
        group_size = self._integer(node, _GROUP_SIZE.get(operator, "block_size"), prefix)
        if bits not in (4, 8) or group_size < 2 or group_size % 2:
            raise self.refusal(f"{named(name)} has {bits} bits in groups of {group_size}, which is not known")
        outer, groups = scale.shape[:-1], scale.shape[-1]
        rows = math.prod(outer)
        return IntMatrix(
            qdata=self._rows(codes, rows, groups * group_size * bits // 8),
            scale=scale.as_rows(rows),
            zero_point=None if point is None else self._rows(point, rows, -(-groups * bits // 8)),
            bits=4 if bits == 4 else 8,
            group_size=group_size,
            shape=(*outer, groups * group_size),
        )

    def _rows(self, part: Stored, rows: int, nbytes: int) -> Stored:
        """Codes or zero points, ``nbytes`` for each row."""
        if math.prod(part.shape) != rows * nbytes:
            raise self.refusal(
                f"{named(part.name)} is stored as {shown(list(part.shape))}, its scales speak of {rows} rows of "
                f"{nbytes} bytes"
            )
        return part.as_rows(rows)

    def _input(self, node: onnx.NodeProto, index: int) -> Stored:
        if index >= len(node.input):
            raise self.refusal(f"a node {shown(node.op_type, 40)} has {len(node.input)} inputs, not its scales")
        return self.stored(node.input[index])

    def _integer(self, node: onnx.NodeProto, name: str, prefix: str = "") -> int:
        """An attribute: with the prefix where the node has it so, else without."""
        integers = {a.name: int(a.i) for a in node.attribute if a.type == onnx.AttributeProto.INT}
        for known in (f"{prefix}{name}", name):
            if known in integers:
                return integers[known]
        raise self.refusal(f"a node {shown(node.op_type, 40)} does not say its {name}")

    def check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise self.refusal(
                f"{named(name)} is stored as {shown(list(found))}, its config asks for {shown(list(expected))}"
            )


def open_stored(folder: Path, program: Program, config: ModelConfig) -> StoredWeights:
    """The weights of the graph that the runner opens."""
    return StoredWeights(choose(folder, program).path, config)
