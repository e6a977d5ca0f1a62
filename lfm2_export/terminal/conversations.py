"""Conversations as JSON files: what ``/save`` writes and ``/load`` reads.

In: messages. Out: one JSON object, with the messages in OpenAI's form. A bare list of such messages is read, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lfm2_export import files, json_values, own_files, paths
from lfm2_export.chat_template import Message
from lfm2_export.errors import GenerationError
from lfm2_export.messages import shown
from lfm2_export.replies import for_template

_FORMAT = "lfm2-export chat"
_LIMIT = 64 << 20
_ROLES = ("system", "developer", "user", "assistant", "tool")


def save(path: Path, messages: Sequence[Message], program: str) -> None:
    """Writes a conversation, for this user alone.

    Raises:
        GenerationError: the file cannot be written, or holds something else.
        ResourceError: the disk is full.
    """
    own_files.check_place(path, GenerationError)
    if paths.exists(path, GenerationError) and not _is_saved(path):
        raise GenerationError(f"{paths.shown(path)}: is there already and no saved conversation; give another file")
    value = {"format": _FORMAT, "version": 1, "program": program, "messages": list(messages)}
    own_files.write(path, [json.dumps(value, ensure_ascii=False, indent=1).encode(), b"\n"], GenerationError)


def _is_saved(path: Path) -> bool:
    try:
        value = _read(path)
    except GenerationError:
        return False
    return isinstance(value, dict) and value.get("format") == _FORMAT


def load(path: Path, templates: Iterable[str]) -> list[Message]:
    """The messages of a file, for a template that is among ``templates`` (Jinja sources).

    Raises:
        GenerationError: there is no such file, or it holds no conversation.
    """
    value = _read(path)
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise GenerationError(f"{paths.shown(path)}: holds no messages; give a file that /save wrote")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise GenerationError(
                f"{paths.shown(path)}: message {index} is {shown(message, 60)}; give objects with role and content"
            )
    return for_template(messages, templates)


def _read(path: Path) -> Any:
    text = files.read_own_text(path, GenerationError, limit=_LIMIT, option="/load")
    try:
        return json_values.parse(text)
    except json_values.JsonError as error:
        raise GenerationError(f"{paths.shown(path)}: {error}; give a file that /save wrote") from error
