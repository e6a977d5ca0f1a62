"""What a checkpoint's tensors are: their published names, shapes, and what each is to the model.

In: a ``ModelConfig``. Out: ``ModelTensor``s in the published order. The checkpoint reader matches files against them,
schemes choose formats by ``kind``, plans, parity, inspection and benchmarks ask ``part``, ``layer``, ``expert`` and
``matrix``; nobody else looks at a name to find out what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lfm2_export.config import CONV, ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# ColBERT's Dense, a file of its own (``retrieval.py``).
PROJECTION, PROJECTION_BIAS = "dense.linear.weight", "dense.linear.bias"
# What a backbone's published names begin with; where it was saved alone they begin with nothing.
BACKBONE = "model."
OTHER_BACKBONES = ("lfm2.",)


class TensorClass(StrEnum):
    """What a weight is to a scheme. ``SMALL``: norms, conv kernels and biases."""

    LINEAR = "linear"
    EXPERTS = "experts"
    EMBEDDING = "embedding"
    HEAD = "head"
    ROUTER = "router"
    EXPERT_BIAS = "expert_bias"
    SMALL = "small"


class Part(StrEnum):
    """The part of the model that a weight belongs to, in the order of reports."""

    EMBEDDING = "embedding"
    HEAD = "head"
    PROJECTION = "projection"
    CONVOLUTIONS = "convolutions"
    ATTENTION = "attention"
    MLPS = "dense MLPs"
    EXPERTS = "experts"
    ROUTERS = "routers"
    NORMS = "norms"
    DRAFTING = "drafting"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTensor:
    """One tensor of a published checkpoint.

    ``layer`` and ``expert`` are None where it belongs to none. ``matrix``: which one of its block it is ("w1",
    "q_proj", "in_proj", ...), None for what is no matrix of a block. ``other_names``: what other tools store it under.
    """

    name: str
    shape: tuple[int, ...]
    kind: TensorClass
    part: Part
    layer: int | None = None
    expert: int | None = None
    matrix: str | None = None
    other_names: tuple[str, ...] = ()


Tensors = Mapping[str, ModelTensor]

# Matrices of a block that multiply what another one of it multiplies.
_SAME_INPUT_AS: Mapping[str, str] = {"k_proj": "q_proj", "v_proj": "q_proj", "g_proj": "q_proj", "w3": "w1"}


def input_name(tensor: ModelTensor) -> str:
    """The name that stands for a matrix's input: its own, or that of the first matrix that has the same input."""
    if tensor.matrix is None or (first := _SAME_INPUT_AS.get(tensor.matrix)) is None:
        return tensor.name
    return f"{tensor.name.removesuffix(f'{tensor.matrix}.weight')}{first}.weight"


# Matrices of a block whose outputs are added to the residual stream.
_LAST = ("out_proj", "o_proj", "w2")


def writes_stream(tensor: ModelTensor) -> bool:
    """Whether what it computes is added to the residual stream, as it is or behind a norm (``output_norm``)."""
    return tensor.matrix in _LAST


def in_feed_forward(part: Part) -> bool:
    """Whether a layer's weights of this part are its feed-forward's; else they are its operator's."""
    return part in (Part.MLPS, Part.EXPERTS)


@dataclass(frozen=True, kw_only=True)
class FusedPart:
    """Where one published tensor lies in a fused one: ``fused[expert, start:stop]``."""

    expert: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class FusedTensor:
    """A tensor as transformers 5 saves it, [experts, rows, columns], and the published tensors inside it."""

    shape: tuple[int, int, int]
    parts: Mapping[str, FusedPart]


def by_name(tensors: Iterable[ModelTensor]) -> dict[str, ModelTensor]:
    return {tensor.name: tensor for tensor in tensors}


def expert_stacks(tensors: Tensors) -> dict[int, dict[tuple[int, str], ModelTensor]]:
    """The matrices of each layer's experts by (expert, matrix), in the published order; empty in a dense model."""
    stacks: dict[int, dict[tuple[int, str], ModelTensor]] = {}
    for tensor in tensors.values():
        if tensor.layer is not None and tensor.expert is not None and tensor.matrix is not None:
            stacks.setdefault(tensor.layer, {})[tensor.expert, tensor.matrix] = tensor
    return stacks


def block_prefix(layer: int) -> str:
    """How the published names of a layer begin."""
    return f"model.layers.{layer}."


