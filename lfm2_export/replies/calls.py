"""What stands between a block's markers, as calls.

In: a block's text as the families write it: LFM2's Python list (``[f(a="b"), g()]``), JSON (``[{"name": "f",
"arguments": {...}}]``) where a system message asks for it, XML
(``<function=f><parameter=a>b</parameter></function>``). Out: names and arguments, or None where it is none of them.
The forms do not overlap, so each is tried; no model is asked for its name.
"""

from __future__ import annotations

from lfm2_export import json_values
from lfm2_export.replies.python_calls import parse_python
from lfm2_export.replies.raw import RawCall
from lfm2_export.replies.xml_calls import parse_xml

_MOST_CALLS = 64


def parse_calls(text: str) -> list[RawCall] | None:
    """The calls of one block, at least one; None where it is malformed."""
    text = text.strip()
    for parse in (_parse_json, parse_xml, parse_python):
        if calls := parse(text):
            return calls if len(calls) <= _MOST_CALLS else None
    return None


def _parse_json(text: str) -> list[RawCall] | None:
    if not text.startswith(("[", "{")):
        return None
    try:
        value = json_values.parse(text)
    except json_values.JsonError:
        return None
    calls = [_from_object(item) for item in (value if isinstance(value, list) else [value])]
    return None if None in calls else [call for call in calls if call is not None]


def _from_object(value: object) -> RawCall | None:
    """``{"name": ..., "arguments": {...}}``; some models say "parameters", and some write the arguments as a string."""
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json_values.parse(arguments)
        except json_values.JsonError:
            return None
    return RawCall(name=name, arguments=arguments) if isinstance(arguments, dict) else None
