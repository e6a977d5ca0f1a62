"""Decides how every weight of a checkpoint is stored in a program; nothing is read or computed here.

In: a model's config, a scheme, and what a backend can store (``Storage``). Out: a ``WeightPlan``: one ``StoredWeight``
per weight, naming the checkpoint tensors that it is made of, its format and the reason for it, and the shape and dtype
of each of its tensors. The lowering takes its parameters' shapes from it, the stream fills files from it (``stream``),
and benchmarks count its bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Protocol

import numpy as np

from lfm2_export.config import ModelConfig
from lfm2_export.families import get_family
from lfm2_export.families.tensors import (
    EMBEDDING,
    HEAD,
    ModelTensor,
    Part,
    TensorClass,
    Tensors,
    expert_stacks,
    feed_forward_prefix,
)
from lfm2_export.quant.formats import IntFormat, WeightFormat
from lfm2_export.quant.schemes import FormatChoice, Scheme, check_patterns

# Shape and dtype of each tensor of a weight, by its role: weight, or qdata, scale and zero_point.
Roles = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


class Layout(Protocol):
    """How a backend arranges the values of a weight in its tensors; one of an enumeration of the backend's."""

    @property
    def is_whole(self) -> bool:
        """Whether it is made in one piece: its rows cannot be put into place some at a time."""

    @property
    def interleaved(self) -> int:
        """Of how many sources the rows alternate."""

    @property
    def is_bare(self) -> bool:
        """Whether its one tensor goes by the weight's own name."""

    def roles(self, shape: tuple[int, ...], form: WeightFormat) -> Roles:
        """The tensors of a weight of this shape."""


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """One weight of a program.

    ``name`` is what its tensors are called after; ``sources`` are checkpoint tensors (for stacked experts: w1, w3 of
    expert 0, then 1, ...); ``part``, ``layer`` and ``matrix`` say what it is, as in ``ModelTensor``; ``shape`` is
    [rows, columns] of the matrix, [experts, rows, columns] of stacked experts, or the plain tensor's.
    ``same_bytes_as`` names the weight whose bytes this one shares.
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

    def storage(self) -> Roles:
        """Shape and dtype of each of its tensors, by role."""
        return self.layout.roles(self.shape, self.format)

    def tensor(self, role: str) -> str:
        """The name of the tensor of a role."""
        return self.name if self.layout.is_bare else f"{self.name}.{role}"

    def multiplied(self, source: str) -> str:
        """The name under which the input of a source is known: that of a copy which is a tied head is the head's."""
        return HEAD if self.part is Part.HEAD else source

    def nbytes(self) -> int:
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.storage().values())


@dataclass(frozen=True, kw_only=True)
class WeightPlan(Mapping[str, StoredWeight]):
    """Every ``StoredWeight`` by name, in the order of the work. ``table_bytes``: RoPE's tables beside them."""

    config: ModelConfig
    scheme: Scheme
    weights: Mapping[str, StoredWeight]
    table_bytes: int = 0

    def __getitem__(self, name: str) -> StoredWeight:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def activation_dtype(self) -> str:
        return self.scheme.activation_dtype

    @property
    def accuracy_level(self) -> int:
        return self.scheme.accuracy_level

    def nbytes(self) -> int:
        """Bytes of its tensors without alignment; shared bytes count once."""
        return sum(weight.nbytes() for weight in self.weights.values() if weight.same_bytes_as is None)

    def bytes_of(self, weight: StoredWeight) -> int:
        """Bytes that a weight of it, or one like it, takes in the finished program."""
        return weight.nbytes()

    def takes(self, weight: StoredWeight) -> bool:
        """Whether the operators take a weight like one of it in the format that it has now."""
        form = weight.format
        return not isinstance(form, IntFormat) or weight.shape[-1] % form.group_of(weight.shape[-1]) == 0


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Matrices of all experts of a layer as one weight: ``matrices`` of each, by its name in the block."""

    name: str
    matrices: tuple[str, ...]


class Storage(ABC):
    """What a backend can store, and how: all in which its plans differ from another's.

    ``stacks``: how a layer's experts are put together; where there are none, each matrix is a weight of its own.
    ``shares_tied_head``: whether a head that is tied to the token table reads the table's bytes; else it is a copy.
    """

    stacks: Sequence[Stack] = ()
    shares_tied_head: bool = False

    @abstractmethod
    def layout(self, kind: TensorClass, form: WeightFormat, matrix: str | None) -> Layout:
        """The layout of a weight; ``matrix`` is a stack's name for stacked experts."""

    def name(self, tensor: ModelTensor, layout: Layout) -> str:
        """What the tensors of a weight that is no stack are called after."""
        return tensor.name

    def choose(self, tensor: ModelTensor, choice: FormatChoice) -> FormatChoice:
        """The format that a tensor gets where the scheme's choice is not what the operators take."""
        return choice

    def choose_for_stack(self, choices: Mapping[str, FormatChoice], tensors: Sequence[ModelTensor]) -> FormatChoice:
        """The one format of stacked experts."""
        raise NotImplementedError

    def check(self, weight: StoredWeight) -> None:
        """Refuses a weight that cannot be stored: one whose rows are no whole number of groups."""
        if isinstance(weight.format, IntFormat):
            weight.format.groups(weight.shape[-1], weight.name)


