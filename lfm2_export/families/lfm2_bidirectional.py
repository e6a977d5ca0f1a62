"""The encoders: LFM2's layers with attention in both directions and a centred convolution, without a cache.

Published as ``model_type: lfm2``, so that ``architectures`` alone tells them from the dense decoders; a contributed
port calls the type ``lfm2_bidirectional``. ``Lfm2BidirectionalModel`` is the body of the retrievers, whose head
sentence-transformers' files describe (``retrieval.py``): a pooling, or a Dense for each token.
``Lfm2BidirectionalForMaskedLM`` has the vocabulary's matrix, tied to the token table, as its head, without a bias.

Source: the models' cards and what others that run them say of their remote code, which was not at hand: the convolution
is padded with ``conv_L_cache // 2`` zeros on both sides and cut to the text's length, so that an even width looks one
token further back than ahead; queries attend to every token that is no padding. Padding: as each row alone, which is
what the cards call the closest match to the unpadded forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lfm2_export.config import ModelConfig
from lfm2_export.families import lfm2
from lfm2_export.families.tensors import (
    HEAD,
    PROJECTION,
    PROJECTION_BIAS,
    FusedTensor,
    ModelTensor,
    Part,
    TensorClass,
    by_name,
)
from lfm2_export.heads import EncoderHead

MASKED_LM = "Lfm2BidirectionalForMaskedLM"
ARCHITECTURES = ("Lfm2BidirectionalModel", MASKED_LM)
# What config.json calls it beside this family's own name.
MODEL_TYPES = ("lfm2",)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A checked config; of a retriever it says nothing of the head yet (``RetrieverFiles.completed``).

    Raises:
        ConfigError: a value is missing, out of range, contradicted by another one, or not supported.
    """
    config = lfm2.parse_config(raw)
    masked_lm = MASKED_LM in (raw.get("architectures") or ())
    # Without a head there is nothing to tie.
    tied = config.tie_word_embeddings and masked_lm
    return replace(
        config,
        model_type="lfm2_bidirectional",
        tie_word_embeddings=tied,
        use_cache=False,
        encoder=EncoderHead(masked_lm=masked_lm),
    )


def tensors(config: ModelConfig) -> dict[str, ModelTensor]:
    """Every tensor by its name in a whole model; published, the body's have ``lfm2.`` or nothing in ``model.``'s place
    (``matching.with_prefix``), and the projection is a file of its own."""
    assert config.encoder is not None
    body = lfm2.tensors(config)
    if not config.encoder.masked_lm:
        del body[HEAD]
    return body | by_name(_projection(config))


def _projection(config: ModelConfig) -> Iterator[ModelTensor]:
    assert config.encoder is not None
    width = config.encoder.projection
    if width is None:
        return
    shape = (width, config.hidden_size)
    yield ModelTensor(name=PROJECTION, shape=shape, kind=TensorClass.HEAD, part=Part.PROJECTION)
    if config.encoder.projection_bias:
        yield ModelTensor(name=PROJECTION_BIAS, shape=(width,), kind=TensorClass.SMALL, part=Part.PROJECTION)


def fused_tensors(config: ModelConfig) -> dict[str, FusedTensor]:
    """No tensor of this family is ever stored fused."""
    return {}


def reference_config(raw: Mapping[str, Any]) -> None:
    """transformers 5.23 has no class for it: there is nothing to be given."""
