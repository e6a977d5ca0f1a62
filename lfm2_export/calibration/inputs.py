"""Which inputs of a model are measured, and which weights each of them serves.

In: what a family says of its tensors. Out: an ``Input`` for everything that a matrix is multiplied with. Matrices that
share an input (q, k and v; w1 and w3) share its statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lfm2_export.config import ModelConfig
from lfm2_export.families.tensors import EMBEDDING, HEAD, ModelTensor, Part, TensorClass, Tensors, input_name

_MEASURED = (TensorClass.LINEAR, TensorClass.EXPERTS, TensorClass.HEAD)


@dataclass(frozen=True, kw_only=True)
class Input:
    """What some matrices of one block multiply: ``width`` numbers a token. ``name`` is that of the first of them,
    ``serves`` are all. The head's input belongs to no layer."""

    name: str
    width: int
    layer: int | None
    expert: int | None
    serves: tuple[str, ...]


def inputs(config: ModelConfig, tensors: Tensors) -> dict[str, Input]:
    """Every input by name, in the tensors' order. A head that is tied to the token table has one, though no tensor."""
    found: dict[str, Input] = {}
    for tensor in _measured(config, tensors):
        name = input_name(tensor)
        here = found.setdefault(
            name,
            Input(name=name, width=tensor.shape[-1], layer=tensor.layer, expert=tensor.expert, serves=()),
        )
        found[name] = replace(here, serves=(*here.serves, tensor.name))
    return found


def _measured(config: ModelConfig, tensors: Tensors) -> Iterable[ModelTensor]:
    yield from (tensor for tensor in tensors.values() if tensor.kind in _MEASURED)
    if config.tie_word_embeddings:
        yield replace(tensors[EMBEDDING], name=HEAD, kind=TensorClass.HEAD, part=Part.HEAD)


def by_weight(inputs: Mapping[str, Input]) -> dict[str, str]:
    """The input's name of every weight that has one."""
    return {weight: one.name for one in inputs.values() for weight in one.serves}
