"""A grammar of the calls that a model must make, for who constrains its tokens (``constraints.Grammars.of_grammar``).

In: tools with JSON schemas of their arguments. Out: Lark as llguidance reads it: a block of calls as the parsers here
read it, each of which fits its schema. Between LFM2's markers that is a Python list, ``[f(a="b", c=1)]``, the form that
these models were trained on; where a name cannot be written in it, and between ``<tool_call>``, it is JSON. Arguments
come in their schema's order; those that only ``additionalProperties`` allows are not made. Of a schema that is followed
what ``tools.Tools`` checks, and at any depth items, properties, ``anyOf``, lengths, ranges and patterns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfm2_export.replies.reply import BLOCKS, LFM2
from lfm2_export.replies.tools import Tools, required_names

# Of one block; a small model would make calls for ever.
MOST_CALLS = 8
_WORD = re.compile(r"[^\W\d][\w.\-]*")
_RESERVED = ("True", "true", "False", "false", "None", "null")
_DEEPEST = 8
# What narrows a string or a number beyond its type; llguidance's own JSON follows these.
_LENGTHS = ("pattern", "format", "minLength", "maxLength")
_RANGES = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_TERMINALS = {
    "string": "STRING",
    "number": "NUMBER",
    "integer": "INTEGER",
    "boolean": "BOOLEAN",
    "null": "NULL",
}
# No exponents: what is beyond a float's range is no JSON number to anybody.
_SHARED = r"""
NUMBER: /-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/
INTEGER: /-?(0|[1-9][0-9]{0,15})/
COMMA: /, ?/
any: STRING | NUMBER | BOOLEAN | NULL | "[" (any (COMMA any)*)? "]" | "{" (pair (COMMA pair)*)? "}"
pair: STRING /: ?/ any
"""
_QUOTED, _SINGLY = r"""/"([^"\\\x00-\x1f\x7f]|\\["\\nrt])*"/""", r"""/'([^'\\\x00-\x1f\x7f]|\\['\\nrt])*'/"""


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How calls are written: ``call`` with the name and the arguments in its place, ``member`` before an argument."""

    call: tuple[str, str]
    member: tuple[str, str]
    constants: Mapping[bool | None, tuple[str, ...]]
    strings: tuple[str, ...]

    def terminals(self) -> str:
        booleans = [*self.constants[True], *self.constants[False]]
        return (
            f"{_SHARED}STRING: {' | '.join(self.strings)}\nBOOLEAN: {_texts(booleans)}\n"
            f"NULL: {_texts(self.constants[None])}\n"
        )

    def literal(self, value: object) -> str:
        """One value."""
        if value is None or isinstance(value, bool):
            return f"({_texts(self.constants[value])})"
        return _text(json.dumps(value, ensure_ascii=False))


# JSON's words are read in a Python list, too.
_PYTHON = _Form(
    call=("{name}(", ")"),
    member=("{name}", "="),
    constants={True: ("True", "true"), False: ("False", "false"), None: ("None", "null")},
    strings=(_QUOTED, _SINGLY),
)
_JSON = _Form(
    call=('{{"name": {quoted}, "arguments": {{', "}}}}"),
    member=("{quoted}", ": "),
    constants={True: ("true",), False: ("false",), None: ("null",)},
    strings=(_QUOTED,),
)


def call_grammar(tools: Tools, token_id: Callable[[str], int | None], *, name: str = "", parallel: bool = True) -> str:
    """What a reply must be where a tool has to be called.

    Args:
        tools: what may be called.
        token_id: of a text that is one token, else None.
        name: the only tool that may be called; "" where any may.
        parallel: more than one call may be made; of a named tool it is always one.
    """
    schemas = {one: schema for one, schema in tools.schemas.items() if name in ("", one)}
    markers = LFM2 if token_id(LFM2.start) is not None else BLOCKS[1]
    form = _PYTHON if markers is LFM2 and all(map(_is_written, schemas.items())) else _JSON
    rules = _Rules(form)
    calls = rules.either(rules.call(one, schema) for one, schema in schemas.items())
    block = _listed(calls, 1, MOST_CALLS if parallel and not name else 1)
    start = f'start: {_marker(markers.start, token_id)} "[" {block} "]" {_marker(markers.end, token_id)}'
    return "\n".join([start, *rules.lines]) + form.terminals()


def can_force(token_id: Callable[[str], int | None], templates: Iterable[str]) -> bool:
    """Whether a model writes calls between markers that are known here: LFM2's as tokens, others as its chat template
    says."""
    return token_id(LFM2.start) is not None or any(BLOCKS[1].start in template for template in templates)


def _marker(text: str, token_id: Callable[[str], int | None]) -> str:
    """As its token, where it is one: spelled out in characters it would be another text to the model."""
    ident = token_id(text)
    return _text(text) if ident is None else f"<[{ident}]>"


def _is_written(tool: tuple[str, Mapping[str, Any]]) -> bool:
    """Whether its name and its arguments' are words of the Python form."""
    name, schema = tool
    words = (name, *_properties(schema), *required_names(schema))
    return all(_WORD.fullmatch(word) and word not in _RESERVED for word in words)


class _Rules:
    """Rules under numbered names; each method returns what stands for a thing in another rule."""

    def __init__(self, form: _Form):
        self._form = form
        self.lines: list[str] = []

    def _add(self, body: str) -> str:
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def either(self, options: Iterable[str]) -> str:
        return self._add(" | ".join(options))

    def call(self, name: str, schema: Mapping[str, Any]) -> str:
        before, after = (part.format(name=name, quoted=json.dumps(name)) for part in self._form.call)
        properties, required = _properties(schema), required_names(schema)
        # A required name without a schema of its own takes anything.
        every = {**properties, **{one: {} for one in required if one not in properties}}
        return self._add(f"{_text(before)} {self._members(every, required, self._form.member, 0)} {_text(after)}")

    def _members(
        self, properties: Mapping[str, Any], required: Sequence[str], written: tuple[str, str], depth: int
    ) -> str:
        """Properties in order, those that are not required left out or not, with commas between what is there. From the
        end on: what may follow where none, and where one is there before."""
        first = rest = '""'
        for name, schema in reversed(list(properties.items())):
            key = "".join(written).format(name=name, quoted=json.dumps(name, ensure_ascii=False))
            one = f"{_text(key)} {self._value(schema, depth)} {rest}"
            if name in required:
                first, rest = self._add(one), self._add(f"COMMA {one}")
            else:
                first, rest = self._add(f"{one} | {first}"), self._add(f"COMMA {one} | {rest}")
        return first

    def _value(self, schema: object, depth: int) -> str:
        """A value that fits a schema; where nothing of a schema is known here, any."""
        if not isinstance(schema, Mapping) or depth > _DEEPEST:
            return "any"
        if "const" in schema:
            return self._form.literal(schema["const"])
        if isinstance(choices := schema.get("enum"), list) and choices:
            return self.either(map(self._form.literal, choices))
        for name in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(name), list) and options:
                return self.either([self._value(option, depth + 1) for option in options])
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) and kinds else [kinds]
        return self.either([self._of_kind(kind, schema, depth) for kind in kinds])

    def _of_kind(self, kind: object, schema: Mapping[str, Any], depth: int) -> str:
        narrowing = {"string": _LENGTHS, "number": _RANGES, "integer": _RANGES}.get(str(kind), ())
        if narrow := {name: schema[name] for name in narrowing if name in schema}:
            return self._add(f"%json {json.dumps({'type': kind, **narrow})}")
        if kind == "array":
            return self._array(schema, depth)
        if kind == "object":
            return self._object(schema, depth)
        return _TERMINALS.get(str(kind), "any")

    def _array(self, schema: Mapping[str, Any], depth: int) -> str:
        item = self._value(schema.get("items", {}), depth + 1)
        least, most = _count(schema, "minItems") or 0, _count(schema, "maxItems")
        if most == 0:
            return '"[]"'
        some = _listed(item, max(least, 1), most)
        return self._add(f'"[" {some} "]"' if least else f'"[" ({some})? "]"')

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        properties = _properties(schema)
        if not properties:
            return self._add('"{" (pair (COMMA pair)*)? "}"')
        return self._add(f'"{{" {self._members(properties, required_names(schema), _JSON.member, depth + 1)} "}}"')


def _listed(item: str, least: int, most: int | None) -> str:
    """``item`` so many times, with commas between."""
    if most is not None and most <= 1:
        return item
    return f"{item} (COMMA {item}){{{least - 1},{'' if most is None else most - 1}}}"


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _count(schema: Mapping[str, Any], name: str) -> int | None:
    value = schema.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text(text: str) -> str:
    """A text in Lark."""
    return json.dumps(text, ensure_ascii=False)


def _texts(texts: Sequence[str]) -> str:
    return " | ".join(map(_text, texts))
