"""What comes with a checkpoint's weights: tokenizer, chat template, generation settings; checked, then carried over.

In: an open checkpoint. Out: its companion files in the artifact, as they are. They are checked before the first weight
is read: one that is damaged would otherwise fail the export at its end, or the artifact's first user.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm2_export import files, json_values, paths, template_files
from lfm2_export.artifact_writer import ArtifactWriter
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.errors import ArtifactError, CheckpointError, GenerationError
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.messages import listed, shown
from lfm2_export.text import Tokenizer

logger = logging.getLogger(__name__)

GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG = "generation_config.json", "tokenizer.json", "tokenizer_config.json"
_OBJECTS = (GENERATION_CONFIG, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
# Bytes; what is not named here has ``files.TEXT_LIMIT``. Tokenizers of 260,000 tokens have 33 MB.
_LIMITS = {TOKENIZER: 64 << 20, **dict.fromkeys(_OBJECTS, files.JSON_LIMIT)}


def check(checkpoint: Checkpoint) -> None:
    """Opens every companion file as its later users will; says what of it no JSON file can hold.

    Raises:
        CheckpointError: a file is damaged, too large, no regular file or elsewhere, or a generation setting is out of
            range.
    """
    for path in checkpoint.files():
        files.check(path, checkpoint.path, CheckpointError, limit=_limit(path))
    _warn_of_values(checkpoint.path / "config.json", checkpoint.raw_config)
    objects = _objects(checkpoint)
    for name, value in objects.items():
        _warn_of_values(checkpoint.path / name, value)
    _check_generation(checkpoint)
    template_files.read(checkpoint.path, objects.get(TOKENIZER_CONFIG, {}), CheckpointError)
    if _has(checkpoint, TOKENIZER):
        _check_tokenizer(checkpoint)
        _check_vocabulary(checkpoint)
    if (retriever := checkpoint.retriever) is not None:
        for name in retriever.names:
            files.check(checkpoint.path / name, checkpoint.path, CheckpointError, limit=retriever.limit(name))


def _limit(path: Path) -> int:
    return _LIMITS.get(path.name, files.TEXT_LIMIT)


def _warn_of_values(path: Path, value: Mapping[str, Any]) -> None:
    if keys := json_values.not_plain(value):
        logger.warning(
            "%s: %s has values that JSON cannot hold (NaN, Infinity, half a character); the artifact gets null, or "
            "U+FFFD in text",
            paths.shown(path),
            listed(keys),
        )


def _objects(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    return {
        name: files.read_json_object(checkpoint.path / name, checkpoint.path, CheckpointError)
        for name in _OBJECTS
        if _has(checkpoint, name)
    }


def carry_over(checkpoint: Checkpoint, writer: ArtifactWriter) -> None:
    """Tokenizer, templates, generation settings and licence, as they are; runtimes need a generation config."""
    for path in checkpoint.files():
        writer.copy(path, limit=_limit(path))
    for path in template_files.additional(checkpoint.path, CheckpointError).values():
        data = files.read_bytes(path, checkpoint.path, CheckpointError, limit=files.TEXT_LIMIT)
        writer.path(path.relative_to(checkpoint.path).as_posix()).write_bytes(data)
    if (retriever := checkpoint.retriever) is not None:
        for name in retriever.names:
            path, limit = checkpoint.path / name, retriever.limit(name)
            writer.path(name).write_bytes(files.read_bytes(path, checkpoint.path, CheckpointError, limit=limit))
    for name, value in _objects(checkpoint).items():
        if json_values.not_plain(value):
            writer.write_json(name, value)
    if checkpoint.config.drafter is not None:
        return
    if checkpoint.config.encoder is None:
        _write_generation_config(checkpoint, writer)
    if not _has(checkpoint, TOKENIZER):
        logger.warning(
            "%s: has no %s, so the artifact takes token ids only; add one (for a GGUF: --config-from) to run and chat",
            paths.shown(checkpoint.name),
            TOKENIZER,
        )


def _write_generation_config(checkpoint: Checkpoint, writer: ArtifactWriter) -> None:
    """Every runtime finds the tokens that end a reply in it: where the checkpoint has no such file, or one that names
    none, they are config.json's."""
    config, stops = checkpoint.config, list(checkpoint.stop_token_ids)
    if not _has(checkpoint, GENERATION_CONFIG):
        tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": stops, "pad_token_id": config.pad_token_id}
        writer.write_json(GENERATION_CONFIG, tokens)
        return
    settings = _objects(checkpoint)[GENERATION_CONFIG]
    stated = settings.get("eos_token_id")
    if (stated if isinstance(stated, list) else [stated]) != stops:
        writer.write_json(GENERATION_CONFIG, {**settings, "eos_token_id": stops})


def _has(checkpoint: Checkpoint, name: str) -> bool:
    """Whether anything is there; what is no regular file is refused where it is read."""
    return paths.exists(checkpoint.path / name, CheckpointError)


def _check_generation(checkpoint: Checkpoint) -> None:
    path, vocab_size = checkpoint.path / GENERATION_CONFIG, checkpoint.config.vocab_size
    try:
        settings = GenerationConfig.from_file(path)
    except GenerationError as error:
        raise CheckpointError(f"{error}; correct the file") from error
    beyond = [token for token in settings.stop_token_ids if token >= vocab_size]
    if beyond and len(beyond) == len(settings.stop_token_ids):
        raise CheckpointError(
            f"{paths.shown(path)}: eos_token_id={shown(beyond[0])} is not in the vocabulary of {vocab_size}; "
            "correct the file"
        )
    if beyond:
        logger.warning(
            "%s: eos_token_id names %s beyond the vocabulary of %d, which no reply can end with; left out",
            paths.shown(path),
            listed(list(map(str, beyond))),
            vocab_size,
        )


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    try:
        Tokenizer.from_dir(checkpoint.path)
    except ArtifactError as error:
        fault = str(error).rpartition("; ")[0]  # the remedy is that of an artifact
        raise CheckpointError(f"{fault}; download it again") from error


def _check_vocabulary(checkpoint: Checkpoint) -> None:
    """A drafter seldom has a tokenizer; one that has must have its target's."""
    target = checkpoint.target
    if target is None or not paths.exists(target.folder / TOKENIZER, ArtifactError):
        return
    if Tokenizer.from_dir(checkpoint.path).vocabulary() != Tokenizer.from_dir(target.folder).vocabulary():
        raise CheckpointError(
            f"{paths.shown(checkpoint.path / TOKENIZER)}: has another vocabulary than --target {target.place}; give "
            "the artifact of the model that it was trained with"
        )
