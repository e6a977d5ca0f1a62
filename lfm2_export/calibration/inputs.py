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
    ``matrix`` its name in the block, ``serves`` are all. The head's input belongs to no layer."""

    name: str
    width: int
    layer: int | None
    expert: int | None
    matrix: str | None
    serves: tuple[str, ...]

    @property
    def is_inner(self) -> bool:
        """Whether it is made by the block itself, so that another expert's has other numbers in the same places."""
        return self.matrix == "w2"


def inputs(config: ModelConfig, tensors: Tensors) -> dict[str, Input]:
    """Every input by name, in the tensors' order. A head that is tied to the token table has one, though no tensor."""
    found: dict[str, Input] = {}
    for tensor in _measured(config, tensors):
        name = input_name(tensor)
        if name not in found:
            found[name] = Input(
                name=name,
                width=tensor.shape[-1],
                layer=tensor.layer,
                expert=tensor.expert,
                matrix=tensor.matrix,
                serves=(),
            )
        found[name] = replace(found[name], serves=(*found[name].serves, tensor.name))
    return found


def _measured(config: ModelConfig, tensors: Tensors) -> Iterable[ModelTensor]:
    yield from (tensor for tensor in tensors.values() if tensor.kind in _MEASURED)
    if config.tie_word_embeddings:
        yield replace(tensors[EMBEDDING], name=HEAD, kind=TensorClass.HEAD, part=Part.HEAD)


def by_weight(inputs: Mapping[str, Input]) -> dict[str, str]:
    """The input's name of every weight that has one."""
    return {weight: one.name for one in inputs.values() for weight in one.serves}
