"""A function's description for a model: name, docstring and arguments, as OpenAI's JSON.

In: a Python function with type hints and a docstring ("Args:" describes the arguments, as Google's style has it).
Out: ``{"type": "function", "function": {...}}``. What cannot be said in JSON schema is refused by name.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from lfm2_export.errors import ConfigError
from lfm2_export.messages import shown

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_SEQUENCES = (list, tuple, set, frozenset, Sequence)
_SECTION = re.compile(r"\s*(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?):\s*$")
_ARGUMENT = re.compile(r"\s*\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def described(function: Callable[..., Any], place: str) -> dict[str, Any]:
    """The tool that a function is.

    Raises:
        ConfigError: it has no docstring, or an argument without a type that JSON has; ``place`` and it are named.
    """
    place = f"{place}: {function.__name__}"
    summary, arguments = _docstring(function, place)
    hints = _hints(function, place)
    properties, required = dict[str, Any](), list[str]()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"{place}: the argument {parameter} has no name of its own; give each one by name")
        if name not in hints:
            raise ConfigError(f"{place}: the argument {name} has no type; write {name}: str, or what it is")
        schema = _schema(hints[name], f"{place}: the argument {name}")
        properties[name] = schema | ({"description": arguments[name]} if name in arguments else {})
        if parameter.default is parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    function_json = {"name": function.__name__, "description": summary, "parameters": parameters}
    return {"type": "function", "function": function_json}


def _hints(function: Callable[..., Any], place: str) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise ConfigError(f"{place}: its types cannot be read ({error}); import what they name") from error


def _docstring(function: Callable[..., Any], place: str) -> tuple[str, dict[str, str]]:
    """What the function does, and what is said of each argument."""
    text = inspect.getdoc(function)
    if not text or not text.strip():
        raise ConfigError(
            f"{place}: has no docstring, by which a model knows what it does; write one, or begin its name with _"
        )
    summary, arguments, section, name = list[str](), dict[str, str](), "", ""
    for line in text.splitlines():
        if found := _SECTION.match(line):
            section, name = found[1], ""
        elif not section:
            summary.append(line)
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            if found := _ARGUMENT.fullmatch(line):
                name = found[1]
                arguments[name] = found[2]
            elif name:
                arguments[name] += f" {line.strip()}"
    return "\n".join(summary).strip(), arguments


def _schema(hint: Any, place: str) -> dict[str, Any]:
    if hint is Any or hint is inspect.Parameter.empty:
        return {}
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _annotated(arguments, place)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return _either([_schema(one, place) for one in arguments])
    if hint in _SEQUENCES or origin in (*_SEQUENCES, *map(typing.get_origin, (Sequence[int],))):
        items = [_schema(one, place) for one in arguments if one is not ...]
        return {"type": "array"} | ({"items": _either(items)} if items else {})
    if hint in (dict, Mapping) or origin in (dict, Mapping, typing.get_origin(Mapping[str, int])):
        values = {"additionalProperties": _schema(arguments[1], place)} if arguments else {}
        return {"type": "object"} | values
    raise ConfigError(
        f"{place} is of type {shown(hint, 60)}, which JSON does not have; use str, int, float, bool, list, dict, "
        "Literal or a union of them"
    )


def _annotated(arguments: Sequence[Any], place: str) -> dict[str, Any]:
    texts = [one for one in arguments[1:] if isinstance(one, str)]
    return _schema(arguments[0], place) | ({"description": texts[0]} if texts else {})


def _either(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One of several; each once, and types alone as a list of them."""
    different = list({json.dumps(one, sort_keys=True): one for one in schemas}.values())
    if len(different) == 1:
        return different[0]
    if all(one.keys() == {"type"} and isinstance(one["type"], str) for one in different):
        return {"type": [one["type"] for one in different]}
    return {"anyOf": different}
