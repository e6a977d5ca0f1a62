"""Messages in OpenAI's form as chat templates want them.

In: messages whose content is text or a list of text parts, with calls and their results. Out: messages with text, and
calls either as a template reads them (``arguments`` as an object, which is what transformers passes) or, where it does
not know them, as the text that the model wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lfm2_export import json_values
from lfm2_export.chat_template import Message
from lfm2_export.errors import GenerationError
from lfm2_export.messages import shown
from lfm2_export.replies.events import ToolCall
from lfm2_export.replies.reply import LFM2


def for_template(messages: Sequence[Message], templates: Iterable[str]) -> list[Message]:
    """``messages`` for a template that is among ``templates`` (Jinja sources).

    Raises:
        GenerationError: a content is neither text nor text parts, or a call is malformed; the message is named.
    """
    knows_calls = any("tool_calls" in template for template in templates)
    return [_message(message, f"messages[{index}]", knows_calls) for index, message in enumerate(messages)]


def _message(message: Message, place: str, knows_calls: bool) -> Message:
    role = "system" if message["role"] == "developer" else message["role"]
    content = _text(message.get("content"), f"{place}.content")
    calls = [_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(message.get("tool_calls") or ())]
    made: dict[str, Any] = {**message, "role": role, "content": content}
    made.pop("tool_calls", None)
    if calls and knows_calls:
        return made | {"tool_calls": [_for_template(call) for call in calls]}
    return made | {"content": content + written(calls)} if calls else made


def _text(content: object, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise GenerationError(f"{place}: is {shown(content)}; give text or a list of text parts")
    return "\n".join(_part(part, f"{place}[{index}]") for index, part in enumerate(content))


def _part(part: object, place: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
        raise GenerationError(f"{place}: is {shown(kind or part, 40)}; this model reads parts of type text only")
    return part[kind]


def _call(call: object, place: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise GenerationError(f"{place}: is {shown(call, 60)}; give a function with a name and its arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json_values.parse(arguments or "{}")
        except json_values.JsonError as error:
            raise GenerationError(f"{place}.function.arguments: {error}; give a JSON object as text") from error
    if not isinstance(arguments, Mapping):
        raise GenerationError(f"{place}.function.arguments: is {shown(arguments, 60)}; give a JSON object")
    return ToolCall(name=name, arguments=arguments)


def _for_template(call: ToolCall) -> dict[str, Any]:
    return {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}


def written(calls: Sequence[ToolCall]) -> str:
    """Calls as LFM2 writes them."""
    each = (f"{c.name}({', '.join(f'{name}={value!r}' for name, value in c.arguments.items())})" for c in calls)
    return f"{LFM2.start}[{', '.join(each)}]{LFM2.end}"
