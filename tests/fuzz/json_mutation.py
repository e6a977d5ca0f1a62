"""Changes one value of a JSON document to what its reader may not expect, and writes it out again.

Numbers beyond every type, NaN, strings that are no text or no path, other types, nesting, lists of another length, keys
twice or under another name: bytes alone rarely get so far, since most changes of bytes leave no JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any


class Raw(str):
    """JSON text that is written as it stands."""


class Pairs(list):
    """An object as (key, value) pairs: a key may stand twice."""


# As long as Python takes integers, and one digit longer.
_LONGEST_INTEGER = 4300

EXTREMES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 1 << 15, 1 << 16),
    *(sign * ((1 << bits) + extra) for bits in (31, 32, 53, 62, 63, 64) for extra in (-1, 0) for sign in (1, -1)),
    *(Raw(text) for text in ("1e400", "-1e400", "1E999", "NaN", "Infinity", "-Infinity", "-0", "-0.0", "5e-324")),
    *(Raw(text) for text in ("1" * 400, "9" * _LONGEST_INTEGER, "9" * (_LONGEST_INTEGER + 1), "1.0", "3.0e0")),
    *(0.5, 1e-300, 1e-40, 1e-8, 1.0000001, 1e8, 1e38, 1e300, 1.7976931348623157e308),
    *("", " ", "0", "1", "true", "null", "NaN", "²", "٣", "½", "\0", "\n", "\x1b[2J", "\u202e", "\ud800", "\udcff"),
    *("../x", "/nowhere/xx", ".", "..", "a/b", "a\\b", "C:x", "~", "[/x]", "[red]x", "{{ 1 }}", "%s%n", "é" * 300),
    *("x" * 5000, "'" * 500, "a\nb", "😀", "__class__", "\ufeff"),
    *(Pairs(), [], [[]], [Pairs()], [None], [0], [True], ["x"], [1.5], [0] * 300, Pairs([("", "")]), Pairs([("x", 0)])),
    *(Raw("[" * depth + "]" * depth) for depth in (5, 200, 2000)),
    *(Raw('{"a":' * depth + "0" + "}" * depth) for depth in (5, 200, 2000)),
)


def loads(data: bytes) -> Any:
    """JSON with objects as ``Pairs``.

    Raises:
        ValueError, RecursionError: it is none.
    """
    return json.loads(data, object_pairs_hook=Pairs)


def dumps(value: Any) -> str:
    """The reverse, with ``Raw`` as it stands and surrogates as escapes."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumps(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def mutate_json(data: bytes, rng: Random, words: Sequence[str] = ()) -> bytes | None:
    """One change; None where ``data`` is no JSON, or a number in it too large for the change. ``words`` are keys and
    values that the reader knows."""
    try:
        document = loads(data)
        holder = [document]
        _change(*_place(holder, rng), rng, words)
        return dumps(holder[0]).encode("utf-8") if holder else b""
    except (ValueError, OverflowError, RecursionError):
        return None


Container = list[Any]


def _place(holder: Container, rng: Random) -> tuple[Container, int]:
    """A random value, as the list that it is in and its index. Near the root as likely as among a thousand entries."""
    container, index = holder, 0
    while True:
        value = _get(container, index)
        if not isinstance(value, list) or not value or rng.random() < 0.15:
            return container, index
        container, index = value, rng.randrange(len(value))


def _get(container: Container, index: int) -> Any:
    return container[index][1] if isinstance(container, Pairs) else container[index]


def _set(container: Container, index: int, value: Any) -> None:
    container[index] = (container[index][0], value) if isinstance(container, Pairs) else value


def _change(container: Container, index: int, rng: Random, words: Sequence[str]) -> None:
    changes: list[Callable[[Container, int, Random, Sequence[str]], None]] = [
        *[_replace] * 6,
        *[_nudge] * 4,
        _drop,
        _repeat,
        _rename,
        _add,
        _wrap,
        _take_anothers,
    ]
    rng.choice(changes)(container, index, rng, words)


def _replace(container: Container, index: int, rng: Random, words: Sequence[str]) -> None:
    extremes = (*EXTREMES, *words) if rng.random() < 0.3 else EXTREMES
    _set(container, index, rng.choice(extremes))


def _nudge(container: Container, index: int, rng: Random, words: Sequence[str]) -> None:
    """A small change of the value's own kind."""
    value = _get(container, index)
    if isinstance(value, bool) or value is None:
        value = not value
    elif isinstance(value, int):
        value = rng.choice([value + 1, value - 1, -value, value * 2, value // 2, value << 32, float(value), str(value)])
    elif isinstance(value, float):
        value = rng.choice([value * 1e30, value * 1e-30, -value, value + 1])
    elif isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        value = value[:cut] + rng.choice(["", "\0", "\ud800", "/", " ", "x", "0", "'", "[", value]) + value[cut:]
    elif isinstance(value, list):
        value = rng.choice([value[:-1], value * 2, value[::-1], value[1:]])
        value = Pairs(value) if isinstance(_get(container, index), Pairs) else value
    _set(container, index, value)


def _drop(container: Container, index: int, rng: Random, words: Sequence[str]) -> None:
    del container[index]


def _repeat(container: Container, index: int, rng: Random, words: Sequence[str]) -> None:
    """Once more, in an object under the same name."""
    times = rng.choice([1, 1, 1, 40])
    container[index:index] = [container[index]] * times


def _rename(container: Container, index: int, rng: Random, words: Sequence[str]) -> None:
    if isinstance(container, Pairs):
        names = [entry for entry in (*EXTREMES, *words) if isinstance(entry, str) and not isinstance(entry, Raw)]
        container[index] = (rng.choice(names), container[index][1])


def _add(container: Container, index: int, rng: Random, words: Sequence[str]) -> None:
    value = rng.choice(EXTREMES)
    name = rng.choice(words) if words else "x"
    container.insert(index, (name, value) if isinstance(container, Pairs) else value)


def _wrap(container: Container, index: int, rng: Random, words: Sequence[str]) -> None:
    value = _get(container, index)
    _set(container, index, rng.choice([[value], [[value]], Pairs([("content", value)]), Pairs([("x", value)])]))


def _take_anothers(container: Container, index: int, rng: Random, words: Sequence[str]) -> None:
    """The value of a neighbour, which is of the right kind in the wrong place."""
    _set(container, index, _get(container, rng.randrange(len(container))))
