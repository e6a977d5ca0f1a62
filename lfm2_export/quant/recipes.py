"""How large llama.cpp's quantizers make a model: the yardstick for the size of our own default.

In: a config. Out: the type that ``llama-quantize ... Q4_K_M`` gives each tensor, and the bytes of all. Source:
``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in llama.cpp's src/llama-quant.cpp (as of llama-cpp-python
0.3.36). Metadata, which a .gguf holds besides, is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from lfm2_export.config import ModelConfig
from lfm2_export.families import get_family
from lfm2_export.families.tensors import ModelTensor, Part, TensorClass

# Bytes and weights of a block.
BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (4, 1),
    "F16": (2, 1),
    "Q4_K": (144, 256),
    "Q5_K": (176, 256),
    "Q6_K": (210, 256),
    "Q5_0": (22, 32),
    "Q5_1": (24, 32),
    "Q8_0": (34, 32),
}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where a row is no whole number of blocks
_MIXTRAL = 8  # a mixture of so many experts gets wider attention


def q4_k_m_bytes(config: ModelConfig) -> int:
    """Bytes of all tensors of the file."""
    tensors = get_family(config.model_type).tensors(config).values()
    return sum(_nbytes(tensor, q4_k_m_type(tensor, config)) for tensor in tensors)


def q4_k_m_type(tensor: ModelTensor, config: ModelConfig) -> str:
    """The type of a tensor, a key of ``BLOCKS``."""
    if tensor.kind not in (TensorClass.LINEAR, TensorClass.EXPERTS, TensorClass.EMBEDDING, TensorClass.HEAD):
        return "F32"
    wanted, columns = _wanted(tensor, config), tensor.shape[-1]
    if columns % BLOCKS[wanted][1]:
        wanted = _FALLBACK.get(wanted, wanted)
    return "F16" if columns % BLOCKS[wanted][1] else wanted


def _wanted(tensor: ModelTensor, config: ModelConfig) -> str:
    """Before the fallback for odd widths."""
    if tensor.kind is TensorClass.HEAD or (tensor.kind is TensorClass.EMBEDDING and _has_no_head(config)):
        return "Q6_K"
    if tensor.layer is None:
        return "Q4_K"
    if tensor.part is Part.ATTENTION:
        return _attention(tensor, tensor.layer, config)
    if tensor.matrix == "w2":
        return "Q6_K" if _gets_more(tensor.layer, config.num_hidden_layers) else "Q4_K"
    return "Q4_K"


def _has_no_head(config: ModelConfig) -> bool:
    """Then llama.cpp takes the token table for one: it is, or the model is an encoder that has none."""
    return config.tie_word_embeddings or (config.encoder is not None and not config.encoder.masked_lm)


def _attention(tensor: ModelTensor, layer: int, config: ModelConfig) -> str:
    if config.num_experts == _MIXTRAL:
        return {"v_proj": "Q8_0", "k_proj": "Q8_0", "out_proj": "Q5_K"}.get(tensor.matrix or "", "Q4_K")
    layers = config.attention_layers
    return "Q6_K" if tensor.matrix == "v_proj" and _gets_more(layers.index(layer), len(layers)) else "Q4_K"


def _gets_more(index: int, count: int) -> bool:
    """The first and the last eighth, and every third between them."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _nbytes(tensor: ModelTensor, type: str) -> int:
    size, weights = BLOCKS[type]
    return prod(tensor.shape) // weights * size
