"""Renders chat templates as transformers does, without transformers and without harm.

In: a Jinja template from a checkpoint (a stranger's program) and a conversation. Out: the prompt's text. The template
sees exact JSON types only, in jinja2's sandbox (``isolated.template``), and runs in a process of its own with limits
(``isolated.process``): a sandbox keeps a template from reaching out, not from working without end.
"""

from __future__ import annotations

import logging
import marshal
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm2_export.errors import GenerationError, ResourceError
from lfm2_export.isolated.process import Child, Limits, Stopped
from lfm2_export.isolated.wire import Refusal
from lfm2_export.messages import shown

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]

# The names under which a message's reasoning is passed; templates read the first, gpt-oss ones the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# A conversation as bytes: over a hundred times the longest context.
_REQUEST_LIMIT = 64 << 20

_renderer = Child("lfm2_export.isolated.template", ("jinja2", "markupsafe"))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.forget)


@dataclass(frozen=True, kw_only=True)
class RenderLimits:
    """What one rendering may take: ``seconds`` of processor time, ``memory`` in bytes, ``characters`` of text.

    The bundled templates take a thousandth of the time. The text is four times the family's longest context, and its
    tokens take as long as the template: two million of them a few seconds, and a gigabyte.
    """

    seconds: float = 2.0
    memory: int = 512 << 20
    characters: int = 2 << 20


DEFAULT_LIMITS = RenderLimits()


def prepare() -> None:
    """Starts the process that renders, so that it is ready by the time that it is asked; waits for nothing, and leaves
    it to ``render`` to say what is wrong."""
    try:
        _renderer.start()
    except ResourceError as error:
        logger.debug("%s", error)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
    limits: RenderLimits = DEFAULT_LIMITS,
) -> str:
    """The text of ``messages``.

    Args:
        template: the Jinja source.
        messages: dicts with "role", "content" and what else the template knows; keys whose value is None are left out.
        tools: JSON schemas of the functions that the model may call.
        documents: dicts with "title" and "text".
        add_generation_prompt: end with the header of an assistant message.
        variables: more names for the template; the tokenizer's special tokens are among them.
        limits: what this may take.

    Raises:
        GenerationError: no message, data that is not JSON, an error in or raised by the template, or a limit.
        ResourceError: this system starts no process to render in.
    """
    if not messages:
        raise GenerationError("chat: no messages; a conversation needs at least one")
    values = {
        **_plain(variables or {}, "variables"),
        "messages": [_message(m, index) for index, m in enumerate(messages)],
        "tools": None if tools is None else [_tool(t, index) for index, t in enumerate(tools)],
        "documents": None if documents is None else _plain(list(documents), "documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    return _render(_request(template, values, limits.characters), limits)


def _render(request: bytes, limits: RenderLimits) -> str:
    # Text of four bytes a character at most; surrogates pass, which ``encode`` refuses with their place.
    allowed = Limits(seconds=limits.seconds, memory=limits.memory, reply=4 * limits.characters)
    try:
        return _renderer.ask(request, allowed).decode("utf-8", "surrogatepass")
    except Refusal as error:
        raise GenerationError(f"chat template{error}") from error
    except Stopped as error:
        raise GenerationError(f"chat template: {error}; use a simpler template or a shorter conversation") from error


def _request(template: str, values: dict[str, Any], characters: int) -> bytes:
    """In Python's own format, which keeps what JSON does not: NaN, lone surrogates, keys that are numbers."""
    try:
        request = marshal.dumps((template, values, characters))
    except ValueError as error:
        raise GenerationError("chat: the conversation is nested too deeply; give it in flatter lists") from error
    if len(request) > _REQUEST_LIMIT:
        raise GenerationError(
            f"chat: the conversation has {len(request)} bytes, more than the {_REQUEST_LIMIT} that a template is given;"
            " shorten it"
        )
    return request


def _message(message: Message, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise GenerationError(f"chat: message {index} is {shown(message)}; a dict with at least a role expected")
    plain = _plain({key: value for key, value in message.items() if value is not None}, f"message {index}")
    reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise GenerationError(f"chat: tool {index} is {shown(tool)}; a JSON schema (a dict) expected")
    return _plain(tool, f"tool {index}")


def _plain(value: Any, place: str) -> Any:
    """``value`` rebuilt from exact JSON types, without methods of their own."""
    try:
        return _rebuilt(value, place)
    except RecursionError as error:
        raise GenerationError(f"chat: {place} is nested too deeply; give it in flatter lists") from error


def _rebuilt(value: Any, place: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {_rebuilt(key, place): _rebuilt(item, place) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rebuilt(item, place) for item in value]
    if isinstance(value, np.generic):
        return _rebuilt(value.item(), place)
    raise GenerationError(f"chat: {place} holds a {type(value).__name__}; only JSON values can be put into a template")
