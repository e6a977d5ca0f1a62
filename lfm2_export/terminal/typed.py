"""What a terminal sends beside text: keys that are escape sequences, and control characters. A model is given none."""

from __future__ import annotations

import re

_ESCAPES = re.compile(
    r"""\x1b(?:
      \[[0-?]*[ -/]*[@-~]                # CSI: arrow keys, colours
    | [\]PX^_].*?(?:\x07|\x1b\\|$)       # OSC, DCS and the like, with their text
    | O[ -~]                             # SS3: keys of the keypad
    | [ -/]*[0-~]
    )?""",
    re.VERBOSE | re.DOTALL,
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


def cleaned(text: str) -> str:
    """``text`` without what steers a terminal; line breaks and tabs stay."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROLS.sub("", _ESCAPES.sub("", text))
