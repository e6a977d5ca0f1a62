"""What a name that there is not was probably meant to be.

In: what was typed, and the names that there are. Out: a few words for the message that refuses it, or nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# difflib's share of equal characters: "exprot" and "export" have 0.83, "q5" and "q4" 0.5, "onx" and "onnx" 0.86.
_CUTOFF = 0.6
_LONGEST = 60


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean export?)" for "exprot", "" where nothing is near."""
    there = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower()[:_LONGEST], there, n=1, cutoff=_CUTOFF)
    return f" (did you mean {there[found[0]]}?)" if found else ""
