"""Reads the fields of a request's JSON object, by type and range.

Every reader takes null for a field that is not there, as OpenAI's servers do, and raises a 400 that names the field.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lfm2_export.messages import shown
from lfm2_export.server.errors import invalid

Body = Mapping[str, Any]


def text(body: Body, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise invalid(name, f"{shown(value, 40)} is not text; give a string")
    return value


def flag(body: Body, name: str, default: bool) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(name, f"{shown(value, 40)} is not usable; give true or false")
    return default if value is None else value


def integer(body: Body, name: str, low: int, high: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise invalid(name, f"{shown(value, 40)} is not usable; give an integer {_range(low, high)}")
    return value


def number(body: Body, name: str, low: float, high: float | None = None) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    # An integer may be beyond a float's range: it is compared, which is exact, before it is converted.
    most = sys.float_info.max if high is None else high
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= most:
        raise invalid(name, f"{shown(value, 40)} is not usable; give a number {_range(low, high)}")
    return float(value)


def _range(low: float, high: float | None) -> str:
    return f"from {low} up" if high is None else f"from {low} to {high}"


def refuse_unless(body: Body, name: str, off: tuple[object, ...], reason: str) -> None:
    """A 400 where a field asks for what is not done here: anything but null and ``off``."""
    value = body.get(name)
    if value is not None and not any(value == one and type(value) in (type(one), int, float) for one in off):
        raise invalid(name, f"{shown(value, 40)} is not supported; {reason}", code="unsupported_parameter")
