"""The families' eager models, found by ``model_type``; each is one module of this package and is imported when it is
asked for. What a checkpoint of the family is stands in ``families``, which needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfm2_export.registry import Registry

if TYPE_CHECKING:
    from lfm2_export.models.decoder import DecoderForCausalLM
    from lfm2_export.models.lfm2_bidirectional import Lfm2BidirectionalModel
    from lfm2_export.models.lfm2_dspark import Lfm2DSparkDraftModel

NETS: Registry[type[DecoderForCausalLM]] = Registry(
    {
        "lfm2": "lfm2_export.models.lfm2:Lfm2ForCausalLM",
        "lfm2_moe": "lfm2_export.models.lfm2_moe:Lfm2MoeForCausalLM",
        "lfm3": "lfm2_export.models.lfm3:Lfm3ForCausalLM",
    }
)
ENCODERS: Registry[type[Lfm2BidirectionalModel]] = Registry(
    {"lfm2_bidirectional": "lfm2_export.models.lfm2_bidirectional:Lfm2BidirectionalModel"}
)
DRAFT_NETS: Registry[type[Lfm2DSparkDraftModel]] = Registry(
    {"lfm2_dspark": "lfm2_export.models.lfm2_dspark:Lfm2DSparkDraftModel"}
)


def get_net(model_type: str) -> type[DecoderForCausalLM]:
    """The eager model's class of a family of decoders.

    Raises:
        KeyError: no such family, which opening its checkpoint would have refused.
    """
    return NETS[model_type]


def get_encoder(model_type: str) -> type[Lfm2BidirectionalModel]:
    """The eager model's class of a family of encoders.

    Raises:
        KeyError: no such family.
    """
    return ENCODERS[model_type]


def get_draft_net(model_type: str) -> type[Lfm2DSparkDraftModel]:
    """The eager model's class of a family of drafters.

    Raises:
        KeyError: no such family.
    """
    return DRAFT_NETS[model_type]
