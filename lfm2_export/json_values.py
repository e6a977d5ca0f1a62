"""JSON that strangers wrote: parsed with a bound on memory, and written so that every parser reads it.

In: the bytes of a file, whose size its reader has bounded. Out: values, or ``JsonError``. Python's parser takes what is
no JSON (NaN, Infinity, half of a surrogate pair), as transformers does, and so do we; ``plain`` replaces it before
a file of ours is written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lfm2_export.messages import shown_reason

# A value of three bytes ("[],") takes up to 120 bytes parsed, so that this many take 240 MB. The largest real files
# (manifest and header of the 24B) have some 100,000.
MOST_VALUES = 2_000_000
# Some of Python's encoders and our own walks are recursive; the deepest real files have 6 levels.
DEEPEST = 64

_SURROGATES = re.compile("[\ud800-\udfff]")

Pairs = list[tuple[str, Any]]


class JsonError(ValueError):
    """What is wrong, as the end of a sentence that begins with the file: "is not JSON (...)"."""


def parse(data: bytes | str, *, pairs_hook: Callable[[Pairs], Any] | None = None) -> Any:
    """The value of a JSON text; ``pairs_hook`` is json's ``object_pairs_hook``.

    Raises:
        JsonError: it is no JSON, nested too deeply, or would take too much memory.
    """
    if _most_values(data) > MOST_VALUES:
        raise JsonError(f"holds more than {MOST_VALUES} values")
    try:
        value = json.loads(data, object_pairs_hook=pairs_hook)
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonError(f"is not JSON ({shown_reason(error)})") from error
    if _is_deep(value):
        raise JsonError(f"is nested more than {DEEPEST} levels deep")
    return value


def _most_values(data: bytes | str) -> int:
    """Each value but the first of a list or an object has a comma before it."""
    if isinstance(data, str):
        return data.count("{") + data.count("[") + data.count(",")
    return data.count(b"{") + data.count(b"[") + data.count(b",")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def plain(value: Any) -> Any:
    """``value`` as JSON can say it: numbers that are not finite become null, lone surrogates U+FFFD."""
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dump(value: Any, *, indent: int = 2) -> str:
    """A JSON file's text, of ``plain`` values."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def not_plain(value: Mapping[str, Any]) -> list[str]:
    """The keys of an object whose values ``plain`` changes."""
    return [key for key, item in value.items() if (key, item) != (plain(key), plain(item))]
