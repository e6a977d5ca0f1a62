"""A GGUF file opened as a checkpoint: its weights, and a folder with the files that a checkpoint has beside them.

In: a path. Out: ``Opened``: the ``GgufShard``, and config.json, tokenizer, chat templates and generation settings made
of the file's metadata, in a folder that is there as long as the object is.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lfm2_export import json_values, paths
from lfm2_export.gguf import tokenizer
from lfm2_export.gguf.settings import Settings, generation_config, raw_config
from lfm2_export.gguf.weights import GgufShard, read_gguf

_PLAIN_NAME = re.compile(r"\w[\w.+-]{0,63}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """``folder`` holds what is no weight."""

    shard: GgufShard
    folder: Path


def open_gguf(path: Path, companions: Path | None = None) -> Opened:
    """Opens a file; ``companions`` is the folder of a checkpoint whose config and tokenizer count instead of what the
    file says.

    Raises:
        CheckpointError: the file is damaged, of another architecture, or says of itself what cannot be.
    """
    shard = read_gguf(path)
    settings = Settings(shard.header.settings, paths.shown(path))
    if companions is not None:
        return Opened(shard=shard, folder=companions)
    made = _files(settings, shard)
    opened = Opened(shard=shard, folder=Path(tempfile.mkdtemp(prefix="lfm2-export-gguf-")))
    weakref.finalize(opened, shutil.rmtree, opened.folder, ignore_errors=True)
    for name, text in made.items():
        there = opened.folder / name
        there.parent.mkdir(exist_ok=True)
        there.write_text(text, encoding="utf-8")
    return opened


def names_tokenizer(path: Path) -> bool:
    """Whether a file says anything of a tokenizer, if only that it has none ("no_vocab").

    Raises:
        CheckpointError: as ``open_gguf``.
    """
    return "tokenizer.ggml.model" in read_gguf(path).header.settings


def _files(settings: Settings, shard: GgufShard) -> dict[str, str]:
    objects: dict[str, Mapping[str, object]] = {
        "config.json": raw_config(settings, shard.tensors.keys()),
        "generation_config.json": generation_config(settings),
        **(tokenizer.tokenizer_files(settings) or {}),
    }
    found = {
        name: json.dumps(json_values.plain(value), ensure_ascii=False, indent=1) for name, value in objects.items()
    }
    for name, template in tokenizer.chat_templates(settings).items():
        if name == "default":
            found["chat_template.jinja"] = template
        elif _PLAIN_NAME.fullmatch(name):
            found[f"additional_chat_templates/{name}.jinja"] = template
    return found
