"""Decides how every weight of a checkpoint is stored in an ONNX artifact; nothing is read or computed here.

In: a model's config and a scheme. Out: a ``WeightPlan``: one ``StoredWeight`` per weight of the graph, naming the
checkpoint tensors that it is made of, its format, and the shape and dtype of each initializer. The lowering makes fake
parameters from it, the weight writer fills the data file from it, parity reads the file back through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from lfm2_export.config import ModelConfig
from lfm2_export.errors import QuantizationError
from lfm2_export.families import get_family
from lfm2_export.families.tensors import (
    EMBEDDING,
    HEAD,
    ModelTensor,
    Part,
    TensorClass,
    expert_stacks,
    feed_forward_prefix,
)
from lfm2_export.quant.formats import FloatFormat, IntFormat, WeightFormat
from lfm2_export.quant.schemes import Scheme, check_patterns


class Layout(Enum):
    """How the values of a weight are arranged in its initializers."""

    PLAIN = "plain"  # as in the checkpoint
    TRANSPOSED = "transposed"  # [in, out], for MatMul
    MATMUL = "matmul"  # MatMulNBits
    TABLE = "table"  # GatherBlockQuantized, or the same bytes read by a tied head
    GATE_UP = "gate_up"  # all experts' w1 and w3, rows interleaved
    DOWN = "down"  # all experts' w2


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """One weight of the graph.

    ``name`` prefixes its initializers; ``sources`` are checkpoint tensors (for experts: w1, w3 of expert 0, then 1,
    ...); ``part``, ``layer`` and ``matrix`` say what it is, as in ``ModelTensor``; ``shape`` is [rows, columns] of the
    matrix, [experts, rows, columns] of stacked experts, or the plain tensor's. ``same_bytes_as`` names the weight whose
    bytes this one shares.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout
    format: WeightFormat
    part: Part
    layer: int | None = None
    matrix: str | None = None
    reason: str = ""
    same_bytes_as: str | None = None

    def storage(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each initializer, by its role: weight, or qdata, scale and zero_point."""
        if isinstance(self.format, FloatFormat):
            shape = self.shape[::-1] if self.layout is Layout.TRANSPOSED else self.shape
            return {"weight": (shape, np.dtype(self.format.dtype))}
        return self._packed(self.format)

    def _packed(self, form: IntFormat) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        *outer, columns = self.shape
        groups = columns // form.group_size
        blob = (
            (groups, form.group_size * form.bits // 8) if self.layout is Layout.MATMUL else (columns * form.bits // 8,)
        )
        found = {
            "qdata": ((*outer, *blob), np.dtype(np.uint8)),
            "scale": ((*outer, groups), np.dtype(form.scale_dtype)),
        }
        if not form.symmetric:
            found["zero_point"] = ((*outer, -(-groups * form.bits // 8)), np.dtype(np.uint8))
        return found

    def initializer(self, role: str) -> str:
        """The graph's name for the initializer of a role; plain tensors keep the checkpoint's name."""
        return self.name if self.layout is Layout.PLAIN else f"{self.name}.{role}"

    def nbytes(self) -> int:
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.storage().values())


@dataclass(frozen=True, kw_only=True)
class WeightPlan(Mapping[str, StoredWeight]):
    """Every ``StoredWeight`` by name, and the numbers that the operators need beside them."""

    weights: dict[str, StoredWeight]
    activation_dtype: str
    accuracy_level: int

    def __getitem__(self, name: str) -> StoredWeight:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def nbytes(self) -> int:
        """Bytes of the data file without alignment; shared bytes count once."""
        return sum(weight.nbytes() for weight in self.weights.values() if weight.same_bytes_as is None)


def make_plan(config: ModelConfig, scheme: Scheme) -> WeightPlan:
    """The plan for one checkpoint under one scheme.

    Raises:
        QuantizationError: a width is no multiple of the group size, or an excluding pattern matches nothing.
    """
    planner = _Planner(config, scheme)
    weights = {weight.name: weight for weight in planner.weights()}
    for weight in weights.values():
        if isinstance(weight.format, IntFormat):
            weight.format.groups(weight.shape[-1], weight.name)
    return WeightPlan(weights=weights, activation_dtype=scheme.activation_dtype, accuracy_level=scheme.accuracy_level)


class _Planner:
    """Walks a checkpoint's tensors in their order."""

    def __init__(self, config: ModelConfig, scheme: Scheme):
        self.config, self.scheme = config, scheme
        self.tensors = get_family(config.model_type).tensors(config)

    def weights(self) -> Iterator[StoredWeight]:
        check_patterns(self.scheme.exclude, self.tensors)
        for tensor in self.tensors.values():
            if tensor.kind is not TensorClass.EXPERTS:
                yield self._single(tensor)
        for layer, matrices in expert_stacks(self.tensors).items():
            yield from self._experts(layer, matrices)
        if self.config.tie_word_embeddings:
            yield self._tied_head()

    def _format(self, tensor: ModelTensor) -> tuple[WeightFormat, str]:
        choice = self.scheme.format_for(tensor)
        if tensor.kind in (TensorClass.ROUTER, TensorClass.EXPERT_BIAS):
            # fp16 scores tie now and then, and a tie picks another expert than the model would.
            return FloatFormat(dtype="float32"), choice.reason
        return choice.format, choice.reason

    def _single(self, tensor: ModelTensor) -> StoredWeight:
        form, reason = self._format(tensor)
        layout = _layout(tensor.kind, form)
        return StoredWeight(
            name=tensor.name if layout is Layout.PLAIN else _stem(tensor.name),
            sources=(tensor.name,),
            shape=tensor.shape,
            layout=layout,
            format=form,
            part=tensor.part,
            layer=tensor.layer,
            matrix=tensor.matrix,
            reason=reason,
        )

    def _experts(self, layer: int, matrices: Mapping[tuple[int, str], ModelTensor]) -> Iterator[StoredWeight]:
        config = self.config
        inner, width, experts = config.moe_intermediate_size, config.hidden_size, config.num_experts
        form, reason = self._experts_format(list(matrices.values()))
        for name, taken, rows, columns, layout in (
            ("gate_up", ("w1", "w3"), 2 * inner, width, Layout.GATE_UP),
            ("down", ("w2",), width, inner, Layout.DOWN),
        ):
            yield StoredWeight(
                name=f"{feed_forward_prefix(layer)}experts.{name}",
                sources=tuple(matrices[expert, matrix].name for expert in range(experts) for matrix in taken),
                shape=(experts, rows, columns),
                layout=layout,
                format=form,
                part=Part.EXPERTS,
                layer=layer,
                matrix=name,
                reason=reason,
            )

    def _experts_format(self, tensors: Sequence[ModelTensor]) -> tuple[WeightFormat, str]:
        """One format for a layer's experts: one operator holds them all."""
        choices = {self._format(tensor) for tensor in tensors}
        if len({form for form, _ in choices}) > 1:
            raise QuantizationError(
                f"{tensors[0].name}: --exclude names some experts of this layer and not others, but QMoE holds all of "
                "them in one format; exclude the whole layer (model.layers.N.feed_forward.experts.*)"
            )
        form, reason = min(choices, key=lambda choice: choice[1])
        sizes = (self.config.moe_intermediate_size, self.config.hidden_size)
        if isinstance(form, IntFormat) and form.group_size in sizes:
            # onnxruntime 1.30's QMoE misreads 4-bit zero points where a row is a single group (measured; 1.31 is
            # right).
            form = replace(form, symmetric=True, signed_scale=True)
        return form, reason

    def _tied_head(self) -> StoredWeight:
        form, reason = self._format(self.tensors[EMBEDDING])
        return StoredWeight(
            name=_stem(HEAD),
            sources=(EMBEDDING,),
            shape=(self.config.vocab_size, self.config.hidden_size),
            layout=Layout.MATMUL if isinstance(form, IntFormat) else Layout.TABLE,
            format=form,
            part=Part.HEAD,
            reason=reason,
            same_bytes_as=_stem(EMBEDDING),
        )


def _stem(name: str) -> str:
    """What the initializers of a matrix are called after."""
    return name.removesuffix(".weight")


def _layout(kind: TensorClass, form: WeightFormat) -> Layout:
    if kind is TensorClass.EMBEDDING:
        return Layout.TABLE
    if kind in (TensorClass.LINEAR, TensorClass.HEAD) and isinstance(form, IntFormat):
        return Layout.MATMUL
    if kind is TensorClass.HEAD:
        return Layout.TABLE  # never transposed: a vocabulary's table is too large to hold twice
    return Layout.TRANSPOSED if kind in (TensorClass.LINEAR, TensorClass.ROUTER) else Layout.PLAIN
