"""Dataclasses as JSON values and back, checked field by field: what is read is data from elsewhere.

In: a dataclass, or JSON values and the dataclass that they should be. Out: the other. Besides each value's type its
size is checked: integers have 64 bits, numbers are finite, texts are short and of Unicode characters.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from lfm2_export.cache import CacheSpec
from lfm2_export.errors import ArtifactError
from lfm2_export.messages import as_unicode, shown

# The longest path that systems take; names and reasons are far shorter.
_LONGEST = 4096
# Of values whose structure is their writer's own (``Any``); the deepest real ones have 5 levels.
_DEEPEST = 16


def encode(value: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON values; a figure that is not finite becomes null, half a character (a
    file's name may have one) an escape."""
    if isinstance(value, CacheSpec):
        return value.to_json()
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, str):
        return as_unicode(value)
    if isinstance(value, Mapping):
        return {as_unicode(str(key)): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(kind: Any, value: Any, place: str = "") -> Any:
    """A JSON value as the type that a dataclass field is annotated with.

    Raises:
        ArtifactError: names the first place that is missing, unknown, of the wrong type or out of bounds.
    """
    if kind is Any:
        return _checked(value, place)
    if kind is CacheSpec:
        return _decode_cache(value, place)
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, place)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, place)
    if origin is tuple:
        return tuple(decode(args[0], item, f"{place}[{i}]") for i, item in enumerate(_expect(list, value, place)))
    if origin is Mapping:
        items = _expect(dict, value, place).items()
        return {_text(key, place): decode(args[1], item, _join(place, key)) for key, item in items}
    if kind is float and type(value) is int:
        return float(_expect(int, value, place))
    return _expect(kind, value, place)


def _decode_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    for kind in kinds:
        if kind is type(None) and value is None:
            return None
        if kind in (int, str) and type(value) is kind:
            return _expect(kind, value, place)
    rest = [kind for kind in kinds if kind is not type(None)]
    return decode(rest[0], value, place)


def _decode_dataclass(kind: Any, value: Any, place: str) -> Any:
    raw = _expect(dict, value, place)
    hints = _hints(kind)
    if unknown := raw.keys() - hints.keys():
        raise ArtifactError(f"{_join(place, min(unknown))} is an unknown field")
    values = {}
    for f in fields(kind):
        if f.name in raw:
            values[f.name] = decode(hints[f.name], raw[f.name], _join(place, f.name))
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ArtifactError(f"{_join(place, f.name)} is missing")
    return kind(**values)


_hints = functools.cache(get_type_hints)


def _decode_cache(value: Any, place: str) -> CacheSpec:
    try:
        return CacheSpec.from_json(value)
    except ArtifactError as error:
        raise ArtifactError(f"{place}: {error}") from error


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _expect(kind: Any, value: Any, place: str) -> Any:
    if type(value) is not kind:
        names = {dict: "object", list: "list", str: "string", int: "integer", float: "number", bool: "boolean"}
        raise ArtifactError(f"{place}={shown(value)} is not a{'n' * (kind in (dict, int))} {names[kind]}")
    if kind is str:
        return _text(value, place)
    if kind is int and not -(2**63) <= value < 2**63:
        raise ArtifactError(f"{place}={shown(value)} has more than 64 bits")
    if kind is float and not math.isfinite(value):
        raise ArtifactError(f"{place}={value} is not a finite number")
    return value


def _text(value: str, place: str) -> str:
    if len(value) > _LONGEST:
        raise ArtifactError(f"{place}={shown(value)} has {len(value)} characters, more than {_LONGEST}")
    if not value.isascii() and as_unicode(value) != value:
        raise ArtifactError(f"{place}={shown(value)} is not Unicode text")
    return value


def _checked(value: Any, place: str, depth: int = 0) -> Any:
    """A JSON value of any structure, whose parts are checked like all others."""
    if depth > _DEEPEST:
        raise ArtifactError(f"{place} is nested more than {_DEEPEST} levels deep")
    if isinstance(value, dict):
        return {_text(key, place): _checked(item, _join(place, key), depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_checked(item, place, depth + 1) for item in value]
    return value if value is None else _expect(type(value), value, place)
