"""Calls as a Python list: ``[f(a="b", c=[1, 2]), g.h()]``; nothing is evaluated but single literals.

A grammar of its own rather than Python's: arguments may be called ``from`` or ``class``, which Python's refuses,
values are literals only (``true``, ``false`` and ``null`` too), and nesting is bounded. ``ast.literal_eval`` reads one
string or number at a time.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from lfm2_export.replies.raw import RawCall

_DEEPEST = 32
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>[rRbB]?(?:\"\"\"(?:\\.|[^\\])*?\"\"\"|'''(?:\\.|[^\\])*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
    | (?P<number>[+-]?(?:0[xX][0-9a-fA-F]{1,32}|(?:\d{1,400}(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?))
    | (?P<word>[^\W\d][\w.\-]*)
    | (?P<sign>[\[\](){},:=])
    )""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}


class _Malformed(Exception):
    """The text is no list of calls."""


def parse_python(text: str) -> list[RawCall] | None:
    """The calls of a list, or of one call without brackets; None where it is neither."""
    try:
        reader = _Reader(_tokens(text))
        calls = reader.calls()
        reader.expect("")
    except _Malformed:
        return None
    return calls


def _tokens(text: str) -> list[tuple[str, str]]:
    """Pairs of kind and text, with an empty sign at the end."""
    tokens, at, text = list[tuple[str, str]](), 0, text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise _Malformed
        tokens.append((str(found.lastgroup), str(found[str(found.lastgroup)])))
        at = found.end()
    return [*tokens, ("sign", "")]


class _Reader:
    """Goes through the tokens once."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self._tokens = tokens
        self._at = 0

    def expect(self, sign: str) -> None:
        if not self._take(sign):
            raise _Malformed

    def _take(self, sign: str) -> bool:
        taken = self._tokens[self._at] == ("sign", sign)
        self._at += taken
        return taken

    def _next(self) -> tuple[str, str]:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def calls(self) -> list[RawCall]:
        if not self._take("["):
            return [self._call()]
        calls = list[RawCall]()
        while not self._take("]"):
            calls.append(self._call())
            self._comma_before("]")
        return calls

    def _comma_before(self, end: str) -> None:
        """A comma, which may be left out at the end."""
        if not self._take(",") and self._tokens[self._at] != ("sign", end):
            raise _Malformed

    def _call(self) -> RawCall:
        kind, name = self._next()
        if kind != "word" or name in _WORDS:
            raise _Malformed
        self.expect("(")
        arguments = dict[str, Any]()
        while not self._take(")"):
            kind, key = self._next()
            if kind != "word" or key in arguments:
                raise _Malformed
            self.expect("=")
            arguments[key] = self._value(0)
            self._comma_before(")")
        return RawCall(name=name, arguments=arguments)

    def _value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise _Malformed
        kind, text = self._next()
        if kind == "sign":
            return self._collection(text, depth + 1)
        if kind == "word":
            if text not in _WORDS:
                raise _Malformed
            return _WORDS[text]
        value = _literal(text)
        while kind == "string" and self._tokens[self._at][0] == "string":  # Python joins neighbours
            value += _literal(self._next()[1])
        return value

    def _collection(self, opening: str, depth: int) -> Any:
        if opening == "{":
            return self._dict(depth)
        if opening not in ("[", "("):
            raise _Malformed
        closing, values = {"[": "]", "(": ")"}[opening], list[Any]()
        while not self._take(closing):
            values.append(self._value(depth))
            self._comma_before(closing)
        return values

    def _dict(self, depth: int) -> dict[str, Any]:
        values = dict[str, Any]()
        while not self._take("}"):
            key = self._value(depth)
            if not isinstance(key, str):
                raise _Malformed
            self.expect(":")
            values[key] = self._value(depth)
            self._comma_before("}")
        return values


def _literal(text: str) -> Any:
    """A string or a number."""
    if text[0] in "bB":
        raise _Malformed
    number = text.lstrip("+-")
    if number[:1] == "0" and number.isdigit():  # Python refuses 007
        return int(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d", which models write for "\\d"
            return ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _Malformed from None
