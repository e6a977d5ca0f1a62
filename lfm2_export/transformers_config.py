"""An artifact's configuration and generation settings as transformers' own objects, with what the caller changes.

In: the folder, and ``from_pretrained``'s ``config``, ``generation_config`` and values of single fields. Out: objects
that belong to one model. What a program was made of cannot be changed: such a value is refused by name.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from lfm2_export import files, paths
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ArtifactError, GenerationError, Lfm2ExportError
from lfm2_export.messages import one_line, shown
from lfm2_export.transformers_options import LOGITS_ONLY, OUTPUTS
from lfm2_export.transformers_weights import net_of

# What transformers' configurations raise for a value or a file that they do not take.
_REFUSALS = (AttributeError, KeyError, OSError, StrictDataclassError, TypeError, ValueError)


def own_config(folder: Path) -> PreTrainedConfig:
    """What config.json says. Code that it names is never run.

    Raises:
        ArtifactError: there is none, or transformers does not take it.
    """
    path = folder / "config.json"
    files.read_json_object(path, folder, ArtifactError)
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except _REFUSALS as error:
        raise _not_taken(path, error) from error


def fields_of(own: PreTrainedConfig, options: Iterable[str]) -> list[str]:
    """Those of ``options`` that transformers takes for a field of the configuration, outputs aside."""
    public = [name for name in options if not name.startswith("_") and name not in OUTPUTS]
    return [name for name in public if hasattr(own, name) and not callable(getattr(own, name))]


def changed_config(own: PreTrainedConfig, asked: object, values: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration that a model gets.

    Args:
        own: the artifact's.
        asked: one to use instead: a configuration, or the folder of one; None for the artifact's.
        values: of single fields, by their names.

    Raises:
        GenerationError: it is not what the program was made of.
        ArtifactError: the folder has none.
    """
    config = own if asked is None else _given(asked)
    if config is own and not values:
        return own
    config = copy.deepcopy(config)
    for name, value in values.items():
        try:
            setattr(config, name, value)
        except _REFUSALS as error:
            raise GenerationError(f"from_pretrained: {name}={shown(value)}: {one_line(str(error), 160)}") from error
    _check_same(own, config)
    return config


def _given(asked: object) -> PreTrainedConfig:
    if isinstance(asked, PreTrainedConfig):
        return asked
    if isinstance(asked, str | os.PathLike) and paths.is_folder(os.fspath(asked), ArtifactError):
        return own_config(Path(asked))
    raise GenerationError(f"from_pretrained: config={shown(asked)}: pass a PreTrainedConfig or the folder of one")


def _check_same(own: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Raises GenerationError where the two would not compute the same."""
    if config.model_type != own.model_type:
        raise _built_in("model_type", config.model_type, own.model_type)
    try:
        net = net_of(config)
    except Lfm2ExportError as error:
        raise GenerationError(f"from_pretrained: {error}") from error
    made_of = net_of(own)
    for field in fields(ModelConfig):
        there, here = getattr(net, field.name), getattr(made_of, field.name)
        if there != here and field.name in OUTPUTS:
            raise GenerationError(f"from_pretrained: {field.name}={shown(there)}: {LOGITS_ONLY}")
        if there != here:
            raise _built_in(field.name, there, here)


def _built_in(name: str, asked: object, own: object) -> GenerationError:
    return GenerationError(
        f"from_pretrained: {name}={shown(asked)}: this program was made with {shown(own)}; "
        "leave it out or export a checkpoint that has it"
    )


def generation_settings(folder: Path, asked: object) -> GenerationConfig | None:
    """The defaults of ``generate``: a copy of what was asked for, or what generation_config.json says.

    Returns:
        None where there is neither; the model's configuration then has them.

    Raises:
        GenerationError: ``asked`` is no GenerationConfig.
        ArtifactError: transformers does not take the file.
    """
    if isinstance(asked, GenerationConfig):
        return copy.deepcopy(asked)
    if asked is not None:
        raise GenerationError(
            f"from_pretrained: generation_config={shown(asked)}: pass a transformers.GenerationConfig, or leave it out"
        )
    path = folder / "generation_config.json"
    if not paths.exists(path, ArtifactError):
        return None
    files.read_json_object(path, folder, ArtifactError)
    try:
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except _REFUSALS as error:
        raise _not_taken(path, error) from error


def _not_taken(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{paths.shown(path)}: transformers does not take it ({one_line(str(error), 120)}); bring back the original"
    )
