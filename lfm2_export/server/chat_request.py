"""The body of a chat completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lfm2_export.messages import shown
from lfm2_export.server.errors import invalid
from lfm2_export.server.fields import Body, flag, integer, text
from lfm2_export.server.sampling_request import Sampling, parse_sampling

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_TOOLS = 128


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """``tools`` as OpenAI's objects; ``forced``: the tool that must be called, "" any of them, None none must be.
    ``variables``: more names for the chat template. ``schema``: of the JSON that the answer must be."""

    model: str | None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    offers_tools: bool
    forced: str | None
    parallel_calls: bool
    top_logprobs: int | None
    variables: Mapping[str, Any]
    schema: Mapping[str, Any] | None
    sampling: Sampling


def parse_chat(body: Body) -> ChatRequest:
    """Raises: ApiError."""
    tools = _tools(body)
    choice, forced = _tool_choice(body, [tool["function"]["name"] for tool in tools])
    schema = _schema(body)
    if schema is not None and tools and choice != "none":
        raise invalid("response_format", "tools could not be called in this form; leave one of the two out")
    return ChatRequest(
        model=text(body, "model"),
        messages=_messages(body),
        tools=tools,
        offers_tools=bool(tools) and choice != "none",
        forced=forced,
        parallel_calls=flag(body, "parallel_tool_calls", True),
        top_logprobs=_top_logprobs(body),
        variables=_variables(body),
        schema=schema,
        sampling=parse_sampling(body),
    )


def _messages(body: Body) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "give a list with at least one message")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    return messages


def _check_message(message: object, place: str) -> None:
    if not isinstance(message, dict):
        raise invalid(place, f"{shown(message, 40)} is not a message; give an object with role and content")
    if message.get("role") not in _ROLES:
        raise invalid(f"{place}.role", f"{shown(message.get('role'), 40)} is not one of {', '.join(_ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise invalid(f"{place}.tool_calls", f"{shown(calls, 40)} is not a list of calls")
    if message.get("content") is None and not (message["role"] == "assistant" and calls):
        raise invalid(f"{place}.content", "is missing; give text or a list of text parts")


def _tools(body: Body) -> list[dict[str, Any]]:
    tools = body.get("tools")
    if tools is None:
        return []
    if not isinstance(tools, list) or len(tools) > _MOST_TOOLS:
        raise invalid("tools", f"give a list of at most {_MOST_TOOLS} functions")
    for index, tool in enumerate(tools):
        _check_tool(tool, f"tools[{index}]")
    return tools


def _check_tool(tool: object, place: str) -> None:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise invalid(place, f'{shown(tool, 60)} is not a function; give {{"type": "function", "function": {{...}}}}')
    function = tool["function"]
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise invalid(f"{place}.function.name", "is missing; give the function's name")
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None):
        raise invalid(f"{place}.function.parameters", "is not an object; give a JSON schema")
    kind = (parameters or {}).get("type", "object")
    if "object" not in (kind if isinstance(kind, list) else [kind]):
        raise invalid(f"{place}.function.parameters", f'type {shown(kind, 40)}: arguments are an "object"')


def _tool_choice(body: Body, names: list[str]) -> tuple[str, str | None]:
    """("none" | "auto" | "required", what is forced)."""
    choice = body.get("tool_choice")
    if choice in (None, "auto", "none"):
        return choice or "auto", None
    if not names:
        raise invalid("tool_choice", "there is no tool to choose; give tools")
    if choice == "required":
        return choice, ""
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or function.get("name") not in names:
        raise invalid("tool_choice", f"{shown(choice, 60)} is neither none, auto, required nor one of the tools")
    return "required", function["name"]


def _top_logprobs(body: Body) -> int | None:
    """How many tokens' logprobs beside the chosen one's; None: none at all."""
    count = integer(body, "top_logprobs", 0, 20)
    if flag(body, "logprobs", False):
        return count or 0
    if count:
        raise invalid("top_logprobs", "needs logprobs; set it to true")
    return None


def _variables(body: Body) -> Mapping[str, Any]:
    """vLLM's and SGLang's name for what a template is given, such as enable_thinking."""
    variables = body.get("chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise invalid("chat_template_kwargs", f"{shown(variables, 40)} is not usable; give an object")
    return variables or {}


def _schema(body: Body) -> Mapping[str, Any] | None:
    """None: any text."""
    form = body.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = form.get("json_schema") if isinstance(form, dict) and kind == "json_schema" else None
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise invalid("response_format", f"{shown(form, 60)} is not text, json_object, or json_schema with its schema")
    return described["schema"]
