"""The tools that a model may call, and whether a call is one of them.

In: functions with JSON schemas of their arguments. Out: a call that fits, or None. What is checked: the name, required
arguments, unknown ones where a schema forbids them, and for each argument its type, ``enum`` and ``const``. What lies
deeper in a schema is the tool's own to check.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lfm2_export import json_values
from lfm2_export.replies.events import ToolCall
from lfm2_export.replies.raw import RawCall

_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: _is_number(v) and v == int(v),
    "number": lambda v: _is_number(v),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
    "null": lambda v: v is None,
}


def _is_number(value: Any) -> bool:
    """Neither infinite nor NaN; an integer is neither, and may be beyond the range of the float that is asked."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


class Tools:
    """``schemas``: by a function's name, the JSON schema of its arguments (an empty one takes anything)."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]):
        self._schemas = dict(schemas)

    @classmethod
    def from_openai(cls, tools: Sequence[Mapping[str, Any]]) -> Tools:
        """``[{"type": "function", "function": {"name": ..., "parameters": {...}}}]``; checked by who took it in."""
        functions = [tool["function"] for tool in tools]
        return cls({function["name"]: function.get("parameters") or {} for function in functions})

    @property
    def schemas(self) -> Mapping[str, Mapping[str, Any]]:
        """By a function's name, the JSON schema of its arguments."""
        return self._schemas

    @property
    def names(self) -> list[str]:
        return list(self._schemas)

    def accept_all(self, calls: Sequence[RawCall]) -> tuple[ToolCall, ...] | None:
        """All of them as calls of these tools; None where one is not."""
        accepted = [self.accept(call) for call in calls]
        return None if None in accepted else tuple(call for call in accepted if call is not None)

    def accept(self, call: RawCall) -> ToolCall | None:
        if call.name not in self._schemas:
            return None
        schema = self._schemas[call.name]
        properties = _mapping(schema.get("properties"))
        arguments = dict(call.arguments)
        if call.as_text:
            arguments = {name: _typed(value, _mapping(properties.get(name))) for name, value in arguments.items()}
        fits = _has_all(arguments, schema) and all(
            _fits(value, properties.get(name), schema) for name, value in arguments.items()
        )
        return ToolCall(name=call.name, arguments=arguments) if fits and _is_json(arguments) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _has_all(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    return all(name in arguments for name in required_names(schema))


def required_names(schema: Mapping[str, Any]) -> list[str]:
    """The arguments that a schema requires; what is no name in its list can be required of nothing."""
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []


def _fits(value: Any, schema: object, outer: Mapping[str, Any]) -> bool:
    if not isinstance(schema, Mapping):
        return schema is not None or outer.get("additionalProperties") is not False
    kinds = _kinds(schema)
    if kinds and not any(_TYPES[kind](value) for kind in kinds):
        return False
    if isinstance(choices := schema.get("enum"), list) and not any(_same(value, choice) for choice in choices):
        return False
    return "const" not in schema or _same(value, schema["const"])


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    """The types that a schema names; those that JSON schema does not know are no types to check."""
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    known = [kind for kind in kinds if isinstance(kind, str) and kind in _TYPES]
    return known if len(known) == len(kinds) else []


def _same(one: Any, other: Any) -> bool:
    """Python takes True for 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """A value of a form that has only text: what its schema says it is, the text where it says nothing."""
    kinds = _kinds(schema)
    if not kinds or "string" in kinds:
        return text
    try:
        return json_values.parse(text.strip())
    except json_values.JsonError:
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def _is_json(arguments: Mapping[str, Any]) -> bool:
    """Neither infinite nor half of a surrogate pair."""
    try:
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return False
    return True
