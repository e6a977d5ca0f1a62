"""A program's weights as far as a caller may know them: names, shapes, counts, and never their values.

In: a model's configuration. Out: what ``parameters()`` and ``get_input_embeddings()`` give. The values are inside the
program, quantized; code that counts parameters or asks one for its device finds the right answer, code that would
compute with them is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from lfm2_export.config import ModelConfig
from lfm2_export.errors import GenerationError
from lfm2_export.families import get_family
from lfm2_export.families.tensors import EMBEDDING, HEAD, TensorClass
from lfm2_export.transformers_options import CPU, IDS_ONLY, AttributeRefusedError

# Of a configuration, what a program does not depend on.
SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "return_dict", "use_cache")

_VALUES = "its values are inside the exported program; the checkpoint has them"
# What is known of a tensor without its values.
_METADATA = frozenset(
    {"dim", "dtype", "element_size", "is_complex", "is_contiguous", "is_floating_point", "itemsize", "nbytes"}
    | {"ndim", "ndimension", "nelement", "numel", "shape", "size", "stride"}
)


class ProgramWeight:
    """One weight of a program: what torch knows of a tensor, without its values.

    Args:
        name: as transformers names it.
        shape: of the matrix that was exported, however the program stores it.
        dtype: what the program computes in.
    """

    device = CPU
    grad = None
    is_cuda = False
    is_meta = False
    is_leaf = True

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype):
        self.name = name
        self._metadata = torch.empty(shape, dtype=dtype, device="meta")

    def __repr__(self) -> str:
        return f"ProgramWeight({self.name}, {list(self._metadata.shape)}, {self._metadata.dtype})"

    def __len__(self) -> int:
        return len(self._metadata)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            raise GenerationError(f"{self.name}: an exported program cannot be trained; train the checkpoint")

    def requires_grad_(self, requires_grad: bool = True) -> ProgramWeight:
        self.requires_grad = requires_grad
        return self

    def __getattr__(self, name: str) -> Any:
        if name in _METADATA:
            return getattr(self._metadata, name)
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeRefusedError(f"{self.name}.{name}: {_VALUES}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise GenerationError(f"{getattr(function, '__name__', function)} of a program's weight: {_VALUES}")


@dataclass(frozen=True, kw_only=True)
class ProgramTable:
    """A program's embedding or head, by its weight [vocabulary, width]."""

    weight: ProgramWeight

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise GenerationError(f"{self.weight.name}: {IDS_ONLY}")


def net_of(config: PreTrainedConfig) -> ModelConfig:
    """What a program computes, from its configuration, without what callers set as they like.

    Raises:
        Lfm2ExportError: it is none of our families', or has a value that is not supported.
    """
    raw = {**config.to_dict(), **dict.fromkeys(SETTINGS)}
    return get_family(config.model_type).parse_config(raw)


def parameter_shapes(config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter's name and shape as in transformers' own model: experts in one tensor, tied ones once."""
    family, net = get_family(config.model_type), net_of(config)
    fused = family.fused_tensors(net)
    inside = {name for tensor in fused.values() for name in tensor.parts}
    for name, tensor in family.tensors(net).items():
        if name not in inside and tensor.kind is not TensorClass.EXPERT_BIAS:
            yield name, tensor.shape
    yield from ((name, tensor.shape) for name, tensor in fused.items())


def buffer_shapes(config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What transformers keeps as buffers: the biases of the routing."""
    tensors = get_family(config.model_type).tensors(net_of(config))
    return ((name, tensor.shape) for name, tensor in tensors.items() if tensor.kind is TensorClass.EXPERT_BIAS)


def count(config: PreTrainedConfig, *, without_embedding: bool = False) -> int:
    """All parameters; a tied embedding counts once, and not at all where embeddings are left out."""
    shapes = parameter_shapes(config)
    return sum(math.prod(shape) for name, shape in shapes if not (without_embedding and name == EMBEDDING))


def table(config: PreTrainedConfig, dtype: torch.dtype, *, head: bool) -> ProgramTable:
    """The embedding, or the head; where they are tied both are the embedding."""
    shapes = dict(parameter_shapes(config))
    name = HEAD if head and HEAD in shapes else EMBEDDING
    return ProgramTable(weight=ProgramWeight(name, shapes[name], dtype))
