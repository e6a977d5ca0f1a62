"""Renders chat templates as transformers does, without transformers.

In: a Jinja template from a checkpoint (untrusted code) and a conversation. Out: the prompt's text. The environment,
its filters, globals and extensions are those of transformers 5.23's ``apply_chat_template``: sandboxed, immutable,
and given plain JSON data only, so that a template reaches nothing but the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import numpy as np

from lfm2_export.errors import GenerationError

Message = Mapping[str, Any]

# The names under which a message's reasoning is passed; templates read the first, gpt-oss ones the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of ``messages``.

    Args:
        template: the Jinja source.
        messages: dicts with "role", "content" and what else the template knows; keys whose value is None are left out.
        tools: JSON schemas of the functions that the model may call.
        documents: dicts with "title" and "text".
        add_generation_prompt: end with the header of an assistant message.
        variables: more names for the template; the tokenizer's special tokens are among them.

    Raises:
        GenerationError: no message, data that is not JSON, or an error in or raised by the template.
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
    try:
        return _compile(template).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise GenerationError(f"chat template, line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template's own arithmetic, indexing and calls can raise anything
        raise GenerationError(f"chat template: {' '.join(str(error).split())} ({type(error).__name__})") from error


def _message(message: Message, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise GenerationError(f"chat: message {index} is {message!r}; a dict with at least a role expected")
    plain = _plain({key: value for key, value in message.items() if value is not None}, f"message {index}")
    reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise GenerationError(f"chat: tool {index} is {tool!r}; a JSON schema (a dict) expected")
    return _plain(tool, f"tool {index}")


def _plain(value: Any, place: str) -> Any:
    """``value`` rebuilt from exact JSON types: objects with methods of their own would be a way out of the sandbox."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key, place): _plain(item, place) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, place) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item(), place)
    raise GenerationError(f"chat: {place} holds a {type(value).__name__}; only JSON values can be put into a template")


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant wrote, for training masks; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it this way)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """``dict`` without the class behind it, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` that takes no underscored names, which reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may set one named self
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}; rename it")
