"""Ends a text at the first of some strings, no part of which is ever shown.

In: a text in pieces of any size. Out: what is certain to come before a stop string. The string that is complete first
ends the text, so that the result does not depend on how the text was cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from lfm2_export.replies.markers import held_back


class StopStrings:
    """``found`` is the string that ended the text, None before; nothing comes after it."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What is certain with ``text``."""
        if self.found is not None:
            return ""
        self._held += text
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if matches:
            _, at, self.found = min(matches)
            return self._held[:at]
        certain = len(self._held) - held_back(self._held, self._stops)
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece

    def finish(self) -> str:
        """What was held back, at the end of a text without a stop string."""
        piece, self._held = "" if self.found is not None else self._held, ""
        return piece
