"""How values, names and whole messages are shown to a person: on one line, and no longer than can be read.

In: anything, often from a file that a stranger wrote: a megabyte of text, control characters, an integer of 5,000
digits, ten thousand names. Out: printable text of bounded length, made with bounded work.
"""

from __future__ import annotations

import heapq
import itertools
import re
import reprlib
from collections.abc import Collection

# Of a whole message: what a person reads at a glance, and what a log line takes.
MESSAGE_LIMIT = 380
_VALUE_LIMIT = 80
_NAMES = 8
_NAME_LIMIT = 72  # the family's longest tensor names have 61 characters
_ROOM = 240

_DIGITS = re.compile(r"([0-9]+)")
_LINE_BREAKS = re.compile(r"\s*[\r\n]\s*")


class _Short(reprlib.Repr):
    """``repr`` that stops early: of a list of a million items the first few are formatted, not all."""

    def __init__(self, limit: int):
        super().__init__()
        self.fillvalue = "…"
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 12
        self.maxstring = self.maxother = limit
        self.maxlong = limit

    def repr_int(self, value: int, level: int) -> str:
        try:
            return super().repr_int(value, level)
        except ValueError:  # Python refuses to spell out integers of thousands of digits
            return "<int>"

    def repr_dict(self, value: dict[object, object], level: int) -> str:
        """In the file's order, which the standard library's sorts."""
        if level <= 0:
            return f"{{{self.fillvalue}}}" if value else "{}"
        first = itertools.islice(value.items(), self.maxdict)
        pieces = [f"{self.repr1(key, level - 1)}: {self.repr1(item, level - 1)}" for key, item in first]
        return f"{{{', '.join(pieces + [self.fillvalue] * (len(value) > self.maxdict))}}}"


def shown(value: object, limit: int = _VALUE_LIMIT) -> str:
    """A value as a message quotes it: its ``repr``, cut where it is long."""
    return one_line(_Short(limit).repr(value), limit)


def shown_reason(error: Exception) -> str:
    """What a parser found wrong, short."""
    return shown(str(error), 120)[1:-1]


def listed(names: Collection[str], *, room: int = _ROOM, longest: int = _NAME_LIMIT) -> str:
    """The first eight names in an order that counts layers as numbers, and how many more there are. Long ones are
    fewer: a message has ``room`` for so many characters of them, and for one name of ``longest`` at least."""
    text, count = "", 0
    for name in heapq.nsmallest(_NAMES, names, key=natural):
        longer = (f"{text}, " if text else "") + one_line(name, longest)
        if count and len(longer) > room:
            break
        text, count = longer, count + 1
    more = len(names) - count
    return f"{text} and {more} more" if more else text


def named(name: str) -> str:
    """A name as a message gives it, without quotes."""
    return one_line(name, _NAME_LIMIT)


def one_line(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """A message on one line: its line breaks become spaces."""
    return printable(_LINE_BREAKS.sub(" ", _without_middle(text, 2 * limit).strip()), limit)


def printable(text: str, limit: int) -> str:
    """``text`` without a character that could steer a terminal or that UTF-8 cannot write; those stand as escapes.
    Where it is long its middle goes, since a message ends with its remedy."""
    text = _without_middle(text, 2 * limit)
    return _without_middle(text if text.isprintable() else "".join(map(_printable, text)), limit)


def as_unicode(text: str) -> str:
    """``text`` with lone surrogates, which UTF-8 cannot write, as escapes. Names of files and JSON have them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts digits as numbers; by length first, so that no run of a thousand digits becomes an integer."""
    parts = _DIGITS.split(name)
    return [
        (len(part.lstrip("0")), 0, part.lstrip("0")) if index % 2 else (0, 1, part) for index, part in enumerate(parts)
    ]


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = limit * 3 // 5
    return f"{text[:head]}…{text[len(text) - (limit - head - 1) :]}"


def _printable(character: str) -> str:
    """Control characters, lone surrogates and marks of direction as escapes."""
    return character if character.isprintable() else ascii(character)[1:-1]