def make_plan(config: ModelConfig, scheme: Scheme, storage: Storage) -> WeightPlan:
    """The plan for one checkpoint under one scheme.

    Raises:
        QuantizationError: a width does not fit the group size, or an excluding pattern matches nothing.
    """
    planner = _Planner(config, scheme, storage)
    weights = {weight.name: weight for weight in planner.weights()}
    for weight in weights.values():
        storage.check(weight)
    return WeightPlan(config=config, scheme=scheme, weights=weights)


class _Planner:
    """Walks a checkpoint's tensors in their order; stacked experts follow the others, a tied head comes last."""

    def __init__(self, config: ModelConfig, scheme: Scheme, storage: Storage):
        self.config, self.scheme, self.storage = config, scheme, storage
        self.tensors: Tensors = get_family(config.model_type).tensors(config)
        check_patterns(scheme.exclude, self.tensors)
        self.choices = {name: self._choose(tensor) for name, tensor in self.tensors.items()}

    def _choose(self, tensor: ModelTensor) -> FormatChoice:
        return self.storage.choose(tensor, self.scheme.format_for(tensor))

    def weights(self) -> Iterator[StoredWeight]:
        stacks = self.storage.stacks
        for tensor in self.tensors.values():
            if tensor.kind is not TensorClass.EXPERTS or not stacks:
                yield self._single(tensor, self.choices[tensor.name])
        if stacks:
            for layer, matrices in expert_stacks(self.tensors).items():
                yield from self._stacked(layer, matrices)
        if self.config.tie_word_embeddings:
            yield self._tied_head()

    def _single(self, tensor: ModelTensor, choice: FormatChoice) -> StoredWeight:
        layout = self.storage.layout(tensor.kind, choice.format, tensor.matrix)
        return StoredWeight(
            name=self.storage.name(tensor, layout),
            sources=(tensor.name,),
            shape=tensor.shape,
            layout=layout,
            format=choice.format,
            part=tensor.part,
            layer=tensor.layer,
            matrix=tensor.matrix,
            reason=choice.reason,
        )

    def _stacked(self, layer: int, matrices: Mapping[tuple[int, str], ModelTensor]) -> Iterator[StoredWeight]:
        tensors = list(matrices.values())
        choice = self.storage.choose_for_stack({one.name: self.choices[one.name] for one in tensors}, tensors)
        experts = range(self.config.num_experts)
        for stack in self.storage.stacks:
            rows, columns = matrices[0, stack.matrices[0]].shape
            yield StoredWeight(
                name=f"{feed_forward_prefix(layer)}experts.{stack.name}",
                sources=tuple(matrices[expert, matrix].name for expert in experts for matrix in stack.matrices),
                shape=(len(experts), len(stack.matrices) * rows, columns),
                layout=self.storage.layout(TensorClass.EXPERTS, choice.format, stack.name),
                format=choice.format,
                part=Part.EXPERTS,
                layer=layer,
                matrix=stack.name,
                reason=choice.reason,
            )

    def _tied_head(self) -> StoredWeight:
        """Made of the token table; in the table's format where it reads the table's bytes or the user excluded that."""
        table = self.tensors[EMBEDDING]
        head = replace(table, name=HEAD, kind=TensorClass.HEAD, part=Part.HEAD)
        is_excluded = any(fnmatchcase(EMBEDDING, pattern) for pattern in self.scheme.exclude)
        shares = self.storage.shares_tied_head
        weight = self._single(head, self.choices[EMBEDDING] if shares or is_excluded else self._choose(head))
        owner = self._single(table, self.choices[EMBEDDING]).name if shares else None
        return replace(weight, sources=(EMBEDDING,), same_bytes_as=owner)
