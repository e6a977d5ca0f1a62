"""The families, found by ``model_type``: what a checkpoint of each is, without torch.

A family is an object (here: one module of this package, imported when it is asked for) with what ``Family`` lists. The
net of the same name is in ``models``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lfm2_export.errors import CheckpointError
from lfm2_export.messages import shown
from lfm2_export.registry import Registry

if TYPE_CHECKING:
    from lfm2_export.config import ModelConfig
    from lfm2_export.families.reference import ReferenceConfig
    from lfm2_export.families.tensors import FusedTensor, ModelTensor


class Family(Protocol):
    """What a family offers. ``ARCHITECTURES``: the classes that config.json may name for it. One that is published
    under another family's ``model_type``, so that its classes alone tell it, lists those as ``MODEL_TYPES``."""

    ARCHITECTURES: tuple[str, ...]

    def parse_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """A checked config from the contents of config.json."""

    def tensors(self, config: ModelConfig) -> dict[str, ModelTensor]:
        """Every tensor of a published checkpoint by its name, in the published order."""

    def fused_tensors(self, config: ModelConfig) -> dict[str, FusedTensor]:
        """Tensors in which other tools store several of the published ones, by their names there."""

    def reference_config(self, raw: Mapping[str, Any]) -> ReferenceConfig | None:
        """What transformers has to be given in config.json's place; None where it computes the same model by itself."""


_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")

FAMILIES: Registry[Family] = Registry(
    {
        "lfm2": "lfm2_export.families.lfm2",
        "lfm2_moe": "lfm2_export.families.lfm2_moe",
        "lfm3": "lfm2_export.families.lfm3",
        "lfm2_bidirectional": "lfm2_export.families.lfm2_bidirectional",
    }
)
# Of no use without their target, whose artifact an export is given.
DRAFTERS: Registry[Family] = Registry({"lfm2_dspark": "lfm2_export.families.lfm2_dspark"})


# What else is published under names like ours, by a word of its class or model_type: what it is, in a message.
_OTHERS = {
    "bidirectional": "an encoder with a head that is not known",
    "bidir": "an encoder with a head that is not known",
    "draftmodel": "a drafter of a kind that is not known",
    "vl": "a model of images and text",
    "audio": "a model of audio",
    "omni": "a model of audio, images and text",
    "sequenceclassification": "a classifier",
    "tokenclassification": "a classifier",
    "reward": "a reward model",
}


def find_family(raw_config: Mapping[str, Any], place: str) -> Family:
    """The family of a checkpoint, by its ``model_type`` and its ``architectures``.

    Args:
        raw_config: the contents of config.json.
        place: the file, for messages.

    Raises:
        CheckpointError: the model_type is missing or none of ours, or the class is none of the family's: what goes by
            ``lfm2`` and is something else would otherwise be exported as a decoder.
    """
    if "model_type" not in raw_config:
        raise CheckpointError(f"{place}: model_type is missing; expected one of {', '.join(FAMILIES)}")
    named = raw_config.get("architectures")
    classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    model_type = raw_config["model_type"]
    if drafter := _by_class(DRAFTERS, model_type, classes):
        return drafter
    if other := _other(model_type, classes):
        raise CheckpointError(
            f"{place}: {shown(classes or model_type)} is {other}; only decoders and encoders of text are exported: "
            f"{', '.join(_known_classes())}"
        )
    family = _by_class(FAMILIES, model_type, classes) or get_family(model_type)
    if classes and not set(classes) & set(family.ARCHITECTURES):
        raise CheckpointError(
            f"{place}: architectures={shown(classes)} is no class of {model_type}; expected "
            f"{' or '.join(family.ARCHITECTURES)}, or leave architectures out if the weights are a decoder's"
        )
    return family


def _by_class(families: Registry[Family], model_type: object, classes: list[str]) -> Family | None:
    """The family that is published under another one's ``model_type`` and told by its class."""
    for family in families.values():
        if model_type in getattr(family, "MODEL_TYPES", ()) and set(classes) & set(family.ARCHITECTURES):
            return family
    return None


def _other(model_type: object, classes: list[str]) -> str | None:
    """What a class that is no decoder is, where its name tells."""
    if set(classes) & set(_known_classes()):
        return None
    words = [*classes, model_type] if isinstance(model_type, str) else classes
    parts = {part.lower() for word in words for part in _WORDS.findall(word)}
    text = " ".join(word.lower() for word in words)
    return next((what for word, what in _OTHERS.items() if word in parts or (len(word) > 5 and word in text)), None)


def _known_classes() -> list[str]:
    return [name for family in FAMILIES.values() for name in family.ARCHITECTURES]


def get_family(model_type: object) -> Family:
    """The family of a ``model_type``.

    Raises:
        CheckpointError: it is none of ours; the message lists those that are.
    """
    if model_type in DRAFTERS:
        return DRAFTERS[str(model_type)]
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type={shown(model_type)} is not supported; known families: {', '.join(FAMILIES)}"
        )
    return FAMILIES[str(model_type)]


def is_drafter(family: Family) -> bool:
    """Whether its checkpoints are drafters, which have a target."""
    return any(family is one for one in DRAFTERS.values())
