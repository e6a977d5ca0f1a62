"""The families, found by ``model_type``; each is one module of this package and is imported when it is asked for.

A family module offers ``parse_config``, ``tensor_shapes``, ``fused_tensors`` and ``ForCausalLM``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lfm2_export.config import ModelConfig
from lfm2_export.errors import CheckpointError
from lfm2_export.messages import shown

if TYPE_CHECKING:
    from lfm2_export.models._common import DecoderForCausalLM
    from lfm2_export.models._names import FusedTensor, Shapes

FAMILIES = ("lfm2", "lfm2_moe")


class Family(Protocol):
    """What a family's module offers."""

    ForCausalLM: type[DecoderForCausalLM]

    def parse_config(self, raw: Mapping[str, Any]) -> ModelConfig: ...

    def tensor_shapes(self, config: ModelConfig) -> Shapes: ...

    def fused_tensors(self, config: ModelConfig) -> dict[str, FusedTensor]: ...


def get_family(model_type: object) -> Family:
    """The family's module.

    Raises:
        CheckpointError: the ``model_type`` is none of ours; the message lists those that are.
    """
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type={shown(model_type)} is not supported; known families: {', '.join(FAMILIES)}"
        )
    return importlib.import_module(f"lfm2_export.models.{model_type}")
