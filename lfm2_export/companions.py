"""What comes with a checkpoint's weights: tokenizer, chat template, generation settings; checked, then carried over.

In: an open checkpoint. Out: its companion files in the artifact, as they are. They are checked before the first weight
is read: one that is damaged would otherwise fail the export at its end, or the artifact's first user.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from lfm2_export import paths
from lfm2_export.artifact import ArtifactWriter
from lfm2_export.checkpoint import Checkpoint, read_json_object
from lfm2_export.errors import ArtifactError, CheckpointError, GenerationError
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.text import Tokenizer

logger = logging.getLogger(__name__)

GENERATION_CONFIG, TOKENIZER, TEMPLATE = "generation_config.json", "tokenizer.json", "chat_template.jinja"
_OBJECTS = (GENERATION_CONFIG, "tokenizer_config.json", "special_tokens_map.json")


def check(checkpoint: Checkpoint) -> None:
    """Opens every companion file as its later users will.

    Raises:
        CheckpointError: a file is damaged, or a generation setting is out of range.
    """
    for name in _OBJECTS:
        if _has(checkpoint, name):
            read_json_object(checkpoint.path / name)
    _check_generation(checkpoint)
    if _has(checkpoint, TEMPLATE):
        _check_utf8(checkpoint.path / TEMPLATE)
    if _has(checkpoint, TOKENIZER):
        _check_tokenizer(checkpoint)


def carry_over(checkpoint: Checkpoint, writer: ArtifactWriter) -> None:
    """Tokenizer, template, generation settings and licence, as they are; runtimes need a generation config."""
    for path in checkpoint.files():
        writer.copy(path)
    if not _has(checkpoint, GENERATION_CONFIG):
        config = checkpoint.config
        settings = {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(config.eos_token_id),
            "pad_token_id": config.pad_token_id,
        }
        writer.write_text(GENERATION_CONFIG, json.dumps(settings, indent=2) + "\n")
    if not _has(checkpoint, TOKENIZER):
        logger.warning(
            "%s: has no %s, so the artifact takes token ids only; add one to use `run` and `chat`",
            checkpoint.path,
            TOKENIZER,
        )


def _has(checkpoint: Checkpoint, name: str) -> bool:
    return paths.is_file(checkpoint.path / name, CheckpointError)


def _check_generation(checkpoint: Checkpoint) -> None:
    path, vocab_size = checkpoint.path / GENERATION_CONFIG, checkpoint.config.vocab_size
    try:
        settings = GenerationConfig.from_file(path)
    except GenerationError as error:
        raise CheckpointError(f"{error}; correct the file") from error
    for token in settings.stop_token_ids:
        if token >= vocab_size:
            raise CheckpointError(
                f"{path}: eos_token_id={token} is not in the vocabulary of {vocab_size}; correct the file"
            )


def _check_utf8(path: Path) -> None:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: byte {error.start} is not UTF-8; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file") from error


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    try:
        Tokenizer.from_dir(checkpoint.path)
    except ArtifactError as error:
        fault = str(error).rpartition("; ")[0]  # the remedy is that of an artifact
        raise CheckpointError(f"{fault}; download it again") from error