def feed_forward_prefix(layer: int) -> str:
    """How the published names of a layer's feed-forward begin."""
    return f"{block_prefix(layer)}feed_forward."


def output_norm(tensors: Tensors, layer: int, *, feed_forward: bool) -> str | None:
    """The name of the norm between a layer's operator, or its feed-forward, and the residual stream; None where what
    they compute is added as it is."""
    name = f"{block_prefix(layer)}{'post_ffn_norm' if feed_forward else 'post_operator_norm'}.weight"
    return name if name in tensors else None


def backbone(
    config: ModelConfig,
    norms: Sequence[str] = ("operator_norm", "ffn_norm"),
    attention: Callable[[ModelConfig, int], Iterator[ModelTensor]] | None = None,
) -> Iterator[ModelTensor]:
    """Embedding, norms, convs, attention and head: all but the feed-forward blocks.

    Args:
        norms: the names of a layer's norms on the residual stream's width.
        attention: the tensors of an attention layer, where they are not LFM2's.
    """
    attention = attention or _attention
    width = config.hidden_size
    table = (config.vocab_size, width)
    yield ModelTensor(name=EMBEDDING, shape=table, kind=TensorClass.EMBEDDING, part=Part.EMBEDDING)
    yield norm("model.embedding_norm.weight", width)
    for layer in range(config.num_hidden_layers):
        for name in norms:
            yield norm(f"{block_prefix(layer)}{name}.weight", width, layer)
        yield from _conv(config, layer) if config.layer_types[layer] == CONV else attention(config, layer)
    if not config.tie_word_embeddings:
        yield ModelTensor(name=HEAD, shape=table, kind=TensorClass.HEAD, part=Part.HEAD)


def norm(name: str, width: int, layer: int | None = None) -> ModelTensor:
    """The weight of a norm."""
    return ModelTensor(name=name, shape=(width,), kind=TensorClass.SMALL, part=Part.NORMS, layer=layer)


def _attention(config: ModelConfig, layer: int) -> Iterator[ModelTensor]:
    width, head_dim = config.hidden_size, config.head_dim
    q_width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    prefix = f"{block_prefix(layer)}self_attn."
    shapes = {
        "q_proj": (q_width, width),
        "k_proj": (kv_width, width),
        "v_proj": (kv_width, width),
        "out_proj": (width, q_width),
    }
    for matrix, shape in shapes.items():
        yield linear(prefix, matrix, shape, Part.ATTENTION, layer)
    for name in ("q_layernorm", "k_layernorm"):
        yield norm(f"{prefix}{name}.weight", head_dim, layer)


def _conv(config: ModelConfig, layer: int) -> Iterator[ModelTensor]:
    width, prefix = config.hidden_size, f"{block_prefix(layer)}conv."

    def small(name: str, shape: tuple[int, ...]) -> ModelTensor:
        return ModelTensor(
            name=f"{prefix}{name}", shape=shape, kind=TensorClass.SMALL, part=Part.CONVOLUTIONS, layer=layer
        )

    yield linear(prefix, "in_proj", (3 * width, width), Part.CONVOLUTIONS, layer)
    yield small("conv.weight", (width, 1, config.conv_L_cache))
    yield linear(prefix, "out_proj", (width, width), Part.CONVOLUTIONS, layer)
    if config.conv_bias:
        for part, size in {"in_proj": 3 * width, "conv": width, "out_proj": width}.items():
            yield small(f"{part}.bias", (size,))


def linear(prefix: str, matrix: str, shape: tuple[int, ...], part: Part, layer: int) -> ModelTensor:
    """The weight of a linear layer of a block."""
    return ModelTensor(
        name=f"{prefix}{matrix}.weight", shape=shape, kind=TensorClass.LINEAR, part=part, layer=layer, matrix=matrix
    )


def swiglu_shapes(width: int, inner: int) -> dict[str, tuple[int, int]]:
    """w1 and w3 [inner, width], w2 [width, inner]."""
    return {"w1": (inner, width), "w3": (inner, width), "w2": (width, inner)}


def mlp(config: ModelConfig, layer: int) -> Iterator[ModelTensor]:
    """A dense SwiGLU block."""
    prefix = feed_forward_prefix(layer)
    for matrix, shape in swiglu_shapes(config.hidden_size, config.intermediate_size).items():
        yield linear(prefix, matrix, shape, Part.MLPS, layer)
