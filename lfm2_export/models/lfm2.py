"""The dense family's eager model (``model_type: lfm2``).

Source: transformers' ``modeling_lfm2.py``.
"""

from __future__ import annotations

from torch import nn

from lfm2_export.config import ModelConfig
from lfm2_export.models.decoder import MLP, DecoderForCausalLM, DecoderModel


class Lfm2Model(DecoderModel):
    """The dense decoder without a head."""

    @staticmethod
    def make_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
        return MLP(config.hidden_size, config.intermediate_size)


class Lfm2ForCausalLM(DecoderForCausalLM):
    """The dense decoder with its language model head."""

    backbone = Lfm2Model
