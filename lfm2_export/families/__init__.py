"""The families, found by ``model_type``: what a checkpoint of each is, without torch.

A family is an object (here: one module of this package, imported when it is asked for) with ``parse_config``,
``tensors`` and ``fused_tensors``. The net of the same name is in ``models``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lfm2_export.errors import CheckpointError
from lfm2_export.messages import shown
from lfm2_export.registry import Registry

if TYPE_CHECKING:
    from lfm2_export.config import ModelConfig
    from lfm2_export.families.tensors import FusedTensor, ModelTensor


class Family(Protocol):
    """What a family offers."""

    def parse_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """A checked config from the contents of config.json."""

    def tensors(self, config: ModelConfig) -> dict[str, ModelTensor]:
        """Every tensor of a published checkpoint by its name, in the published order."""

    def fused_tensors(self, config: ModelConfig) -> dict[str, FusedTensor]:
        """Tensors in which other tools store several of the published ones, by their names there."""


FAMILIES: Registry[Family] = Registry(
    {
        "lfm2": "lfm2_export.families.lfm2",
        "lfm2_moe": "lfm2_export.families.lfm2_moe",
    }
)


def get_family(model_type: object) -> Family:
    """The family of a ``model_type``.

    Raises:
        CheckpointError: it is none of ours; the message lists those that are.
    """
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type={shown(model_type)} is not supported; known families: {', '.join(FAMILIES)}"
        )
    return FAMILIES[str(model_type)]
