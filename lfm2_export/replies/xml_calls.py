"""Calls as XML: ``<function=f><parameter=a>b</parameter></function>``, also with ``name="f"`` and ``<invoke ...>``.

This is what Qwen's coder models and those trained for the same agents write; no reference of LFM3's own form was at
hand when this was written. A value is the text between its tags, without the line breaks beside them.
"""

from __future__ import annotations

import re

from lfm2_export.replies.raw import RawCall

_NAME = r"""\s*(?:=|\s+name\s*=)\s*["']?([\w.:-]+)["']?\s*>"""
_FUNCTION = re.compile(rf"\s*<(function|invoke){_NAME}(.*?)</\1>\s*", re.DOTALL)
_PARAMETER = re.compile(rf"\s*<parameter{_NAME}(.*?)</parameter>\s*", re.DOTALL)


def parse_xml(text: str) -> list[RawCall] | None:
    """None where anything but calls is there."""
    calls, at = list[RawCall](), 0
    while at < len(text):
        found = _FUNCTION.match(text, at)
        arguments = _arguments(found[3]) if found else None
        if found is None or arguments is None:
            return None
        calls.append(RawCall(name=found[2], arguments=arguments, as_text=True))
        at = found.end()
    return calls


def _arguments(text: str) -> dict[str, str] | None:
    arguments, at = dict[str, str](), 0
    while at < len(text):
        found = _PARAMETER.match(text, at)
        if found is None:
            return None if text[at:].strip() else arguments
        if found[1] in arguments:
            return None
        arguments[found[1]] = _without_breaks(found[2])
        at = found.end()
    return arguments


def _without_breaks(value: str) -> str:
    return value.removeprefix("\n").removesuffix("\n")
